package nbdserver

import (
	"encoding/binary"
	"strings"

	"github.com/varve-io/varve/nbdserver/proto"
)

// maxContexts is the most metadata contexts one client may select, and the
// most queries it may send with one option.
const (
	maxContexts = 64
	maxQueries  = 1024
)

// metaContext answers LIST_META_CONTEXT and SET_META_CONTEXT.
func (n *negotiator) metaContext(name string, rest []byte) error {
	if n.style == styleSimple {
		return n.refuse(proto.RepErrInvalid, "metadata contexts need structured replies or extended headers first")
	}
	queries, ok := parseQueries(rest)
	if !ok {
		return n.refuse(proto.RepErrInvalid, "queries do not fit the option")
	}
	if len(queries) > maxQueries {
		return n.refuse(proto.RepErrTooBig, "too many queries")
	}
	o, err := n.use(name)
	if err != nil {
		return n.refuseOpen(name, err)
	}
	var names []string
	if n.opt == proto.OptListMetaContext {
		names, err = n.listContexts(o, queries)
	} else {
		names = n.selectContexts(o, queries)
	}
	if err != nil {
		n.log.Warn("cannot list metadata contexts", "export", name, "err", err)
		return n.refuse(proto.RepErrPlatform, "cannot list metadata contexts: "+err.Error())
	}
	if n.opt == proto.OptSetMetaContext && len(names) > maxContexts {
		return n.refuse(proto.RepErrTooBig, "too many metadata contexts; at most 64 can be used at once")
	}
	for i, ctx := range names {
		id := uint32(0)
		if n.opt == proto.OptSetMetaContext {
			id = uint32(i) + 1
			n.contexts = append(n.contexts, selectedContext{id: id, name: contextName(n.ctx, o.Export, ctx)})
		}
		data := binary.BigEndian.AppendUint32(nil, id)
		if err := n.reply(proto.RepMetaContext, append(data, ctx...)); err != nil {
			return err
		}
	}
	if n.opt == proto.OptSetMetaContext {
		n.contextsFor = name
	}
	return n.reply(proto.RepAck, nil)
}

// parseQueries reads a count and that many strings, which must fill data.
func parseQueries(data []byte) ([]string, bool) {
	if len(data) < 4 {
		return nil, false
	}
	count := binary.BigEndian.Uint32(data)
	data = data[4:]
	if uint64(count)*4 > uint64(len(data)) {
		return nil, false
	}
	queries := make([]string, 0, min(count, maxQueries+1))
	for range count {
		q, rest, ok := cutLengthString(data)
		if !ok {
			return nil, false
		}
		if len(queries) <= maxQueries {
			queries = append(queries, q)
		}
		data = rest
	}
	return queries, len(data) == 0
}

// listContexts returns the contexts that match the queries; without queries all. A query that
// ends in ':' is a wildcard for its prefix.
func (n *negotiator) listContexts(o *Opened, queries []string) ([]string, error) {
	all := []string{proto.ContextAllocation}
	if s, ok := o.Export.(Statuser); ok {
		more, err := s.Contexts(n.ctx)
		if err != nil {
			return nil, err
		}
		for _, m := range more {
			if len(m) <= proto.MaxString {
				all = append(all, m)
			}
		}
	}
	if len(queries) == 0 {
		return all, nil
	}
	var match []string
	listed := map[string]bool{}
	for _, ctx := range all {
		for _, q := range queries {
			if ctx == q || strings.HasSuffix(q, ":") && strings.HasPrefix(ctx, q) {
				match = append(match, ctx)
				listed[ctx] = true
				break
			}
		}
	}
	// Names that the export accepts without listing them, such as aliases.
	if s, ok := o.Export.(Statuser); ok {
		for _, q := range queries {
			if !listed[q] && isContextName(q) && s.HasContext(n.ctx, q) {
				match = append(match, q)
				listed[q] = true
			}
		}
	}
	return match, nil
}

// selectContexts returns the contexts that the queries name exactly, each once; other queries
// are ignored.
func (n *negotiator) selectContexts(o *Opened, queries []string) []string {
	s, _ := o.Export.(Statuser)
	var names []string
	seen := map[string]bool{}
	for _, q := range queries {
		if seen[q] || !isContextName(q) || len(names) > maxContexts {
			continue
		}
		if q == proto.ContextAllocation || s != nil && s.HasContext(n.ctx, q) {
			seen[q] = true
			names = append(names, q)
		}
	}
	return names
}

// isContextName reports whether a query could name one context: a namespace, a
// colon and a leaf that is no wildcard.
func isContextName(q string) bool {
	ns, leaf, ok := strings.Cut(q, ":")
	return ok && ns != "" && leaf != "" && !strings.HasSuffix(leaf, ":")
}
