package source

import (
	"bytes"
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os/exec"
	"regexp"
	"strings"

	"github.com/varve-io/varve/backup/cbt"
	"github.com/varve-io/varve/backup/nbddisk"
	"github.com/varve-io/varve/backup/qemu"
	"github.com/varve-io/varve/internal/bytesize"
	"github.com/varve-io/varve/internal/plain"
)

// rbd is a snapshot of an image in a Ceph cluster: its bytes come through a qemu-nbd with
// QEMU's rbd driver, its changes from "rbd diff".
type rbd struct {
	image string // pool/image
	snap  string
	spec  string // pool/image@snapshot
	state string // the change ID
	why   error  // there is none
	srv   *qemu.Server
	disk  *nbddisk.Disk
}

// rbdName is pool/image@snapshot or pool/namespace/image@snapshot. The characters are those
// that need no escaping in QEMU's rbd:... names, which may carry options.
var rbdName = regexp.MustCompile(`^rbd://((?:[A-Za-z0-9][A-Za-z0-9_.-]*/){1,2}[A-Za-z0-9][A-Za-z0-9_.-]*)@([A-Za-z0-9][A-Za-z0-9_.-]*)$`)

func openRBD(ctx context.Context, uri string, opt Options) (_ Session, err error) {
	m := rbdName.FindStringSubmatch(uri)
	switch {
	case m == nil:
		return nil, fmt.Errorf("%w: %q; it is rbd://POOL/IMAGE@SNAPSHOT, of letters, digits, '.', '-' and '_'", ErrURI, uri)
	case opt.Track:
		return nil, fmt.Errorf("%s: %w: Ceph keeps the snapshots; keep that of the last backup until the next one", uri, ErrNoTracking)
	case opt.Bitmap != "" || opt.ChangeID != "" || opt.BaseChangeID != "":
		return nil, fmt.Errorf("%w: %s: its change ID is that of the snapshot; leave out --bitmap, --change-id and --base-change-id", ErrURI, uri)
	}
	r := &rbd{image: m[1], spec: m[1] + "@" + m[2], snap: m[2]}
	defer func() {
		if err != nil {
			err = errors.Join(err, r.Close())
		}
	}()
	before, why := r.look(ctx)
	if r.srv, err = qemu.StartNBD(qemu.Serve{Name: "rbd:" + r.spec, Format: qemu.Raw, Connections: nbddisk.DefaultConnections}); err != nil {
		return nil, err
	}
	if r.disk, err = nbddisk.Open(ctx, r.srv.URI(), nbddisk.Options{Describe: uri}); err != nil {
		if why := r.srv.Err(); why != nil {
			err = fmt.Errorf("%s: %w; QEMU's driver for RBD is in the package qemu-block-extra (Debian) or qemu-block-rbd (Fedora)", uri, why)
		}
		return nil, err
	}
	if err := r.identify(ctx, before, why); err != nil {
		return nil, err
	}
	return r, r.srv.Hide()
}

// identify names the state that is read: NAME@ID@IMAGE. A name alone is given to other snapshots
// later, and to those of other images. before is of the time before the snapshot was opened.
func (r *rbd) identify(ctx context.Context, before *rbdImage, why error) error {
	var now *rbdImage
	if why == nil {
		now, why = r.look(ctx)
	}
	if ctx.Err() != nil {
		return context.Cause(ctx)
	}
	switch {
	case why != nil: // the next backup builds on nothing then
		r.why = why
	case before.state(r.snap) == "" || before.state(r.snap) != now.state(r.snap):
		r.why = fmt.Errorf("the snapshot %s was made or removed meanwhile", r.spec)
	default:
		r.state = now.state(r.snap)
	}
	return nil
}

// rbdState is what identify makes.
var rbdState = regexp.MustCompile(`^([A-Za-z0-9][A-Za-z0-9_.-]*)@([0-9]+)@([A-Za-z0-9]+)$`)

// rbdImage is what rbd says of an image and its snapshots.
type rbdImage struct {
	id    string
	snaps map[string]uint64 // their IDs by name, which the cluster gives once
}

// state is the change ID of a snapshot; empty if there is none of the name.
func (i *rbdImage) state(snap string) string {
	id, ok := i.snaps[snap]
	if !ok {
		return ""
	}
	return fmt.Sprintf("%s@%d@%s", snap, id, i.id)
}

func (r *rbd) look(ctx context.Context) (*rbdImage, error) {
	var info struct {
		ID string `json:"id"`
	}
	var snaps []struct {
		ID   *uint64 `json:"id"`
		Name string  `json:"name"`
	}
	for _, ask := range []struct {
		answer any
		args   []string
	}{{&info, []string{"info"}}, {&snaps, []string{"snap", "ls"}}} {
		text, err := output(ctx, 16<<20, "rbd", "ceph-common", append(ask.args, "--format", "json", "--", r.image)...)
		if err != nil {
			return nil, err
		}
		if err := json.Unmarshal(text, ask.answer); err != nil {
			return nil, fmt.Errorf("read what rbd printed: %w", err)
		}
	}
	image := &rbdImage{info.ID, map[string]uint64{}}
	for _, s := range snaps {
		if s.ID == nil {
			return nil, errors.New("read what rbd printed: a snapshot has no ID")
		}
		image.snaps[s.Name] = *s.ID
	}
	if info.ID == "" { // as one of the first format
		return nil, fmt.Errorf("the image %s has no ID", r.image)
	}
	return image, nil
}

// Disks is the one.
func (r *rbd) Disks() []Disk {
	return []Disk{{
		Bytes: r.disk, Kind: "RBD snapshot",
		Changes: []cbt.Source{&rbdDiff{r}, &nbddisk.Allocated{Disk: r.disk, Target: cmp.Or(r.state, r.snap), Kind: "allocation"}},
	}}
}

