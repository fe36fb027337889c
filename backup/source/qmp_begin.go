package source

import (
	"context"
	"errors"
	"fmt"
	"os"
	"slices"
	"time"

	"github.com/varve-io/varve/backup/nbddisk"
	"github.com/varve-io/varve/backup/qemu/qmp"
	"github.com/varve-io/varve/nbdserver/nbdclient"
)

// args are the arguments of a command.
type args map[string]any

// action is one of a transaction.
type action struct {
	Type string `json:"type"`
	Data args   `json:"data"`
}

// begin takes the moment of the backup, and opens the disks as they were then.
func (m *qmpMachine) begin(ctx context.Context) (err error) {
	uid, gid := m.conn.Owner()
	if m.scratch, err = openScratch(m.opt.Scratch, m.key, uid, gid); err != nil {
		return err
	}
	for _, s := range m.disks {
		if err := m.addScratch(ctx, s); err != nil {
			return fmt.Errorf("%s: %w", s.name, err)
		}
		m.opt.step("scratch of " + s.name)
	}
	if err := m.startServer(ctx, uid, gid); err != nil {
		return err
	}
	m.opt.step("server")
	if err := m.takeMoment(ctx); err != nil {
		return err
	}
	for _, s := range m.disks {
		var bitmaps []args
		if s.old != "" {
			bitmaps = append(bitmaps, args{"node": s.id, "name": qmpFrozen})
		}
		export := args{"type": "nbd", "id": s.id, "node-name": s.id, "name": s.id, "writable": false}
		if len(bitmaps) > 0 {
			export["bitmaps"] = bitmaps
		}
		if err := m.conn.Do(ctx, "block-export-add", export, nil); err != nil {
			return fmt.Errorf("%s: %w", s.name, err)
		}
		m.opt.step("export of " + s.name)
	}
	for _, s := range m.disks {
		if err := s.open(ctx, m.server); err != nil {
			return err
		}
	}
	m.watch()
	m.opt.step("open")
	return nil
}

// addScratch puts a scratch image above the disk. QEMU has it open afterwards, so its name goes:
// its room is free again once QEMU closes it, whatever becomes of this process.
func (m *qmpMachine) addScratch(ctx context.Context, s *qmpSession) error {
	path, err := m.scratch.image(ctx, s.id, s.node.Image.Size)
	if err != nil {
		return err
	}
	m.opt.step("image of " + s.name)
	err = m.conn.Do(ctx, "blockdev-add", args{
		"driver": "qcow2", "node-name": s.id, "backing": s.node.Name,
		// What is in it counts only as long as QEMU runs.
		"cache": args{"direct": false, "no-flush": true},
		"file":  args{"driver": "file", "filename": path},
	}, nil)
	if err != nil {
		err = fmt.Errorf("%w; --scratch names another directory for what the guest overwrites, that QEMU can write to", err)
	}
	return errors.Join(err, os.Remove(path))
}

// takeMoment is the transaction: all of it is done for all disks, or nothing for any.
func (m *qmpMachine) takeMoment(ctx context.Context) (err error) {
	m.target = m.opt.newBitmapName()
	var frozen *freeze
	if m.opt.Freeze {
		if frozen, err = startFreeze(m.opt.Self, "unix:"+m.uri.agent); err != nil {
			return err
		}
		defer func() {
			if frozen != nil {
				err = errors.Join(err, frozen.thaw())
			}
		}()
		m.opt.step("frozen")
	}
	at := time.Now()
	err = m.conn.Do(ctx, "transaction", args{"actions": m.actions()}, nil)
	var refused *qmp.Error
	if errors.As(err, &refused) && m.dropBitmaps(refused) {
		err = m.conn.Do(ctx, "transaction", args{"actions": m.actions()}, nil)
	}
	if err != nil {
		return err
	}
	m.begun, m.moment = true, at
	m.opt.step("moment")
	if frozen != nil {
		f := frozen
		frozen = nil
		if err := f.thaw(); err != nil {
			return err
		}
		m.frozen = f.lasted
		m.opt.step("thawed")
	}
	return nil
}

// dropBitmaps gives up the old bitmaps, and reports whether there was one: the transaction does
// not say which of its actions was refused.
func (m *qmpMachine) dropBitmaps(why error) (any bool) {
	for _, s := range m.disks {
		if s.old != "" {
			s.old, s.why, any = "", "QEMU cannot use the bitmap "+s.old+": "+why.Error(), true
		}
	}
	return any
}

// actions are those of the transaction, which QEMU does in this order. A bitmap's bits are set once
// a write has ended, and only blockdev-backup waits for those in flight and holds back others
// until the transaction is done. So the copies of the old bitmaps are made after the jobs: made
// earlier one would lack a write that ends before its disk's moment. A new bitmap begins earlier
// than the moment, and so lists too much rather than too little.
func (m *qmpMachine) actions() []action {
	var bitmaps, jobs, merges []action
	for _, s := range m.disks {
		bitmaps = append(bitmaps, action{"block-dirty-bitmap-add", args{"node": s.node.Name, "name": m.target, "persistent": s.node.persistent()}})
		if s.old != "" {
			bitmaps = append(bitmaps,
				action{"block-dirty-bitmap-add", args{"node": s.id, "name": qmpFrozen, "disabled": true, "granularity": s.node.bitmap(s.old).Granularity}})
			merges = append(merges,
				action{"block-dirty-bitmap-merge", args{"node": s.id, "target": qmpFrozen, "bitmaps": []args{{"node": s.node.Name, "name": s.old}}}})
		}
		jobs = append(jobs, action{"blockdev-backup", args{"job-id": s.id, "device": s.node.Name, "target": s.id, "sync": "none"}})
	}
	return slices.Concat(bitmaps, jobs, merges)
}

// open connects to the export.
func (s *qmpSession) open(ctx context.Context, server *nbdclient.URI) (err error) {
	uri := *server
	uri.Export = s.id
	o := nbddisk.Options{Describe: s.name + " of the machine"}
	if s.old != "" {
		o.Bitmaps = []string{qmpFrozen}
	}
	s.disk, err = nbddisk.Open(ctx, &uri, o)
	return err
}

// watch ends the backup before the scratch directory is full, for a write that finds no room
// there fails in the guest; and as soon as QEMU has ended a job.
func (m *qmpMachine) watch() {
	ctx, cancel := context.WithCancel(context.Background())
	m.end, m.ended = cancel, make(chan struct{})
	go func() {
		defer close(m.ended)
		watchMoment(ctx, m.scratch.check, m.checkJobs, m.fail)
	}()
}

// fail ends the jobs, so that the guest writes freely again. Readers get err.
func (m *qmpMachine) fail(err error) {
	m.failed.Store(&err)
	for _, s := range m.disks {
		_ = m.conn.Do(context.Background(), "job-cancel", args{"id": s.id}, nil) // release sees to it too
	}
}
