package ipc

import "sync"

// Task is a piece of work for a Lane.
type Task interface{ Run() }

// restAfter is how many tasks a worker runs at most before it calls Rest.
const restAfter = 32

// maxOwners is how many owners a lane remembers that have nothing queued.
const maxOwners = 64

// Lane is a bounded pool of workers with a bounded queue. It takes one task of each owner in turn, and no owner gets
// more than half of the queue, so that one who asks for much delays another by one task per worker and not by all.
type Lane struct {
	rest func()

	mu      sync.Mutex
	wake    sync.Cond
	owners  map[uint32]*backlog
	turn    []*backlog // owners with tasks, in the order of their turns
	queued  int
	limit   int
	closed  bool
	workers sync.WaitGroup
}

// backlog is the queue of one owner.
type backlog struct {
	owner uint32
	tasks []Task // from first on
	first int
}

func (b *backlog) len() int { return len(b.tasks) - b.first }

func (b *backlog) push(t Task) {
	if len(b.tasks) == cap(b.tasks) && b.first > b.len() { // make room at the front, not so often that it costs more than a task
		n := copy(b.tasks, b.tasks[b.first:])
		clear(b.tasks[n:])
		b.tasks, b.first = b.tasks[:n], 0
	}
	b.tasks = append(b.tasks, t)
}

func (b *backlog) pop() Task {
	t := b.tasks[b.first]
	b.tasks[b.first] = nil
	if b.first++; b.first == len(b.tasks) {
		b.tasks, b.first = b.tasks[:0], 0
	}
	return t
}

// NewLane starts workers goroutines for a queue of at most queue tasks. rest, unless it is nil, is called by a worker,
// on its own goroutine, when it runs out of tasks and after every 32 of them.
func NewLane(workers, queue int, rest func()) *Lane {
	l := &Lane{rest: rest, owners: make(map[uint32]*backlog), limit: queue}
	l.wake.L = &l.mu
	for range workers {
		l.workers.Go(l.work)
	}
	return l
}

// Submit queues t. It returns false when the queue, or the owner's share of it, is full.
func (l *Lane) Submit(owner uint32, t Task) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.closed || l.queued >= l.limit {
		return false
	}
	b := l.owners[owner]
	if b == nil {
		b = &backlog{owner: owner}
		l.owners[owner] = b
	}
	if b.len() >= max(1, l.limit/2) {
		return false
	}
	if b.len() == 0 {
		l.turn = append(l.turn, b)
	}
	b.push(t)
	l.queued++
	l.wake.Signal()
	return true
}

// Queued returns the number of tasks that wait.
func (l *Lane) Queued() int {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.queued
}

// Close lets the workers finish what is queued and waits for them. Submit then returns false.
func (l *Lane) Close() {
	l.mu.Lock()
	l.closed = true
	l.wake.Broadcast()
	l.mu.Unlock()
	l.workers.Wait()
}

func (l *Lane) work() {
	done := 0
	for {
		l.mu.Lock()
		for l.queued == 0 && !l.closed {
			if done > 0 && l.rest != nil {
				done = 0
				l.mu.Unlock()
				l.rest()
				l.mu.Lock()
				continue
			}
			l.wake.Wait()
		}
		if l.queued == 0 {
			l.mu.Unlock()
			return
		}
		t := l.next()
		l.mu.Unlock()

		t.Run()
		if done++; done == restAfter && l.rest != nil {
			done = 0
			l.rest()
		}
	}
}

// next takes the task whose turn it is. l.mu is held and there is one.
func (l *Lane) next() Task {
	b := l.turn[0]
	l.turn = append(l.turn[:0], l.turn[1:]...)
	t := b.pop()
	l.queued--
	if b.len() > 0 {
		l.turn = append(l.turn, b)
	} else if len(l.owners) > maxOwners {
		delete(l.owners, b.owner)
	}
	return t
}
