package nbdserver

import (
	"context"
	"fmt"
	"strings"
)

// AccessRule lets clients open exports. Both patterns may hold '*', which
// stands for any characters, '/' included.
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
// name answers exactly as an unknown one.
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
	// The rule is asked before the export is opened: a refusal takes no longer
	// than an unknown name and leaves no trace in the store.
	if _, err := r.Resolve(ctx, name, client); err != nil {
		return nil, err
	}
	o, err := r.Resolver.Open(ctx, name, client)
	if err != nil {
		return nil, err
	}
	if !r.allows(client, o.Name) { // an alias moved in between
		o.close()
		return nil, ErrUnknownExport
	}
	return o, nil
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
