package points

import (
	"errors"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"time"
)

// ErrNoSuchPoint and ErrAmbiguous are the errors of resolving a name.
var (
	ErrNoSuchPoint = errors.New("no such recovery point")
	ErrAmbiguous   = errors.New("ambiguous name")
)

// Names resolves names of points and volumes. A name without a cluster belongs to this
// cluster. If this cluster has no such name, a command that reads uses the only other cluster
// that has it; a command that changes or deletes points requires the cluster in the name.
type Names struct {
	Catalog *Catalog
	Cluster string // of this machine
	// Now is the reference of @yesterday and @2h; zero is the time of the call.
	Now time.Time
	// Fallback, if set, is called if a name without a cluster is resolved to another cluster.
	Fallback func(name string, v Volume)
}

// minIDPrefix is the shortest prefix of an ID that names a point.
const minIDPrefix = 4

// Read resolves the name of a point for a command that only reads: namespace/name@latest,
// @latest~N, @today, @yesterday and @2h (the newest point at least that old; m, h, d, w),
// @TIME (UTC; a prefix of the point's time, such as 2026-11-20 or 2026-11-20T10:00), @ID or
// an ID prefix alone. A cluster may precede all of them: prod:shop/db@latest, prod:1f0c. The
// error wraps ErrNoSuchPoint or ErrAmbiguous and lists what exists.
func (n Names) Read(name string) (*Point, error) { return n.resolve(name, true) }

// Change is Read for a command that changes or deletes the point: it uses another cluster
// only if the name includes it.
func (n Names) Change(name string) (*Point, error) { return n.resolve(name, false) }

func (n Names) resolve(name string, reading bool) (*Point, error) {
	q := question{Names: n, name: name, reading: reading, cluster: n.Cluster, rest: name}
	if cluster, rest, ok := cutCluster(name); ok {
		q.cluster, q.rest, q.spelled = cluster, rest, true
	}
	vol, sel, at := cutLastAt(q.rest)
	if !at {
		if strings.Contains(q.rest, "/") {
			return nil, fmt.Errorf("%w: %q: name a point: %s@latest, %s@TIME or an ID", ErrNoSuchPoint, name, name, name)
		}
		return q.byID()
	}
	points, err := q.ofVolume(vol)
	if err != nil {
		return nil, err
	}
	now := n.Now
	if now.IsZero() {
		now = time.Now()
	}
	return among(points, name, vol, sel, now)
}

// question is one name to resolve.
type question struct {
	Names
	name    string // as given
	cluster string // to search
	rest    string // the name without a cluster
	spelled bool   // the name includes the cluster
	reading bool
}

// byID finds a point by the beginning of its ID.
func (q question) byID() (*Point, error) {
	if len(q.rest) < minIDPrefix {
		return nil, fmt.Errorf("%w: %q: an ID needs at least %d digits", ErrNoSuchPoint, q.name, minIDPrefix)
	}
	var own, others []*Point
	for _, p := range q.Catalog.points {
		switch {
		case !strings.HasPrefix(p.ID, strings.ToLower(q.rest)):
		case p.Volume.Cluster == q.cluster:
			own = append(own, p)
		default:
			others = append(others, p)
		}
	}
	found := own
	if len(own) == 0 && q.reading && !q.spelled {
		found = others
	}
	switch {
	case len(found) == 1:
		q.tell(found[0].Volume)
		return found[0], nil
	case len(found) > 1:
		return nil, ambiguous(q.name, found)
	case len(others) > 0 && !q.spelled:
		return nil, fmt.Errorf("%w: %q is not of this cluster (%s), but of %s: give its cluster: %s:%s",
			ErrNoSuchPoint, q.name, q.cluster, others[0].FullName(), others[0].Volume.Cluster, q.rest)
	}
	return nil, fmt.Errorf("%w: %q is neither a name (namespace/name@TIME, @latest) nor the beginning of an ID", ErrNoSuchPoint, q.name)
}

