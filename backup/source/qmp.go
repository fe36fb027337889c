package source

import (
	"context"
	"errors"
	"fmt"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"time"

	"github.com/varve-io/varve/backup/nbddisk"
	"github.com/varve-io/varve/backup/qemu/qmp"
	"github.com/varve-io/varve/nbdserver/nbdclient"
)

// qmpURI is qemu+qmp:///path/of/monitor?agent=/path/of/agent&nbd=URI.
type qmpURI struct {
	monitor, agent string
	nbd            *nbdclient.URI // an NBD server that QEMU runs already; nil to start one
}

func parseQMP(text string) (*qmpURI, error) {
	u, err := url.Parse(text)
	if err != nil {
		return nil, fmt.Errorf("%w: %w", ErrURI, err)
	}
	out := &qmpURI{monitor: u.Path}
	if u.Host != "" || !filepath.IsAbs(u.Path) || u.User != nil || u.Fragment != "" {
		return nil, fmt.Errorf("%w: %s: want qemu+qmp:///path/of/the/monitor's/socket", ErrURI, text)
	}
	for key, values := range u.Query() {
		switch v := values[0]; {
		case len(values) > 1:
			return nil, fmt.Errorf("%w: %s: %s is given twice", ErrURI, text, key)
		case key == "agent" && filepath.IsAbs(v):
			out.agent = v
		case key == "nbd":
			if out.nbd, err = nbdclient.ParseURI(v); err != nil {
				return nil, fmt.Errorf("%w: %s: %w", ErrURI, text, err)
			}
		default:
			return nil, fmt.Errorf("%w: %s: %s=%s: want agent=/path of the guest agent's socket, or nbd=URI of an NBD server that this QEMU runs", ErrURI, text, key, v)
		}
	}
	return out, nil
}

// qmpMachine is a running QEMU, backed up over its monitor. What it makes there, in this
// order, for each of its disks:
//
//   - a scratch image above the disk, which takes what the guest overwrites;
//   - in one transaction for all disks: a new bitmap, a frozen copy of the old one on the
//     scratch node (QEMU exports no bitmap that records), and the job that fills the scratch;
//   - an export of the scratch node, on QEMU's NBD server.
//
// The old bitmap records on, and goes only once all points are recorded: a run that ends
// anywhere leaves a base for the next.
type qmpMachine struct {
	uri     *qmpURI
	opt     Options
	key     string
	name    string
	conn    *qmp.Conn
	lock    *machineLock
	scratch *scratch
	server  *nbdclient.URI
	started bool // the NBD server is ours to stop
	disks   []*qmpSession
	target  string // the name of the new bitmaps
	begun   bool   // the transaction was made
	checked bool   // a point may be recorded
	done    bool   // all are

	moment time.Time
	frozen time.Duration

	failed atomic.Pointer[error] // why what is read is of no moment any more
	end    context.CancelFunc    // of the watch
	ended  chan struct{}
}

// qmpSession is one disk of a session.
type qmpSession struct {
	qmpDisk

	opt  Options
	id   string // of node, job and export
	old  string // the bitmap that lists the changes; empty for none
	why  string // it is empty although there is a base
	base string // as recorded
	disk *nbddisk.Disk
	m    *qmpMachine
}

// qmpFrozen is the name of the old bitmap's copy on the scratch node.
const qmpFrozen = "varve-frozen"

