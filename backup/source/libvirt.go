package source

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"path/filepath"
	"slices"
	"strings"
	"sync/atomic"
	"time"

	golibvirt "github.com/digitalocean/go-libvirt"

	"github.com/varve-io/varve/backup/libvirt"
	"github.com/varve-io/varve/backup/nbddisk"
	"github.com/varve-io/varve/nbdserver/nbdclient"
)

// libvirtMachine is a running domain, backed up by libvirt's job in pull mode. Its checkpoint of
// the same moment is what the next increment begins with; a checkpoint goes only once all points
// of the next are recorded. Whatever ends this process, libvirt keeps the job: the next run ends
// it.
type libvirtMachine struct {
	uri     *libvirt.URI
	text    string
	opt     Options
	conn    *libvirt.Conn
	domain  golibvirt.Domain
	def     *libvirt.Domain
	xml     string // the definition that a start uses
	lock    *machineLock
	scratch *scratch
	folder  *libvirt.Folder // the scratch directory over TLS; nil where it cannot be watched
	reserve int64           // bytes that stay free in it
	socket  string          // of the job's NBD server, on libvirt's machine
	disks   []*libvirtDisk
	target  string // the new checkpoint
	begun   bool
	stopped bool // its guest does not run
	checked bool
	done    bool
	started *pausedMark // of the backup that started the domain; nil for none
	parts   []Part
	notes   []string

	moment time.Time
	frozen time.Duration

	failed atomic.Pointer[error]
	end    context.CancelFunc
	ended  chan struct{}
}

// libvirtDisk is one disk of a session.
type libvirtDisk struct {
	libvirt.Disk

	base string // as recorded
	old  string // the checkpoint that the job begins with; empty for none
	why  string // it is empty although there is a base
	disk *nbddisk.Disk
}

func openLibvirt(ctx context.Context, text string, opt Options) (_ Session, err error) {
	uri, err := libvirt.ParseURI(text)
	if err != nil {
		return nil, fmt.Errorf("%w: %w", ErrURI, err)
	}
	if opt.Bitmap != "" || opt.ChangeID != "" || opt.Format != "" || opt.Raw {
		return nil, fmt.Errorf("%w: %s: --bitmap, --change-id, --format and --raw are for images and exports; a domain's disks are tracked by themselves", ErrURI, text)
	}
	if uri.Domain == "" {
		return nil, fmt.Errorf("%w: %s: name the domain after the last '/'", ErrURI, text)
	}
	m := &libvirtMachine{uri: uri, text: text, opt: opt}
	defer func() {
		if err != nil {
			err = errors.Join(err, m.Close())
		}
	}()
	running, err := m.connect(ctx)
	if err != nil {
		return nil, err
	}
	if err := m.choose(); err != nil {
		return nil, err
	}
	if m.lock, err = lockMachine(keyOf(m.def.UUID)); err != nil && !opt.Inspect {
		return nil, fmt.Errorf("%s: %w", text, err)
	}
	if !opt.Inspect {
		if err := m.removeOldMark(); err != nil {
			return nil, err
		}
	}
	switch why := m.unreadable(); {
	case !running && why == "":
		return m.openStopped(ctx)
	case opt.Inspect:
		return m, m.chooseBases()
	case !running:
		err = m.startPaused(why)
	default:
		err = m.adoptPaused()
	}
	if err != nil {
		return nil, err
	}
	if err := m.sweep(ctx); err != nil {
		return nil, fmt.Errorf("remove what an earlier backup left in libvirt: %w", err)
	}
	if err := m.chooseBases(); err != nil {
		return nil, err
	}
	m.readParts(ctx)
	return m, m.begin(ctx)
}

// connect finds the domain, and reports whether it runs.
func (m *libvirtMachine) connect(ctx context.Context) (running bool, err error) {
	watched := ""
	if m.uri.Transport == "ssh" { // the socket has to be known before the domain is
		m.socket = filepath.Join(DefaultScratch, "varve-"+keyOf(m.uri.Domain)+".sock")
		watched = cmp.Or(m.opt.Scratch, DefaultScratch)
	}
	if m.conn, err = libvirt.Dial(ctx, m.uri, m.socket, watched); err != nil {
		return false, err
	}
	if m.domain, err = m.conn.Domain(m.uri); err != nil {
		return false, err
	}
	state, err := m.conn.State(m.domain)
	if err != nil {
		return false, err
	}
	switch state {
	case golibvirt.DomainShutoff, golibvirt.DomainCrashed:
	default:
		running = true
	}
	m.stopped = !running
	if err := m.readDefinition(); err != nil {
		return false, err
	}
	return running, m.readInactive()
}

// readDefinition reads the live definition, which says where the disks are now.
func (m *libvirtMachine) readDefinition() error {
	live, err := m.conn.XML(m.domain, 0)
	if err != nil {
		return err
	}
	m.def, err = libvirt.ParseDomain(live)
	return err
}