// ofVolume returns the points of the volume named before the '@'.
func (q question) ofVolume(vol string) ([]*Point, error) {
	var own, others []Volume
	for _, v := range q.Catalog.Volumes() {
		switch {
		case q.isForeign(v, vol) && !q.spelled: // includes its cluster in its own way
			return q.Catalog.Of(v), nil
		case v.String() != vol:
		case v.Cluster == q.cluster:
			own = append(own, v)
		default:
			others = append(others, v)
		}
	}
	if len(own) > 0 {
		return q.Catalog.Of(own[0]), nil
	}
	if q.reading && !q.spelled {
		switch len(others) {
		case 1:
			q.tell(others[0])
			return q.Catalog.Of(others[0]), nil
		case 0:
		default:
			return nil, inSeveral(vol, q.cluster, others)
		}
	}
	return nil, noPoints(q.cluster, vol, others, strings.TrimPrefix(q.rest, vol))
}

// isForeign reports whether text is a foreign volume in the form of a Kopia source; Velero's
// paths have no leading slash.
func (q question) isForeign(v Volume, text string) bool {
	path, ok := strings.CutPrefix(text, v.Namespace+"@"+v.Cluster+":")
	if !ok || strings.TrimPrefix(path, "/") != v.Name {
		return false
	}
	return slices.ContainsFunc(q.Catalog.points, func(p *Point) bool { return p.Foreign != "" && p.Volume == v })
}

func (q question) tell(v Volume) {
	if v.Cluster != q.cluster && q.Fallback != nil {
		q.Fallback(q.name, v)
	}
}

// Volume resolves "namespace/name" or "cluster:namespace/name" for a command that reads. A
// volume that does not exist is taken as this cluster's; the error is ErrAmbiguous, or that
// of ParseVolume.
func (n Names) Volume(text string) (Volume, error) {
	v, err := ParseVolume(text, n.Cluster)
	if err != nil {
		return v, err
	}
	if _, _, spelled := cutCluster(text); spelled {
		return v, nil
	}
	others := n.elsewhere(v)
	switch {
	case len(n.Catalog.Of(v)) > 0 || len(others) == 0:
		return v, nil
	case len(others) > 1:
		return v, inSeveral(v.String(), n.Cluster, others)
	}
	if n.Fallback != nil {
		n.Fallback(text, others[0])
	}
	return others[0], nil
}

// NoPoints returns the error about a volume without points, which lists the clusters that
// have its name.
func (n Names) NoPoints(v Volume) error { return noPoints(v.Cluster, v.String(), n.elsewhere(v), "") }

// Elsewhere returns the full names of the volumes of other clusters with the same name.
func (n Names) Elsewhere(v Volume) []string { return fullNames(n.elsewhere(v), "") }

func (n Names) elsewhere(v Volume) (out []Volume) {
	for _, o := range n.Catalog.Volumes() {
		if o.Cluster != v.Cluster && o.String() == v.String() {
			out = append(out, o)
		}
	}
	return out
}

func fullNames(volumes []Volume, suffix string) []string {
	out := make([]string, len(volumes))
	for i, v := range volumes {
		out[i] = v.FullName() + suffix
	}
	return out
}

func noPoints(cluster, vol string, others []Volume, suffix string) error {
	err := fmt.Errorf("%w: volume %s:%s has none", ErrNoSuchPoint, cluster, vol)
	if len(others) == 0 {
		return fmt.Errorf("%w; \"varve list\" shows what there is", err)
	}
	return fmt.Errorf("%w; other clusters have that name: give the cluster: %s", err, strings.Join(fullNames(others, suffix), ", "))
}

func inSeveral(vol, cluster string, others []Volume) error {
	return fmt.Errorf("%w: this cluster (%s) has no volume %q, several others have: name one: %s",
		ErrAmbiguous, cluster, vol, strings.Join(fullNames(others, ""), ", "))
}

// cutCluster splits "cluster:" off a name. The colons in times and in the names of foreign
// points follow a '/' or an '@'.
func cutCluster(name string) (cluster, rest string, ok bool) {
	cluster, rest, ok = strings.Cut(name, ":")
	if !ok || strings.ContainsAny(cluster, "/@") {
		return "", name, false
	}
	return cluster, rest, true
}

// cutLastAt splits at the last '@': a foreign point's volume contains one.
func cutLastAt(s string) (before, after string, ok bool) {
	i := strings.LastIndexByte(s, '@')
	if i < 0 {
		return s, "", false
	}
	return s[:i], s[i+1:], true
}

