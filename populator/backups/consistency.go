package backups

import (
	"slices"
	"strings"
	"time"

	"k8s.io/apimachinery/pkg/api/meta"

	"github.com/varve-io/varve/api/v1alpha1"
	"github.com/varve-io/varve/backup/blocktree"
	"github.com/varve-io/varve/populator/store"
)

// writing are the recipes whose applications keep writing while they are held: a snapshot is like
// after a crash, and those of several volumes are not of one moment.
var writing = []string{string(v1alpha1.HookPostgreSQL), string(v1alpha1.HookRedis)}

// consistency returns how the moment of the snapshot was made, for the point's record.
func (r *run) consistency() *blocktree.Consistency {
	s := &r.vb.Status
	c := &blocktree.Consistency{Level: blocktree.CrashConsistent, Method: "snapshot", Time: s.SnapshotTime.Time}
	still := true
	if s.Hold != nil {
		c.Method = "hold"
		for _, m := range s.Hold.Members {
			h := blocktree.Hold{
				Name: m.Hook, Target: strings.Trim(m.Pod+"/"+m.Container, "/"), Duration: time.Duration(m.HeldMilliseconds) * time.Millisecond,
				Proven: m.Proven, Detail: m.Message, Notes: m.Notes,
			}
			if m.FrozenAt != nil {
				h.Start = m.FrozenAt.Time
			}
			c.Holds = append(c.Holds, h)
			still = still && m.Proven && !slices.Contains(writing, m.Recipe)
		}
	}
	switch ok := r.isConsistent(); {
	case ok == nil: // no hooks
		still = false
	case !*ok:
		still = false
		if cond := meta.FindStatusCondition(s.Conditions, v1alpha1.ConditionConsistent); cond != nil {
			c.Detail = cond.Message
		}
	case still:
		c.Level = blocktree.ApplicationConsistent
	default:
		c.Detail = "the application went on writing while it was held: it recovers from the snapshot as from a crash"
	}
	c.OneMoment = still && r.vb.Spec.Group != nil
	if r.inGroupSnapshot() { // with any hold
		c.Method, c.OneMoment = "group-snapshot", true
	}
	return c
}

// group marks the point as one of its group; nil for a run alone.
func (r *run) group(st *store.Store) *blocktree.Group {
	g := r.vb.Spec.Group
	if g == nil {
		return nil
	}
	out := &blocktree.Group{ID: g.ID, Name: r.vb.Namespace + "/" + g.Name, Time: g.Time.UTC()}
	for _, m := range g.Members {
		out.Members = append(out.Members, st.Volume(r.vb.Namespace, m.ClaimName).String())
	}
	for _, name := range r.dumps() {
		out.Members = append(out.Members, st.Volume(r.vb.Namespace, name).String())
	}
	slices.Sort(out.Members)
	return out
}