// Check finds nothing: a snapshot does not change.
func (r *rbd) Check(context.Context) error { return nil }

// Commit has nothing to let go of: the snapshots are the user's.
func (r *rbd) Commit(context.Context) error { return nil }

// Close ends the server.
func (r *rbd) Close() error {
	var errs []error
	if r.disk != nil {
		errs = append(errs, r.disk.Close())
	}
	if r.srv != nil {
		errs = append(errs, r.srv.Close())
	}
	r.disk, r.srv = nil, nil
	return errors.Join(errs...)
}

// rbdDiff runs "rbd diff": from the snapshot of the base or, for a full, of what is stored.
type rbdDiff struct{ r *rbd }

// rbdSource is the name of changes from rbd diff in records.
const rbdSource = "rbd-diff"

// Changes implements cbt.Source.
func (d *rbdDiff) Changes(ctx context.Context, req cbt.Request, emit func(cbt.Extent) error) (cbt.Report, error) {
	refuse := func(kind error, reason cbt.Reason, format string, args ...any) (cbt.Report, error) {
		return cbt.Report{}, &cbt.Error{Source: rbdSource, Kind: kind, Reason: reason, Detail: fmt.Sprintf(format, args...)}
	}
	if d.r.state == "" {
		return refuse(cbt.ErrUnavailable, cbt.ReasonUnknown, "%v", d.r.why)
	}
	if size := d.r.disk.Size(); size != req.Size {
		return refuse(cbt.ErrSizeMismatch, cbt.ReasonUnknown, "the snapshot has %s, not %s", bytesize.Exact(size), bytesize.Exact(req.Size))
	}
	list := &cbt.ToolExtents{Tool: cbt.RBDDiff, Target: d.r.state}
	args := []string{"diff", "--format", "json"}
	want := []string{d.r.state}
	if req.Base != nil {
		list.Base = req.Base.ChangeID
		base := rbdState.FindStringSubmatch(list.Base) // no name is an option
		if base == nil || list.Base == d.r.state {
			return refuse(cbt.ErrBaseMismatch, cbt.ReasonNoChangeID, "the parent was not made from an earlier snapshot of the image: its change ID is %q", list.Base)
		}
		args = append(args, "--from-snap", base[1])
		want = append(want, list.Base)
	}
	if err := d.have(ctx, want); err != nil {
		return cbt.Report{}, err
	}
	rep, printed, err := runTool(ctx, "rbd", "ceph-common", append(args, "--", d.r.spec), func(out io.Reader) (cbt.Report, error) {
		list.List = out
		return list.Changes(ctx, req, emit)
	})
	if printed != "" { // by rbd, of why it failed
		reason := cbt.ReasonUnknown
		if strings.Contains(printed, "No such file") || strings.Contains(printed, "not found") {
			reason = cbt.ReasonNotFound
		}
		err = &cbt.Error{Source: rbdSource, Kind: cbt.ErrUnavailable, Reason: reason, Detail: printed}
	}
	if err != nil {
		return cbt.Report{}, err
	}
	// rbd knows snapshots by their names, of which another may have one by now.
	if err := d.have(ctx, want); err != nil {
		return cbt.Report{}, err
	}
	rep.Source = rbdSource
	return rep, nil
}

// have fails unless the image has all the snapshots, as identify calls them.
func (d *rbdDiff) have(ctx context.Context, states []string) error {
	image, err := d.r.look(ctx)
	if ctx.Err() != nil {
		return context.Cause(ctx)
	}
	for i := 0; err == nil && i < len(states); i++ {
		if name, _, _ := strings.Cut(states[i], "@"); image.state(name) != states[i] {
			err = fmt.Errorf("the image has no snapshot %s any more, or one of that name that was made later: it has %q", states[i], image.state(name))
		}
	}
	if err != nil {
		return &cbt.Error{Source: rbdSource, Kind: cbt.ErrBaseMismatch, Reason: cbt.ReasonBaseMismatch, Detail: err.Error()}
	}
	return nil
}

// runTool runs a program, which is in the package from, and has its output read to the end. printed
// is what it says of its failure.
func runTool(ctx context.Context, program, from string, args []string, read func(io.Reader) (cbt.Report, error)) (rep cbt.Report, printed string, err error) {
	path, err := exec.LookPath(program)
	if err != nil {
		return rep, program + " is not installed; it is in the package " + from, nil
	}
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	cmd := exec.CommandContext(ctx, path, args...)
	// Else LVM's programs list the caller's open files before their own error.
	cmd.Env = append(qemu.Environment(), "LVM_SUPPRESS_FD_WARNINGS=1")
	stderr := &bytes.Buffer{}
	cmd.Stderr = &limited{stderr, 4 << 10}
	out, err := cmd.StdoutPipe()
	if err != nil {
		return rep, "", err
	}
	if err := cmd.Start(); err != nil {
		return rep, "", fmt.Errorf("start %s: %w", program, err)
	}
	rep, err = read(out)
	parent := context.Cause(ctx)
	if err != nil {
		_, _ = io.Copy(io.Discard, out) // so that a failure of its own is known
	}
	if ended := cmd.Wait(); ended != nil && parent == nil {
		text := plain.Line(strings.TrimSpace(stderr.String()))
		return rep, cmp.Or(text, program+": "+ended.Error()), nil
	}
	return rep, "", cmp.Or(err, parent)
}

// limited keeps the beginning of what is written to it.
type limited struct {
	to   *bytes.Buffer
	most int
}

func (l *limited) Write(p []byte) (int, error) {
	l.to.Write(p[:min(len(p), max(0, l.most-l.to.Len()))])
	return len(p), nil
}