// among finds the point of one volume that sel, the text after the '@', names. points are
// oldest first.
func among(points []*Point, name, vol, sel string, now time.Time) (*Point, error) {
	if p, ok, err := byAge(name, sel, points); ok || err != nil {
		return p, err
	}
	if before, ok := asOf(sel, now); ok {
		return newestBefore(points, name, vol, before)
	}
	var found []*Point
	for _, p := range points {
		if matchesTime(p, sel) {
			found = append(found, p)
		}
	}
	if len(found) == 0 && len(sel) >= minIDPrefix {
		for _, p := range points {
			if strings.HasPrefix(p.ID, strings.ToLower(sel)) {
				found = append(found, p)
			}
		}
	}
	switch len(found) {
	case 1:
		return found[0], nil
	case 0:
		oldest, newest := points[0], points[len(points)-1]
		return nil, fmt.Errorf("%w: %q: %s has %d, from %s to %s; say @latest, @latest~1, @yesterday, @2h, a time in UTC such as @2026-11-20T10:00 or its beginning, or an ID",
			ErrNoSuchPoint, name, vol, len(points), timeText(oldest.Time), timeText(newest.Time))
	default:
		return nil, ambiguous(name, found)
	}
}

// byAge resolves latest and latest~N. ok is false if sel has another form.
func byAge(name, sel string, points []*Point) (p *Point, ok bool, err error) {
	rest, ok := strings.CutPrefix(sel, "latest")
	if !ok {
		return nil, false, nil
	}
	back := 0
	if rest != "" {
		digits, tilde := strings.CutPrefix(rest, "~")
		n, err := strconv.Atoi(digits)
		if !tilde || err != nil || n < 0 {
			return nil, false, fmt.Errorf("%w: %q: want @latest or @latest~N", ErrNoSuchPoint, name)
		}
		back = n
	}
	if back >= len(points) {
		return nil, false, fmt.Errorf("%w: %q: there are %d, the oldest is @latest~%d", ErrNoSuchPoint, name, len(points), len(points)-1)
	}
	return points[len(points)-1-back], true, nil
}

// asOf parses a relative time: today, yesterday, or an age such as 90m, 2h, 3d or 1w. It
// means the newest point made before it.
func asOf(sel string, now time.Time) (before time.Time, ok bool) {
	midnight := now.UTC().Truncate(24 * time.Hour)
	switch sel {
	case "today":
		return midnight.Add(24 * time.Hour), true
	case "yesterday":
		return midnight, true
	}
	if len(sel) < 2 {
		return time.Time{}, false
	}
	units := map[byte]time.Duration{'m': time.Minute, 'h': time.Hour, 'd': 24 * time.Hour, 'w': 7 * 24 * time.Hour}
	unit, ok := units[sel[len(sel)-1]]
	if !ok {
		return time.Time{}, false
	}
	n, err := strconv.ParseUint(sel[:len(sel)-1], 10, 16)
	if err != nil {
		return time.Time{}, false
	}
	return now.Add(-time.Duration(n) * unit), true
}

func newestBefore(points []*Point, name, vol string, before time.Time) (*Point, error) {
	for _, p := range slices.Backward(points) {
		if p.Time.Before(before) {
			return p, nil
		}
	}
	return nil, fmt.Errorf("%w: %q: %s has none from before %s, the oldest is of %s",
		ErrNoSuchPoint, name, vol, timeText(before.Truncate(time.Second)), timeText(points[0].Time))
}

func matchesTime(p *Point, sel string) bool {
	if len(sel) < len("2026") || sel[0] < '0' || sel[0] > '9' {
		return false
	}
	full := p.Time.UTC().Format("2006-01-02T15:04:05.000Z")
	exact := timeText(p.Time)
	sel = strings.Replace(sel, " ", "T", 1)
	if sel == exact {
		return true
	}
	// A prefix ends at a field, so that 2026-11-2 is not the 20th.
	switch len(sel) {
	case len(time.DateOnly), len("2006-01-02T15"), len("2006-01-02T15:04"), len("2006-01-02T15:04:05"):
		return strings.HasPrefix(full, sel)
	}
	return false
}

// ambiguous lists what a name may mean, one per line.
func ambiguous(name string, found []*Point) error {
	text := fmt.Sprintf("%q may be:", name)
	for i, p := range found {
		if i == 10 {
			text += fmt.Sprintf("\n  and %d more", len(found)-i)
			break
		}
		text += fmt.Sprintf("\n  %s  (ID %s)", p.FullName(), p.ShortID())
	}
	return fmt.Errorf("%w: %s\ngive one of these names, or more digits of its ID", ErrAmbiguous, text)
}