// readInactive reads the definition that the next start uses, which is what a restore defines.
func (m *libvirtMachine) readInactive() (err error) {
	m.xml, err = m.conn.XML(m.domain, golibvirt.DomainXMLInactive|golibvirt.DomainXMLSecure)
	return err
}

// choose finds the disks.
func (m *libvirtMachine) choose() error {
	names := make([]string, len(m.def.Disks))
	for i, d := range m.def.Disks {
		names[i] = d.Target
	}
	if err := m.opt.checkWanted(names); err != nil {
		return err
	}
	for _, d := range m.def.Disks {
		if m.opt.wanted(d.Target) {
			m.disks = append(m.disks, &libvirtDisk{Disk: d, base: m.opt.base(d.Target)})
		}
	}
	return nil
}

// checkpoints are the names of those of this repository and volume.
func (m *libvirtMachine) checkpoints(prefix string) ([]golibvirt.DomainCheckpoint, error) {
	list, err := m.conn.Checkpoints(m.domain)
	if libvirt.Is(err, golibvirt.ErrOperationUnsupported) {
		return nil, nil
	}
	return slices.DeleteFunc(list, func(c golibvirt.DomainCheckpoint) bool { return !strings.HasPrefix(c.Name, prefix) }), err
}

// chooseBases finds the checkpoint that each disk's increment begins with. One that libvirt does
// not know, as after the domain was defined again, is defined again if its bitmap is there.
func (m *libvirtMachine) chooseBases() error {
	list, err := m.checkpoints(m.opt.bitmapPrefix())
	if err != nil {
		return err
	}
	known := map[string]error{}
	for _, c := range list {
		known[c.Name] = nil
	}
	for _, d := range m.disks {
		switch {
		case d.base == "":
			continue
		case !d.Tracked():
			d.why = "libvirt tracks the changes of qcow2 disks only, and this is " + d.Format
			continue
		case !strings.HasPrefix(d.base, m.opt.bitmapPrefix()):
			d.why = fmt.Sprintf("the parent's change ID %s is no checkpoint of this repository and volume", d.base)
			continue
		}
		why, ok := known[d.base]
		if !ok && !m.opt.Inspect {
			why = m.redefine(d.base)
			known[d.base] = why
		} else if !ok {
			why = errors.New("libvirt does not have it")
		}
		if why != nil {
			d.why = fmt.Sprintf("the checkpoint %s cannot be used: %v", d.base, why)
		} else {
			d.old = d.base
		}
	}
	return nil
}

// redefine tells libvirt of a checkpoint whose bitmaps it has.
func (m *libvirtMachine) redefine(name string) error {
	var tracked, others []string
	for _, d := range m.def.Disks {
		if slices.ContainsFunc(m.disks, func(o *libvirtDisk) bool { return o.Target == d.Target && o.base == name && o.Tracked() }) {
			tracked = append(tracked, d.Target)
		} else {
			others = append(others, d.Target)
		}
	}
	xml, err := libvirt.CheckpointXML(name, tracked, others, time.Now().Unix(), m.xml)
	if err != nil {
		return err
	}
	return m.conn.CheckpointCreate(m.domain, xml, golibvirt.DomainCheckpointCreateRedefine|golibvirt.DomainCheckpointCreateRedefineValidate)
}

// Name implements Machine.
func (m *libvirtMachine) Name() string { return m.def.Name }

// Moment implements Machine.
func (m *libvirtMachine) Moment() (at time.Time, frozen time.Duration) { return m.moment, m.frozen }

// Parts implements Machine.
func (m *libvirtMachine) Parts() []Part { return m.parts }

// Disks are those of the domain.
func (m *libvirtMachine) Disks() (list []Disk) {
	var sizes map[string]int64
	for i, d := range m.disks {
		one := Disk{Name: d.Target, Kind: d.Format + " disk of a " + m.state() + " libvirt domain"}
		if m.opt.Inspect {
			if sizes == nil {
				sizes = m.changedSizes()
			}
			one.Bytes, one.Estimate = m.inspect(d, sizes)
		} else {
			target := ""
			if d.Tracked() {
				target = m.target
			}
			one.Bytes, one.Changes = momentOf(d.disk, &m.failed,
				&bitmapOf{d.old, d.why, &nbddisk.Bitmap{Disk: d.disk, Name: libvirt.BitmapOf(d.Target), Base: d.old, Target: target, Kind: bitmapSource}},
				&nbddisk.Allocated{Disk: d.disk, Target: target, Kind: "allocation"})
		}
		if i == 0 {
			one.Notes = m.notes
		}
		list = append(list, one)
	}
	return list
}

