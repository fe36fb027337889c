package store

import (
	"context"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"runtime"
	"sync"
	"time"

	"github.com/varve-io/varve/api/v1alpha1"
	"github.com/varve-io/varve/backup/repository"
)

// Bounds of Connections.
const (
	// maxIdle is how many unused connections are kept: each holds the list of its
	// repository's points, and its indexes on disk.
	maxIdle = 64
	// failureHolds is how long all callers get the same failure to open a store: claims
	// that ask one after the other would each derive a key.
	failureHolds = 5 * time.Second
	// tenantsPatience bounds the opening of a tenant's Repository, whose server may
	// forever send just enough not to be silent.
	tenantsPatience = 10 * time.Minute
)

// ErrOpening means that the store answers, slowly, and is still being opened.
var ErrOpening = errors.New("the repository is still being opened")

// Connections are the open repositories of a process: one per store, shared by all its users.
// A connection is opened again when the store's settings or credentials change. Opening
// continues when its callers have gone: the next ones find it further on. Safe for concurrent
// use.
type Connections struct {
	base   context.Context
	cancel context.CancelFunc
	places *places
	turn   repository.Turn
	open   func(context.Context, Settings, OpenOptions) (*Open, error) // Settings.Open but for tests

	mu      sync.Mutex
	byKey   map[Key]*connection
	closed  bool
	closing sync.WaitGroup // added to before closed
}

// connection is one that is open or being opened. Connections guards the fields without a
// comment.
type connection struct {
	key      Key
	sum      [sha256.Size]byte // of settings and credentials
	begun    time.Time
	cancel   context.CancelCauseFunc // of the context that the storage keeps
	ready    chan struct{}           // closed when open, err and ended are final
	open     *Open
	err      error
	ended    time.Time
	refs     int
	used     time.Time
	detached bool // closed once refs is 0
	fresh    refresher
}

// NewConnections returns Connections without any open.
func NewConnections() *Connections {
	base, cancel := context.WithCancel(context.Background())
	turns := make(chan struct{}, 1)
	return &Connections{
		base: base, cancel: cancel, places: newPlaces(), byKey: map[Key]*connection{},
		open: func(ctx context.Context, s Settings, opt OpenOptions) (*Open, error) { return s.Open(ctx, opt) },
		// One at a time: two would use twice repository.KeyMemory. The next must not
		// start beside the garbage of the last.
		turn: func(ctx context.Context) (func(), error) {
			select {
			case turns <- struct{}{}:
				return func() { runtime.GC(); <-turns }, nil
			case <-ctx.Done():
				return nil, context.Cause(ctx)
			}
		},
	}
}

// Close closes all connections, and waits for those that have no user.
func (p *Connections) Close() {
	p.cancel()
	p.mu.Lock()
	for _, c := range p.byKey {
		p.detach(c)
	}
	p.closed = true
	p.mu.Unlock()
	p.closing.Wait()
}

// Forget closes the connection of a store that was deleted, or may no longer be used.
func (p *Connections) Forget(key Key) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if c := p.byKey[key]; c != nil {
		p.detach(c)
	}
}

// Get returns the store's repository as it is now; its Close gives it back. With check
// the storage is read to confirm the same repository and password.
func (p *Connections) Get(ctx context.Context, key Key, settings Settings, opt OpenOptions, check bool) (*Open, error) {
	for {
		c, others, err := p.take(key, settings, opt)
		if err != nil {
			return nil, err
		}
		if err := c.wait(ctx); err != nil {
			p.give(c, false)
			return nil, err
		}
		if !others { // no other process can have written since
			return p.lend(c), nil
		}
		err = p.now(ctx, c, check)
		if err == nil {
			return p.lend(c), nil
		}
		if ctx.Err() != nil {
			p.give(c, false)
			return nil, err
		}
		p.give(c, true)
		if errors.Is(err, repository.ErrUnreachable) {
			return nil, c.open.Redact(err)
		}
		// Opening gives a better error, or helps.
	}
}

