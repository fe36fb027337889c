package nbdserver

import (
	"context"
	"fmt"
	"slices"
	"strings"
	"sync"

	"github.com/varve-io/varve/nbdserver/proto"
)

// AccessRule lets clients open exports. In both patterns '*' matches any characters,
// including '/'.
type AccessRule struct {
	// Client is matched against the names of a verified client certificate.
	// The lone pattern "*" matches every client, certificate or not.
	Client string
	// Export is matched against the canonical name.
	Export string
}

// ParseAccessRule reads "CLIENT=EXPORT", such as "db-team=shop/*".
func ParseAccessRule(s string) (AccessRule, error) {
	c, e, ok := strings.Cut(s, "=")
	if !ok || c == "" || e == "" {
		return AccessRule{}, fmt.Errorf("access rule %q is not CLIENT=EXPORT, as in %q", s, "db-team=shop/*")
	}
	return AccessRule{Client: c, Export: e}, nil
}

// Restrict shows each client only the exports a rule lets it open; any other
// name answers exactly as an unknown one. That holds for dirty bitmaps, too,
// which are named by the export that they compare with.
func Restrict(c Resolver, rules []AccessRule) Resolver {
	return &restricted{Resolver: c, rules: rules}
}

type restricted struct {
	Resolver
	rules []AccessRule
}

func (r *restricted) allows(client Client, export string) bool {
	for _, rule := range r.rules {
		if !glob(rule.Export, export) {
			continue
		}
		if rule.Client == "*" {
			return true
		}
		for _, n := range client.Names {
			if glob(rule.Client, n) {
				return true
			}
		}
	}
	return false
}

func (r *restricted) List(ctx context.Context, client Client, yield func(Listing) bool) error {
	return r.Resolver.List(ctx, client, func(l Listing) bool {
		return !r.allows(client, l.Name) || yield(l)
	})
}

func (r *restricted) Resolve(ctx context.Context, name string, client Client) (string, error) {
	target, err := r.Resolver.Resolve(ctx, name, client)
	if err != nil {
		return "", err
	}
	if !r.allows(client, target) {
		return "", ErrUnknownExport
	}
	return target, nil
}

func (r *restricted) Open(ctx context.Context, name string, client Client) (*Opened, error) {
	// The rule is checked before the export is opened: a refusal takes no longer than an
	// unknown name and leaves no trace in the store.
	if _, err := r.Resolve(ctx, name, client); err != nil {
		return nil, err
	}
	o, err := r.Resolver.Open(ctx, name, client)
	if err != nil {
		return nil, err
	}
	if !r.allows(client, o.Name) { // an alias changed in between
		o.close()
		return nil, ErrUnknownExport
	}
	return r.hideContexts(o, client), nil
}

// hideContexts removes the dirty bitmaps of hidden exports from an open one.
func (r *restricted) hideContexts(o *Opened, client Client) *Opened {
	s, ok := o.Export.(Statuser)
	if !ok {
		return o
	}
	e := &restrictedExport{Export: o.Export, all: s, rules: r, client: client}
	shown := *o
	shown.Export = e
	if w, ok := o.Export.(Writer); ok {
		shown.Export = struct {
			*restrictedExport
			Writer
		}{e, w}
	}
	if o.Enter != nil {
		shown.Enter = func(ctx context.Context, contexts []string) error {
			err := o.Enter(ctx, contexts)
			shown.Description = o.Description
			return err
		}
	}
	return &shown
}

// restrictedExport is an export with the metadata contexts that a client may see.
type restrictedExport struct {
	Export
	all    Statuser
	rules  *restricted
	client Client

	mu      sync.Mutex
	allowed map[string]bool // lasting names of contexts
}

// Contexts lists those whose exports the client may open.
func (e *restrictedExport) Contexts(ctx context.Context) ([]string, error) {
	names, err := e.all.Contexts(ctx)
	return slices.DeleteFunc(slices.Clone(names), func(name string) bool {
		base, dirty := strings.CutPrefix(name, proto.ContextDirtyBitmap)
		return dirty && !e.rules.allows(e.client, base)
	}), err
}

// canonical returns a context by the canonical name of its export, so that the answer about
// an alias is about the export that the rules allow.
func (e *restrictedExport) canonical(ctx context.Context, name string) (string, error) {
	base, dirty := strings.CutPrefix(name, proto.ContextDirtyBitmap)
	if !dirty {
		return name, nil
	}
	target, err := e.rules.Resolve(ctx, base, e.client)
	return proto.ContextDirtyBitmap + target, err
}

// HasContext hides the contexts of exports that the client may not open.
func (e *restrictedExport) HasContext(ctx context.Context, name string) bool {
	name, err := e.canonical(ctx, name)
	return err == nil && e.all.HasContext(ctx, name)
}

// ContextName is that of the export that the rules allow now.
func (e *restrictedExport) ContextName(ctx context.Context, name string) string {
	canonical, err := e.canonical(ctx, name)
	if err != nil {
		return name
	}
	lasting := contextName(ctx, e.Export, canonical)
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.allowed == nil {
		e.allowed = map[string]bool{}
	}
	e.allowed[lasting] = true
	return lasting
}

// Status reports flags of a context that was allowed when it was selected, or is.
func (e *restrictedExport) Status(ctx context.Context, name string, off, length int64, yield func(int64, uint32) bool) error {
	e.mu.Lock()
	allowed := e.allowed[name]
	e.mu.Unlock()
	if !allowed {
		var err error
		if name, err = e.canonical(ctx, name); err != nil {
			return err
		}
	}
	return e.all.Status(ctx, name, off, length, yield)
}

// Lend passes on what the export lends.
func (e *restrictedExport) Lend(ctx context.Context, dst []Piece, off int64, n int, wait bool) ([]Piece, error) {
	if l, ok := e.Export.(Lender); ok {
		return l.Lend(ctx, dst, off, n, wait)
	}
	return dst, ErrNotCached
}

// Prefetch passes on the hint.
func (e *restrictedExport) Prefetch(ctx context.Context, off, length int64) error {
	if f, ok := e.Export.(Prefetcher); ok {
		return f.Prefetch(ctx, off, length)
	}
	return nil
}

// glob matches s against a pattern in which '*' stands for any characters. It
// takes linear space and at most len(pattern)*len(s) steps.
func glob(pattern, s string) bool {
	p, i := 0, 0
	star, mark := -1, 0
	for i < len(s) {
		switch {
		case p < len(pattern) && pattern[p] == '*':
			star, mark = p, i
			p++
		case p < len(pattern) && pattern[p] == s[i]:
			p++
			i++
		case star >= 0:
			mark++
			p, i = star+1, mark
		default:
			return false
		}
	}
	for p < len(pattern) && pattern[p] == '*' {
		p++
	}
	return p == len(pattern)
}
