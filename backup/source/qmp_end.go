package source

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/varve-io/varve/backup/qemu/qmp"
)

// release ends the session in QEMU, but for bitmaps. A second call does nothing.
func (m *qmpMachine) release(ctx context.Context) error {
	if m.end != nil {
		m.end()
		<-m.ended
		m.end = nil
	}
	var errs []error
	for _, s := range m.disks {
		if s.disk != nil {
			errs = append(errs, s.disk.Close())
			s.disk = nil
		}
	}
	errs = append(errs, m.sweepWork(ctx, m.opt.bitmapPrefix()))
	if m.started && errors.Join(errs...) == nil {
		errs = append(errs, m.stopServer(ctx))
		m.started = false
	}
	if m.scratch != nil {
		errs = append(errs, m.scratch.close())
		m.scratch = nil
	}
	return errors.Join(errs...)
}

// sweep ends what an earlier backup of this repository and volume left running. The machine's
// lock is held, so no backup is using it.
func (m *qmpMachine) sweep(ctx context.Context) error {
	if m.opt.Freeze {
		if err := thawLeft(m.opt.Self, "unix:"+m.uri.agent); err != nil {
			return err
		}
	}
	if err := m.sweepWork(ctx, m.opt.bitmapPrefix()); err != nil {
		return err
	}
	return m.stopLeft(ctx)
}

// stopLeft ends the NBD server of a backup that was killed.
func (m *qmpMachine) stopLeft(ctx context.Context) error {
	found, err := listens(ctx, serverSocket(m.key))
	if err != nil || !found {
		return err
	}
	return m.stopServer(ctx)
}

// sweepBitmaps removes the bitmaps of this repository and volume that no point builds on.
func (m *qmpMachine) sweepBitmaps(ctx context.Context) error {
	if m.opt.Base == nil {
		return nil
	}
	err := m.removeBitmaps(ctx, func(s *qmpSession, name string) bool { return name != s.base })
	var refused *qmp.Error
	if errors.As(err, &refused) {
		m.opt.log().WarnContext(ctx, "a bitmap of an earlier backup stays in QEMU", "monitor", m.uri.monitor, "error", err)
		return nil
	}
	return err
}

// sweepWork ends exports, then jobs, then nodes whose names begin with prefix: each is used by
// the one before.
func (m *qmpMachine) sweepWork(ctx context.Context, prefix string) error {
	ours := func(id string) bool { return strings.HasPrefix(id, prefix) }
	err := m.drain(ctx, "block-export-del", args{"mode": "hard"}, func() (ids []string, err error) {
		exports, err := readExports(ctx, m.conn)
		for _, e := range exports {
			if ours(e.ID) {
				ids = append(ids, e.ID)
			}
		}
		return ids, err
	})
	if err != nil {
		return err
	}
	err = m.drain(ctx, "job-cancel", nil, func() (ids []string, err error) {
		jobs, err := readJobs(ctx, m.conn)
		for _, j := range jobs {
			if ours(j.ID) {
				ids = append(ids, j.ID)
			}
		}
		return ids, err
	})
	if err != nil {
		return err
	}
	nodes, err := readNodes(ctx, m.conn)
	if err != nil {
		return err
	}
	for name := range nodes {
		if ours(name) {
			if err := m.conn.Do(ctx, "blockdev-del", args{"node-name": name}, nil); err != nil {
				return err
			}
		}
	}
	return nil
}

// drain runs a command on each of what list gives, once, and waits until it gives none. A
// refusal is of one that is ending already.
func (m *qmpMachine) drain(ctx context.Context, command string, arguments args, list func() ([]string, error)) error {
	asked := map[string]error{}
	for wait := 5 * time.Millisecond; ; wait = min(2*wait, 500*time.Millisecond) {
		ids, err := list()
		if err != nil || len(ids) == 0 {
			return err
		}
		for _, id := range ids {
			if _, ok := asked[id]; ok {
				continue
			}
			with := args{"id": id}
			for k, v := range arguments {
				with[k] = v
			}
			err := m.conn.Do(ctx, command, with, nil)
			var refused *qmp.Error
			if err != nil && !errors.As(err, &refused) {
				return err
			}
			asked[id] = err
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("%s of %s: %w", command, strings.Join(ids, ", "), errors.Join(context.Cause(ctx), asked[ids[0]]))
		case <-time.After(wait):
		}
	}
}

// removeBitmaps removes bitmaps of this repository and volume from the disks.
func (m *qmpMachine) removeBitmaps(ctx context.Context, which func(s *qmpSession, name string) bool) error {
	nodes, err := readNodes(ctx, m.conn)
	if err != nil {
		return err
	}
	var errs []error
	for _, s := range m.disks {
		n := nodes[s.node.Name]
		for _, b := range n.Bitmaps {
			if strings.HasPrefix(b.Name, m.opt.bitmapPrefix()) && which(s, b.Name) {
				if err := m.conn.Do(ctx, "block-dirty-bitmap-remove", args{"node": n.Name, "name": b.Name}, nil); err != nil {
					errs = append(errs, fmt.Errorf("%s: %w", s.name, err))
				}
			}
		}
	}
	return errors.Join(errs...)
}

// forgetQMP removes all of ours from a running QEMU: of one repository and volume if Owner is
// set.
func forgetQMP(ctx context.Context, text string, opt Options) (removed []string, err error) {
	uri, err := parseQMP(text)
	if err != nil {
		return nil, err
	}
	m := &qmpMachine{uri: uri, opt: opt}
	if err := m.connect(ctx); err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, m.conn.Close()) }()
	if m.lock, err = lockMachine(m.key); err != nil {
		return nil, fmt.Errorf("%s: %w", text, err)
	}
	defer m.lock.Close()
	prefix := opt.forgetPrefix()
	if err := m.sweepWork(ctx, prefix); err != nil {
		return nil, err
	}
	if err := m.stopLeft(ctx); err != nil {
		return nil, err
	}
	nodes, err := readNodes(ctx, m.conn)
	if err != nil {
		return nil, err
	}
	var errs []error
	for _, n := range nodes { // also those beneath a later snapshot
		for _, b := range n.Bitmaps {
			if !strings.HasPrefix(b.Name, prefix) {
				continue
			}
			if err := m.conn.Do(ctx, "block-dirty-bitmap-remove", args{"node": n.Name, "name": b.Name}, nil); err != nil {
				errs = append(errs, fmt.Errorf("%s: bitmap %s: %w", n.Name, b.Name, err))
				continue
			}
			removed = append(removed, n.Name+": "+b.Name)
		}
	}
	slices.Sort(removed)
	return removed, errors.Join(errs...)
}