// changedSizes are how much of each disk changed since the checkpoints that are its base.
func (m *libvirtMachine) changedSizes() map[string]int64 {
	out := map[string]int64{}
	for _, d := range m.disks {
		if d.old == "" {
			continue
		}
		c, err := m.conn.Checkpoint(m.domain, d.old)
		if err != nil {
			continue
		}
		text, err := m.conn.CheckpointXML(c, golibvirt.DomainCheckpointXMLSize|golibvirt.DomainCheckpointXMLNoDomain)
		if err != nil {
			continue
		}
		if sizes, err := libvirt.CheckpointSizes(text); err == nil {
			out[d.Target] = sizes[d.Target]
		}
	}
	return out
}

func (m *libvirtMachine) inspect(d *libvirtDisk, changed map[string]int64) (Bytes, *Estimate) {
	allocated, capacity, err := m.conn.BlockInfo(m.domain, d.Target)
	if err != nil {
		m.opt.log().Warn("the size of the disk is not known", "disk", d.Target, "error", err)
	}
	if n, ok := changed[d.Target]; ok {
		return ofSize(capacity), &Estimate{By: bitmapSource, Bytes: n}
	}
	return ofSize(capacity), &Estimate{By: "allocation", Bytes: int64(min(allocated, capacity)), Why: d.why}
}

// Check fails if libvirt's job is not ours any more: its exports are gone then, or another's.
func (m *libvirtMachine) Check(ctx context.Context) error {
	if err := m.failed.Load(); err != nil {
		return *err
	}
	if err := m.checkJob(ctx); err != nil {
		return err
	}
	m.checked = true
	return nil
}

func (m *libvirtMachine) checkJob(context.Context) error {
	job, err := m.job()
	switch {
	case err != nil:
		return fmt.Errorf("%w: %w; no point was made", ErrMoment, err)
	case job == nil:
		return fmt.Errorf("%w: libvirt has ended the backup job of %s; no point was made", ErrMoment, m.def.Name)
	case !m.isOurs(job, m.opt.bitmapPrefix()) || len(job.Disks) > 0 && job.Disks[0].Scratch != "" && !m.hasScratch(job):
		return fmt.Errorf("%w: libvirt runs another backup job of %s; no point was made", ErrMoment, m.def.Name)
	}
	return nil
}

// job is the backup job that runs; nil for none.
func (m *libvirtMachine) job() (*libvirt.Backup, error) {
	text, err := m.conn.BackupXML(m.domain)
	if libvirt.Is(err, golibvirt.ErrNoDomainBackup) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	return libvirt.ParseBackup(text)
}

// isOurs reports whether a job was begun by a repository and volume whose names begin with prefix.
func (*libvirtMachine) isOurs(job *libvirt.Backup, prefix string) bool {
	return slices.ContainsFunc(job.Disks, func(d libvirt.BackupDisk) bool {
		return strings.HasPrefix(filepath.Base(d.Scratch), prefix)
	})
}

// hasScratch reports whether a job is that of this run.
func (m *libvirtMachine) hasScratch(job *libvirt.Backup) bool {
	return slices.ContainsFunc(job.Disks, func(d libvirt.BackupDisk) bool {
		return strings.HasPrefix(filepath.Base(d.Scratch), m.target)
	})
}

// Commit ends the job and deletes the checkpoints of earlier backups. What cannot be deleted now
// the next backup deletes.
func (m *libvirtMachine) Commit(ctx context.Context) error {
	m.done = true
	if err := m.release(); err != nil {
		return err
	}
	m.opt.step("released")
	if err := m.deleteCheckpoints(m.opt.bitmapPrefix(), func(name string) bool { return name != m.target }); err != nil {
		m.opt.log().WarnContext(ctx, "a checkpoint of an earlier backup stays in libvirt; the next backup deletes it", "domain", m.def.Name, "error", err)
	}
	m.opt.step("committed")
	return nil
}

// Close leaves only a checkpoint to which a point may refer.
func (m *libvirtMachine) Close() error {
	if m.conn == nil {
		return nil
	}
	err := m.release()
	if err == nil && m.begun && !m.done && !m.checked {
		err = m.deleteCheckpoints(m.target, func(string) bool { return true })
	}
	if err != nil {
		err = fmt.Errorf("remove what the backup made in libvirt (the next one does): %w", err)
	}
	err = errors.Join(err, m.stopPaused())
	if m.lock != nil {
		err = errors.Join(err, m.lock.Close())
		m.lock = nil
	}
	err = errors.Join(err, m.conn.Close())
	m.conn = nil
	return err
}

// server is where the job's exports are.
func (m *libvirtMachine) server() *nbdclient.URI {
	switch m.uri.Transport {
	case "ssh":
		return &nbdclient.URI{Network: "unix", Address: m.conn.NBD()}
	case "tls":
		return &nbdclient.URI{TLS: true, Network: "tcp", Address: fmt.Sprintf("%s:%d", m.uri.Host, m.uri.NBDPort), ServerName: m.uri.Host}
	}
	return &nbdclient.URI{Network: "unix", Address: m.socket}
}