func openQMP(ctx context.Context, text string, opt Options) (_ Session, err error) {
	uri, err := parseQMP(text)
	if err != nil {
		return nil, err
	}
	switch {
	case opt.Bitmap != "" || opt.ChangeID != "" || opt.Format != "" || opt.Raw || opt.FollowChain:
		return nil, fmt.Errorf("%w: %s: --bitmap, --change-id, --format, --raw and --follow-chain are for images and exports; a machine's disks are tracked by themselves", ErrURI, text)
	case opt.Freeze && uri.agent == "":
		return nil, fmt.Errorf("%w: %s: --freeze needs the guest agent's socket: add ?agent=/path", ErrURI, text)
	}
	m := &qmpMachine{uri: uri, opt: opt}
	defer func() {
		if err != nil {
			err = errors.Join(err, m.Close())
		}
	}()
	if err := m.connect(ctx); err != nil {
		return nil, err
	}
	if opt.Inspect {
		return m, m.choose(ctx)
	}
	if m.lock, err = lockMachine(m.key); err != nil {
		return nil, fmt.Errorf("%s: %w", text, err)
	}
	if err := m.sweep(ctx); err != nil {
		return nil, fmt.Errorf("remove what an earlier backup left in QEMU: %w", err)
	}
	if err := m.choose(ctx); err != nil {
		return nil, err
	}
	if err := m.sweepBitmaps(ctx); err != nil {
		return nil, err
	}
	return m, m.begin(ctx)
}

// connect opens the monitor, and finds which machine it is.
func (m *qmpMachine) connect(ctx context.Context) (err error) {
	if m.conn, err = qmp.Dial(ctx, m.uri.monitor); err != nil {
		return err
	}
	var uuid struct {
		UUID string `json:"UUID"`
	}
	err = m.conn.Do(ctx, "query-uuid", nil, &uuid)
	if err != nil && !qmp.NoCommand(err) {
		return err
	}
	key := uuid.UUID
	if strings.Trim(key, "0-") == "" { // it has none
		if key, err = filepath.EvalSymlinks(m.uri.monitor); err != nil {
			return err
		}
	}
	m.key = keyOf(key)
	var name struct {
		Name string `json:"name"`
	}
	if err := m.conn.Do(ctx, "query-name", nil, &name); err != nil && !qmp.NoCommand(err) {
		return err
	}
	m.name = name.Name
	return nil
}

// choose finds the disks, and the bitmap that each has for its base.
func (m *qmpMachine) choose(ctx context.Context) error {
	all, err := readDisks(ctx, m.conn)
	if err != nil {
		return err
	}
	names := make([]string, len(all))
	for i, d := range all {
		names[i] = d.name
	}
	if err := m.opt.checkWanted(names); err != nil {
		return err
	}
	m.disks = nil
	for _, d := range all {
		if !m.opt.wanted(d.name) {
			continue
		}
		s := &qmpSession{qmpDisk: d, opt: m.opt, id: fmt.Sprintf("%ss%d", m.opt.bitmapPrefix(), len(m.disks)), base: m.opt.base(d.name), m: m}
		switch {
		case s.base == "":
		case !strings.HasPrefix(s.base, m.opt.bitmapPrefix()):
			s.why = fmt.Sprintf("the parent's change ID %s is no bitmap of this repository and volume", s.base)
		default:
			if s.why = d.node.usable(s.base); s.why == "" {
				s.old = s.base
			}
		}
		m.disks = append(m.disks, s)
	}
	return nil
}

// Name implements Machine.
func (m *qmpMachine) Name() string { return m.name }

// Moment implements Machine.
func (m *qmpMachine) Moment() (at time.Time, frozen time.Duration) { return m.moment, m.frozen }

// Parts are none: QMP does not say how QEMU was started.
func (m *qmpMachine) Parts() []Part { return nil }

// Disks are those of the machine.
func (m *qmpMachine) Disks() (list []Disk) {
	for _, s := range m.disks {
		d := Disk{Name: s.name, Kind: s.node.Driver + " disk of a running QEMU"}
		if m.opt.Inspect {
			d.Bytes, d.Estimate = ofSize(s.node.Image.Size), s.estimate()
		} else {
			d.Bytes, d.Changes = momentOf(s.disk, &m.failed,
				&bitmapOf{s.old, s.why, &nbddisk.Bitmap{Disk: s.disk, Name: qmpFrozen, Base: s.old, Target: m.target, Kind: bitmapSource}},
				&nbddisk.Allocated{Disk: s.disk, Target: m.target, Kind: "allocation"})
		}
		if m.opt.Inspect && !s.node.persistent() {
			d.Notes = append(d.Notes, fmt.Sprintf("%s: changes are tracked until QEMU ends; after that the whole disk is compared once", s.name))
		}
		list = append(list, d)
	}
	return list
}

