package source

import (
	"errors"
	"fmt"

	golibvirt "github.com/digitalocean/go-libvirt"
)

// A stopped domain with images that no qemu-nbd of ours can read is started for the backup and stays paused: its guest
// runs no instruction, and QEMU opens the images, tracks changes and serves them as those of a running
// domain. At the end it is stopped. Whoever resumes it meanwhile has a domain that goes on running.
//
// A mark in the domain's metadata says that a backup started it. It is written to the domain's definition before the
// start, so that no kill leaves a paused domain without it, and taken from there afterwards; the running domain
// keeps its own until it stops.

// The mark.
const (
	markKey       = "varve"
	markNamespace = "https://varve.io/libvirt/paused/1"
	mark          = "<paused-for-backup/>"
)

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
		return fmt.Errorf("%s: the domain is stopped, and %s, so it is started paused for the backup: %w", m.text, why, err)
	}
	saved, err := m.conn.HasSavedState(m.domain)
	if err != nil {
		return fail(err)
	}
	if saved {
		return fail(fmt.Errorf("its memory was saved (virsh managedsave), and a start would use that up; start it, or back it up where its images are"))
	}
	if err := m.conn.SetMark(m.domain, golibvirt.DomainAffectConfig, markKey, markNamespace, mark); err != nil {
		return fail(err)
	}
	m.opt.step("marked")
	if err := m.conn.StartPaused(m.domain); err != nil {
		return fail(errors.Join(err, m.unmark()))
	}
	m.started = true
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

// unmark takes the mark from the definition that the next start uses, where a killed backup may have left it.
func (m *libvirtMachine) unmark() error {
	if err := m.conn.SetMark(m.domain, golibvirt.DomainAffectConfig, markKey, markNamespace, ""); err != nil {
		return err
	}
	return m.readInactive()
}

// adoptPaused finds a domain that another backup started and did not stop.
func (m *libvirtMachine) adoptPaused() error {
	ours, err := m.isPausedStart()
	if err != nil || !ours {
		return err
	}
	m.started, m.stopped, m.opt.Freeze = true, true, false
	return m.unmark()
}

// isPausedStart reports whether a backup started the domain, and its guest never ran.
func (m *libvirtMachine) isPausedStart() (bool, error) {
	state, err := m.conn.State(m.domain)
	if err != nil || state != golibvirt.DomainPaused {
		return false, err
	}
	marked, err := m.conn.HasMark(m.domain, golibvirt.DomainAffectLive, markNamespace)
	if err != nil || !marked {
		return false, err
	}
	return m.conn.NeverRan(m.domain)
}

// stopPaused stops the domain if a backup started it, unless it was resumed meanwhile or has a job: then it
// is another's to stop.
func (m *libvirtMachine) stopPaused() error {
	if !m.started {
		return nil
	}
	m.started = false
	stop := func() error {
		ours, err := m.isPausedStart()
		if err != nil {
			return err
		}
		if ours {
			job, err := m.job()
			if err != nil {
				return err
			}
			ours = job == nil
		}
		if !ours {
			m.opt.log().Warn("the domain was stopped before the backup, and is not stopped again: it was resumed or stopped meanwhile, or has another job", "domain", m.def.Name)
			return nil
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
