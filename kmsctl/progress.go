package main

import (
	"fmt"
	"io"
	"os"
	"sync"
	"time"
)

// progress shows on a terminal how far long work is. Without a terminal it does nothing.
type progress struct {
	tty   *os.File
	what  string
	total int64 // bytes, -1 when not known
	begin time.Time

	mu   sync.Mutex
	done int64
	last time.Time
	stop chan struct{}
}

// progressOf begins to show work on total bytes, -1 when that is not known.
func (a *app) progressOf(what string, total int64) *progress {
	now := time.Now()
	return &progress{tty: terminal(a.stderr), what: what, total: total, begin: now, last: now}
}

// waiting shows that the daemon is at work and for how long.
func (a *app) waiting(what string) *progress {
	p := a.progressOf(what, -1)
	if p.tty == nil {
		return p
	}
	p.stop = make(chan struct{})
	go func() {
		tick := time.NewTicker(time.Second)
		defer tick.Stop()
		for {
			select {
			case <-p.stop:
				return
			case <-tick.C:
				fmt.Fprintf(p.tty, "\r\x1b[K%s ... %v", p.what, time.Since(p.begin).Round(time.Second))
			}
		}
	}()
	return p
}

// reader counts what is read through it.
func (p *progress) reader(r io.Reader) io.Reader {
	if p.tty == nil {
		return r
	}
	return &countingReader{r, p}
}

type countingReader struct {
	io.Reader
	p *progress
}

func (c *countingReader) Read(b []byte) (int, error) {
	n, err := c.Reader.Read(b)
	c.p.add(int64(n))
	return n, err
}

func (p *progress) add(n int64) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.done += n
	now := time.Now()
	if now.Sub(p.last) < 200*time.Millisecond {
		return
	}
	p.last = now
	rate := size(int64(float64(p.done) / now.Sub(p.begin).Seconds()))
	if p.total > 0 {
		fmt.Fprintf(p.tty, "\r\x1b[K%s  %s of %s  %d %%  %s/s", p.what, size(p.done), size(p.total), p.done*100/p.total, rate)
	} else {
		fmt.Fprintf(p.tty, "\r\x1b[K%s  %s  %s/s", p.what, size(p.done), rate)
	}
}

// end removes the line.
func (p *progress) end() {
	if p.tty == nil {
		return
	}
	if p.stop != nil {
		close(p.stop)
	}
	fmt.Fprint(p.tty, "\r\x1b[K")
}

// readerAt is reader for what is read here and there.
func (p *progress) readerAt(r io.ReaderAt) io.ReaderAt {
	if p.tty == nil {
		return r
	}
	return &countingReaderAt{r, p}
}

type countingReaderAt struct {
	io.ReaderAt
	p *progress
}

func (c *countingReaderAt) ReadAt(b []byte, at int64) (int, error) {
	n, err := c.ReaderAt.ReadAt(b, at)
	c.p.add(int64(n))
	return n, err
}

// step counts one of total things that is done.
func (p *progress) step() {
	if p.tty == nil {
		return
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	p.done++
	now := time.Now()
	if now.Sub(p.last) < 200*time.Millisecond {
		return
	}
	p.last = now
	took := now.Sub(p.begin)
	left := time.Duration(float64(took) / float64(p.done) * float64(p.total-p.done)).Round(time.Second)
	fmt.Fprintf(p.tty, "\r\x1b[K%s  %d of %d  %d %%  %.0f/s  %v left", p.what, p.done, p.total, p.done*100/max(p.total, 1), float64(p.done)/took.Seconds(), left)
}
