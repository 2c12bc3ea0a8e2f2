package ipc

import (
	"sync"
	"sync/atomic"
	"testing"
	"time"
)

type taskFunc func()

func (f taskFunc) Run() { f() }

func TestLaneIsFair(t *testing.T) {
	l := NewLane(1, 1000, nil)
	gate := make(chan struct{})
	started := make(chan struct{})
	l.Submit(9, taskFunc(func() { close(started); <-gate }))
	<-started
	var mu sync.Mutex
	var order []int
	add := func(n int) Task {
		return taskFunc(func() { mu.Lock(); order = append(order, n); mu.Unlock() })
	}
	for range 300 {
		l.Submit(1, add(1))
	}
	l.Submit(2, add(2))
	l.Submit(3, add(3))
	close(gate)
	l.Close()
	at := map[int]int{}
	for i, n := range order {
		if _, ok := at[n]; !ok {
			at[n] = i
		}
	}
	if len(order) != 302 || at[2] > 2 || at[3] > 3 {
		t.Errorf("%d tasks ran; owner 2 came at %d, owner 3 at %d", len(order), at[2], at[3])
	}
}

func TestLaneIsBounded(t *testing.T) {
	l := NewLane(1, 10, nil)
	gate := make(chan struct{})
	started := make(chan struct{})
	l.Submit(9, taskFunc(func() { close(started); <-gate }))
	<-started
	nop := taskFunc(func() {})
	accepted := 0
	for range 100 {
		if l.Submit(1, nop) {
			accepted++
		}
	}
	if accepted != 5 {
		t.Errorf("one owner got %d places of 10", accepted)
	}
	if !l.Submit(2, nop) {
		t.Error("another owner finds no place")
	}
	for owner := range uint32(100) {
		l.Submit(100+owner, nop)
	}
	if n := l.Queued(); n != 10 {
		t.Errorf("%d tasks wait in a queue of 10", n)
	}
	close(gate)
	l.Close()
	if l.Submit(1, nop) {
		t.Error("a closed lane takes a task")
	}
}

func TestLaneRests(t *testing.T) {
	var rests, ran atomic.Int32
	l := NewLane(1, 1000, func() { rests.Add(1) })
	gate := make(chan struct{})
	l.Submit(1, taskFunc(func() { <-gate }))
	for range 99 {
		l.Submit(1, taskFunc(func() { ran.Add(1) }))
	}
	close(gate)
	for start := time.Now(); rests.Load() < 4 && time.Since(start) < 5*time.Second; time.Sleep(time.Millisecond) {
	}
	if n := rests.Load(); n != 4 { // after 32, 64, 96 and at the end
		t.Errorf("the worker rested %d times in 100 tasks", n)
	}
	l.Close()
}