// estimate says what the next backup would read.
func (s *qmpSession) estimate() *Estimate {
	if s.old != "" {
		return &Estimate{By: bitmapSource, Bytes: s.node.bitmap(s.old).Count}
	}
	return &Estimate{By: "allocation", Bytes: min(s.node.Image.Size, s.node.Image.Actual), Why: s.why}
}

// Check fails if a job of ours ended: from then on its export shows what the guest writes.
func (m *qmpMachine) Check(ctx context.Context) error {
	if err := m.failed.Load(); err != nil {
		return *err
	}
	if err := m.checkJobs(ctx); err != nil {
		return err
	}
	m.checked = true
	return nil
}

func (m *qmpMachine) checkJobs(ctx context.Context) error {
	jobs, err := readJobs(ctx, m.conn)
	if err != nil {
		return fmt.Errorf("%w: %w; no point was made", ErrMoment, err)
	}
	for _, s := range m.disks {
		found := false
		for _, j := range jobs {
			if j.ID == s.id && j.Error == "" && (j.Status == "running" || j.Status == "ready" || j.Status == "paused") {
				found = true
			} else if j.ID == s.id && j.Error != "" {
				return fmt.Errorf("%w: the job of %s failed: %s; no point was made", ErrMoment, s.name, j.Error)
			}
		}
		if !found {
			return fmt.Errorf("%w: QEMU has ended the job that keeps what is overwritten on %s; no point was made", ErrMoment, s.name)
		}
	}
	return nil
}

// Commit removes the bitmaps of earlier backups. What cannot be removed now, the next backup
// removes.
func (m *qmpMachine) Commit(ctx context.Context) error {
	m.done = true
	if err := m.release(ctx); err != nil {
		return err
	}
	m.opt.step("released")
	if err := m.removeBitmaps(ctx, func(_ *qmpSession, name string) bool { return name != m.target }); err != nil {
		m.opt.log().WarnContext(ctx, "a bitmap of an earlier backup stays in QEMU; the next backup removes it", "monitor", m.uri.monitor, "error", err)
	}
	m.opt.step("committed")
	return nil
}

// closing bounds what Close waits for.
const closing = 2 * time.Minute

// Close leaves only bitmaps to which a point may refer.
func (m *qmpMachine) Close() error {
	if m.conn == nil {
		return nil
	}
	ctx, cancel := context.WithTimeout(context.Background(), closing)
	defer cancel()
	var err error
	if m.lock != nil {
		err = m.release(ctx)
		if err == nil && m.begun && !m.done && !m.checked {
			err = m.removeBitmaps(ctx, func(_ *qmpSession, name string) bool { return name == m.target })
		}
		if errors.Is(err, qmp.ErrLost) {
			err = m.again(ctx)
		}
		if err != nil {
			err = fmt.Errorf("remove what the backup made in QEMU (the next one does): %w", err)
		}
		err = errors.Join(err, m.lock.Close())
	}
	err = errors.Join(err, m.conn.Close())
	m.conn = nil
	return err
}

// again connects once more to clean up. A QEMU that has ended has nothing of ours.
func (m *qmpMachine) again(ctx context.Context) error {
	conn, err := qmp.Dial(ctx, m.uri.monitor)
	switch {
	case nobody(err): // the backup itself has failed already
		return os.RemoveAll(serverDir(m.key))
	case err != nil: // it may run: without the socket no later backup would find its server
		return err
	}
	_ = m.conn.Close()
	m.conn = conn
	return m.release(ctx)
}
