package source

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/varve-io/varve/backup/qemu"
)

// stoppedMachine is a domain that does not run: its images, each by a qemu-nbd of our own on its machine, which
// keeps it from starting until the session ends. Their bitmaps have the names of checkpoints, and
// libvirt hears of those when the domain is next backed up while it runs. Images that cannot be read so are
// read by a QEMU that libvirt starts (libvirt_paused.go).
type stoppedMachine struct {
	*libvirtMachine

	images []Session
	at     time.Time
}

func (m *libvirtMachine) openStopped(ctx context.Context) (_ Session, err error) {
	s := &stoppedMachine{libvirtMachine: m, at: time.Now()}
	defer func() {
		if err != nil {
			err = errors.Join(err, s.closeImages())
		}
	}()
	remote := m.uri.Remote()
	target := m.opt.newBitmapName()
	for _, d := range m.disks {
		opt := m.opt
		opt.Format, opt.name = d.Format, target
		var session Session
		// Its definition, not a guest, says which files it is made of.
		opt.Track, opt.FollowChain = d.Format == qemu.QCOW2, true
		switch {
		case remote:
			session, err = openImageOf(ctx, sshHost{m.uri}, d.Path, d.Format, opt)
		case d.Format == qemu.Raw:
			session, err = openLocal(d.Path, opt)
		default:
			session, err = openImage(ctx, d.Path, d.Format, opt)
		}
		if err != nil {
			return nil, fmt.Errorf("%s: %w", d.Target, err)
		}
		s.images = append(s.images, session)
	}
	if !m.opt.Inspect {
		m.readParts(ctx)
	}
	return s, nil
}

// Moment implements Machine: all of the time that the session lasts.
func (s *stoppedMachine) Moment() (at time.Time, frozen time.Duration) { return s.at, 0 }

// Disks are those of the domain.
func (s *stoppedMachine) Disks() (list []Disk) {
	for i, image := range s.images {
		d := image.Disks()[0]
		d.Name, d.Kind = s.disks[i].Target, d.Kind+" of a stopped libvirt domain"
		list = append(list, d)
	}
	list[0].Notes = append(list[0].Notes, s.notes...)
	return list
}

// Check implements Session.
func (s *stoppedMachine) Check(ctx context.Context) error {
	return s.each(func(image Session) error { return image.Check(ctx) })
}

// Commit implements Session.
func (s *stoppedMachine) Commit(ctx context.Context) error {
	return s.each(func(image Session) error { return image.Commit(ctx) })
}

func (s *stoppedMachine) each(do func(Session) error) (err error) {
	for _, image := range s.images {
		err = errors.Join(err, do(image))
	}
	return err
}

func (s *stoppedMachine) closeImages() error {
	err := s.each(Session.Close)
	s.images = nil
	return err
}

// Close implements Session.
func (s *stoppedMachine) Close() error { return errors.Join(s.closeImages(), s.libvirtMachine.Close()) }
