package image

import (
	"context"
	"sync"
)

// maxQueued bounds the waiting tasks; read-ahead is a hint, so more are dropped.
const maxQueued = 4096

// pool runs tasks in the background with a bounded number of workers, which start when needed
// and end when idle. Urgent tasks serve a reader that waits and run first; the others run
// only while fewer readers than workers read for themselves, so that read-ahead never slows
// another reader down.
type pool struct {
	limit  int
	ctx    context.Context // of the tasks, which
	cancel context.CancelFunc
	wg     sync.WaitGroup

	mu         sync.Mutex
	wake       *sync.Cond // foreground fell, urgent work came, or closed
	urgent     []task
	later      []task
	running    int
	foreground int // readers that are reading from the repository now
	closed     bool
}

type task func(ctx context.Context)

func newPool(limit int) *pool {
	p := &pool{limit: limit}
	p.wake = sync.NewCond(&p.mu)
	p.ctx, p.cancel = context.WithCancel(context.Background())
	return p
}

// submit queues a task, unless the queue is full or the pool closed.
func (p *pool) submit(urgent bool, t task) {
	p.mu.Lock()
	defer p.mu.Unlock()
	queue := &p.later
	if urgent {
		queue = &p.urgent
	}
	if p.closed || len(*queue) >= maxQueued {
		return
	}
	*queue = append(*queue, t)
	if p.running < p.limit {
		p.running++
		p.wg.Go(p.work)
		return
	}
	if urgent {
		p.wake.Signal()
	}
}

// enter and leave bracket a reader's own read.
func (p *pool) enter() {
	p.mu.Lock()
	p.foreground++
	p.mu.Unlock()
}

func (p *pool) leave() {
	p.mu.Lock()
	p.foreground--
	p.mu.Unlock()
	p.wake.Signal()
}

func (p *pool) work() {
	for {
		t := p.next()
		if t == nil {
			return
		}
		run(p.ctx, t)
	}
}

// run runs a task. A panic is dropped with the hint: the reader that needs the block will get
// the panic itself, and the process and its other readers continue.
func run(ctx context.Context, t task) {
	defer func() { _ = recover() }()
	t(ctx)
}

func (p *pool) next() task {
	p.mu.Lock()
	defer p.mu.Unlock()
	for {
		switch {
		case p.closed || len(p.urgent)+len(p.later) == 0:
			p.running--
			return nil
		case len(p.urgent) > 0:
			return pop(&p.urgent)
		case p.foreground < p.limit:
			return pop(&p.later)
		}
		p.wake.Wait()
	}
}

func pop(queue *[]task) task {
	t := (*queue)[0]
	(*queue)[0] = nil
	*queue = (*queue)[1:]
	if len(*queue) == 0 {
		*queue = nil // let the array go
	}
	return t
}

func (p *pool) close() {
	p.mu.Lock()
	p.closed = true
	p.urgent, p.later = nil, nil
	p.mu.Unlock()
	p.cancel()
	p.wake.Broadcast()
	p.wg.Wait()
}
