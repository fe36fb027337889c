package source

import (
	"encoding/xml"
	"errors"
	"fmt"
	"os"
	"time"

	golibvirt "github.com/digitalocean/go-libvirt"

	"github.com/varve-io/varve/backup/libvirt"
)

// A stopped domain with images that no qemu-nbd of ours can read is started for the backup and stays paused: its guest
// runs no instruction, and QEMU opens the images, tracks changes and serves them as those of a running
// domain. At the end it is stopped, unless it was resumed.
//
// A mark in the domain's metadata says which backup started it. It is written to the domain's definition before the
// start, so that no kill leaves a paused domain without it, and removed from there afterwards. The running domain
// keeps its own until it stops, or until a backup finds that it has been resumed.

// The mark's place.
const (
	markKey       = "varve"
	markNamespace = "https://varve.io/libvirt/paused/1"
)

// foreignStart is how long a backup of another host may take. After that it was killed, and any may stop its domain.
const foreignStart = 24 * time.Hour

// pausedMark is the mark. No two starts have the same.
type pausedMark struct {
	XMLName xml.Name  `xml:"paused-for-backup"`
	By      string    `xml:"by,attr"` // host and user, whose backups of a domain exclude each other (lockMachine)
	At      time.Time `xml:"at,attr"`
}

func newPausedMark() *pausedMark {
	host, err := os.Hostname()
	if err != nil {
		host = "unknown"
	}
	return &pausedMark{By: fmt.Sprintf("%s/%d", host, os.Getuid()), At: time.Now().UTC()}
}

// ofAnother reports whether a backup of another host, or of another user, may be about to stop the domain.
func (p *pausedMark) ofAnother() bool {
	now := newPausedMark()
	return p.By != now.By && now.At.Sub(p.At) < foreignStart
}

// mark reads the mark of the running domain, or of its definition; nil for none.
func (m *libvirtMachine) mark(of golibvirt.DomainModificationImpact) (*pausedMark, error) {
	text, err := m.conn.Mark(m.domain, of, markNamespace)
	if err != nil || text == "" {
		return nil, err
	}
	var mark pausedMark
	if err := xml.Unmarshal([]byte(text), &mark); err != nil {
		return &pausedMark{}, nil //nolint:nilerr // an old one, of nobody
	}
	return &mark, nil
}

// removeOldMark removes the mark that a killed backup has left in the definition.
func (m *libvirtMachine) removeOldMark() error {
	mark, err := m.mark(golibvirt.DomainAffectConfig)
	if err != nil || mark == nil || mark.ofAnother() {
		return err
	}
	return m.unmark()
}

// unreadable is why a stopped domain's images cannot be read past libvirt; empty if they can.
func (m *libvirtMachine) unreadable() string {
	if m.uri.Transport == "tls" {
		return "over TLS there is no other way to its images"
	}
	for _, d := range m.disks {
		switch {
		case d.Path == "":
			return fmt.Sprintf("its disk %s is of type %s", d.Target, d.Type)
		case m.uri.Remote() && d.Type != "file":
			return fmt.Sprintf("its disk %s is of type %s, on another machine", d.Target, d.Type)
		}
	}
	return ""
}

// state is the domain's as its disks are described.
func (m *libvirtMachine) state() string {
	if m.stopped {
		return "stopped"
	}
	return "running"
}

// startPaused starts a stopped domain. why is the reason.
func (m *libvirtMachine) startPaused(why string) error {
	fail := func(err error) error {
		return fmt.Errorf("%s: the domain is stopped, and %s, so libvirt is to start it paused: %w", m.text, why, err)
	}
	saved, err := m.conn.HasSavedState(m.domain)
	if err != nil {
		return fail(err)
	}
	if saved {
		return fail(fmt.Errorf("its memory was saved (virsh managedsave), and a start would use that up; start it first, or use another connection"))
	}
	mark := newPausedMark()
	text, err := xml.Marshal(mark)
	if err != nil {
		return fail(err)
	}
	if err := m.conn.SetMark(m.domain, golibvirt.DomainAffectConfig, markKey, markNamespace, string(text)); err != nil {
		return fail(err)
	}
	m.opt.step("marked")
	if err := m.conn.StartPaused(m.domain); libvirt.Refused(err) {
		return fail(errors.Join(err, m.unmark()))
	} else if err != nil { // it may start yet, which Close says
		m.started = mark
		return fail(err)
	}
	m.started = mark
	m.opt.step("started")
	if err := m.unmark(); err != nil {
		return fail(err)
	}
	m.notes = append(m.notes, fmt.Sprintf("the domain is stopped, and %s: libvirt had it paused for the backup", why))
	m.opt.Freeze = false // no guest runs
	if err := m.readDefinition(); err != nil {
		return err
	}
	m.disks = nil
	return m.choose()
}

// unmark removes the mark from the definition.
func (m *libvirtMachine) unmark() error {
	if err := m.conn.SetMark(m.domain, golibvirt.DomainAffectConfig, markKey, markNamespace, ""); err != nil {
		return err
	}
	return m.readInactive()
}

// adoptPaused finds a domain that another backup started and did not stop.
func (m *libvirtMachine) adoptPaused() error {
	mark, err := m.mark(golibvirt.DomainAffectLive)
	if err != nil || mark == nil {
		return err
	}
	switch waits, err := m.neverRan(); {
	case err != nil:
		return err
	case !waits: // it is its owner's
		return m.conn.SetMark(m.domain, golibvirt.DomainAffectLive, markKey, markNamespace, "")
	case !mark.ofAnother():
		m.started, m.stopped, m.opt.Freeze = mark, true, false
	}
	return nil
}

// neverRan reports whether the domain is paused, and its guest has not run.
func (m *libvirtMachine) neverRan() (bool, error) {
	state, err := m.conn.State(m.domain)
	if err != nil || state != golibvirt.DomainPaused {
		return false, err
	}
	return m.conn.NeverRan(m.domain)
}

// stopPaused stops the domain if this backup or a killed one started it, unless it was resumed since, or has a
// job of another backup, which then stops it.
func (m *libvirtMachine) stopPaused() error {
	mine := m.started
	if mine == nil {
		return nil
	}
	m.started = nil
	stop := func() error {
		state, err := m.conn.State(m.domain)
		if err != nil || state == golibvirt.DomainShutoff {
			return err
		}
		mark, err := m.mark(golibvirt.DomainAffectLive)
		if err != nil {
			return err
		}
		waits, err := m.neverRan()
		if err != nil {
			return err
		}
		switch job, err := m.job(); {
		case err != nil:
			return err
		case mark == nil || mark.By != mine.By || !mark.At.Equal(mine.At) || job != nil:
			m.opt.log().Warn("the domain was stopped before the backup, and now belongs to another: it is not stopped again", "domain", m.def.Name)
			return nil
		case !waits:
			m.opt.log().Warn("the domain was stopped before the backup, and was resumed since: it is not stopped again", "domain", m.def.Name)
			return m.conn.SetMark(m.domain, golibvirt.DomainAffectLive, markKey, markNamespace, "")
		}
		return m.conn.Stop(m.domain)
	}
	if err := stop(); err != nil {
		return fmt.Errorf("stop %s, which was started paused for the backup (the next backup does; or 'virsh destroy --graceful %[1]s'): %w",
			m.def.Name, err)
	}
	m.opt.step("stopped")
	return nil
}