// take finds the store's connection, or begins to open one, and counts the use. others
// says that it existed before.
func (p *Connections) take(key Key, settings Settings, opt OpenOptions) (_ *connection, others bool, _ error) {
	sum, err := fingerprint(settings, opt)
	if err != nil {
		return nil, false, err
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	c := p.byKey[key]
	if c != nil && (c.sum != sum || c.failed(opt.Create) || c.open != nil && c.open.Fatal() != nil) {
		p.detach(c)
		c = nil
	}
	if c != nil {
		c.refs++
		return c, true, nil
	}
	if err := p.base.Err(); err != nil {
		return nil, false, err
	}
	c = &connection{key: key, sum: sum, begun: time.Now(), ready: make(chan struct{}), refs: 2} // the opener's is one
	p.byKey[key] = c
	opt.Turn = p.turn
	p.closing.Add(1)
	go p.opened(c, settings, opt)
	return c, false, nil
}

// failed reports whether opening failed and must be retried. Called with the lock held.
func (c *connection) failed(create bool) bool {
	select {
	case <-c.ready:
		return c.err != nil && (create || time.Since(c.ended) >= failureHolds)
	default:
		return false
	}
}

// opened opens a connection.
func (p *Connections) opened(c *connection, settings Settings, opt OpenOptions) {
	defer p.closing.Done()
	open, err := p.within(c, func(ctx context.Context) (*Open, error) { return p.open(ctx, settings, opt) })
	p.mu.Lock()
	c.open, c.err, c.ended = open, err, time.Now()
	close(c.ready)
	p.mu.Unlock()
	p.give(c, false)
}

// within calls open once there is a place, with a context of the connection's lifetime.
func (p *Connections) within(c *connection, open func(context.Context) (*Open, error)) (*Open, error) {
	ctx, cancel := context.WithCancelCause(p.base)
	c.cancel = cancel
	leave, err := p.places.enter(ctx, c.key.Namespace)
	if err != nil {
		return nil, err
	}
	defer leave()
	if c.key.Kind == v1alpha1.StoreKindRepository {
		limit := time.AfterFunc(tenantsPatience, func() {
			cancel(fmt.Errorf("%w: opening %s took longer than %v", repository.ErrUnreachable, c.key, tenantsPatience))
		})
		defer limit.Stop()
	}
	o, err := open(ctx)
	if err != nil {
		if cause := context.Cause(ctx); cause != nil {
			err = cause
		}
		cancel(context.Canceled)
		return nil, err
	}
	return o, nil
}

// wait waits until the connection is open or cannot be opened.
func (c *connection) wait(ctx context.Context) error {
	select {
	case <-c.ready:
		return c.err
	case <-ctx.Done():
		return fmt.Errorf("%w: %s, since %s: %w", ErrOpening, c.key, c.begun.UTC().Format("15:04:05Z"), ctx.Err())
	}
}

// now refreshes a connection that the caller uses with what others have written.
func (p *Connections) now(ctx context.Context, c *connection, check bool) error {
	if check {
		if err := c.open.Unchanged(ctx); err != nil {
			return err
		}
	}
	hold := func() {
		p.mu.Lock()
		defer p.mu.Unlock()
		c.refs++
	}
	return c.fresh.do(ctx, hold, func() { p.give(c, false) }, func(ctx context.Context) error {
		return c.open.Answering(ctx, c.open.Repository.Refresh, func() {})
	})
}

// lend makes a user's handle of the connection.
func (p *Connections) lend(c *connection) *Open {
	var once sync.Once
	return &Open{Repository: c.open.Repository, Redact: c.open.Redact, give: func() { once.Do(func() { p.give(c, false) }) }}
}

// give ends one use.
func (p *Connections) give(c *connection, broken bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if broken {
		p.detach(c)
	}
	c.refs--
	c.used = time.Now()
	if c.refs == 0 && c.detached {
		p.end(c)
	}
	p.evict()
}

// detach prevents further use of the connection, and closes it after its last use. Called
// with the lock held.
func (p *Connections) detach(c *connection) {
	if c.detached {
		return
	}
	c.detached = true
	if p.byKey[c.key] == c {
		delete(p.byKey, c.key)
	}
	if c.refs == 0 {
		p.end(c)
	}
}

// end closes an unused connection. Called with the lock held.
func (p *Connections) end(c *connection) {
	if c.open == nil {
		return
	}
	awaited := !p.closed
	if awaited {
		p.closing.Add(1)
	}
	go func() {
		if awaited {
			defer p.closing.Done()
		}
		if err := c.open.Close(context.WithoutCancel(p.base)); err != nil {
			c.open.warn(err)
		}
		c.cancel(context.Canceled)
	}()
}

// evict ends the least recently used connections if there are too many. Called with the
// lock held.
func (p *Connections) evict() {
	for {
		var oldest *connection
		idle := 0
		for _, c := range p.byKey {
			if c.refs > 0 {
				continue
			}
			if idle++; oldest == nil || c.used.Before(oldest.used) {
				oldest = c
			}
		}
		if idle <= maxIdle {
			return
		}
		p.detach(oldest)
	}
}

// fingerprint distinguishes connections that are opened differently. The expected repository is
// checked for each.
func fingerprint(s Settings, opt OpenOptions) (sum [sha256.Size]byte, err error) {
	s.UniqueID = ""
	text, err := json.Marshal(struct {
		Settings    Settings
		Credentials map[string][]byte
		VolumeDir   string
	}{s, opt.Credentials, opt.VolumeDir})
	if err != nil {
		return sum, fmt.Errorf("settings of a store: %w", err)
	}
	return sha256.Sum256(text), nil
}
