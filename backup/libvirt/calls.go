package libvirt

import (
	"encoding/json"
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/digitalocean/go-libvirt"
)

// ErrNoAnswer means that libvirt did not answer a call in time. The connection is of no use then:
// each later call fails with it too, at once. What libvirt does of the call is not known.
var ErrNoAnswer = errors.New("libvirt does not answer")

// Bounds of how long a call may take. libvirt itself waits half a minute for another call about the
// same domain, and one that drains a slow disk waits for it.
const (
	DefaultTimeout = time.Minute
	starting       = 5 * time.Minute // of a domain's start
	leaving        = 2 * time.Second // how long the end of a connection is waited for
)

// call runs one call of libvirt's, for at most as long as the URI allows.
func call[T any](c *Conn, name string, do func(*libvirt.Libvirt) (T, error)) (T, error) {
	return callWithin(c, name, c.timeout, do)
}

func callWithin[T any](c *Conn, name string, limit time.Duration, do func(*libvirt.Libvirt) (T, error)) (T, error) {
	return callBeating(c, name, limit, func(l *libvirt.Libvirt, _ func()) (T, error) { return do(l) })
}

// callBeating is for a call that may take longer: the limit begins again with each beat.
func callBeating[T any](c *Conn, name string, limit time.Duration, do func(l *libvirt.Libvirt, beat func()) (T, error)) (T, error) {
	var none T
	if err := c.silent.Load(); err != nil {
		return none, *err
	}
	watch := time.AfterFunc(limit, func() {
		err := fmt.Errorf("%w: %s took longer than %s; see whether libvirtd (or virtqemud) hangs, and start it again", ErrNoAnswer, name, limit)
		c.silent.CompareAndSwap(nil, &err)
		_ = c.conn.Close() // which ends the call
	})
	answer, err := do(c.lv, func() { watch.Reset(limit) })
	watch.Stop()
	if err == nil || Refused(err) {
		return answer, err
	}
	if why := c.silent.Load(); why != nil {
		return none, *why
	}
	return none, err
}

// run is call for what answers nothing.
func run(c *Conn, name string, do func(*libvirt.Libvirt) error) error {
	_, err := call(c, name, func(l *libvirt.Libvirt) (struct{}, error) { return struct{}{}, do(l) })
	return err
}

// State is a domain's.
func (c *Conn) State(d libvirt.Domain) (libvirt.DomainState, error) {
	return call(c, "DomainGetState", func(l *libvirt.Libvirt) (libvirt.DomainState, error) {
		state, _, err := l.DomainGetState(d, 0)
		return libvirt.DomainState(state), err
	})
}

// Lookup finds a domain by its name.
func (c *Conn) Lookup(name string) (libvirt.Domain, error) {
	return call(c, "DomainLookupByName", func(l *libvirt.Libvirt) (libvirt.Domain, error) { return l.DomainLookupByName(name) })
}

// LookupUUID finds a domain by its UUID.
func (c *Conn) LookupUUID(id libvirt.UUID) (libvirt.Domain, error) {
	return call(c, "DomainLookupByUUID", func(l *libvirt.Libvirt) (libvirt.Domain, error) { return l.DomainLookupByUUID(id) })
}

// XML is a domain's definition.
func (c *Conn) XML(d libvirt.Domain, flags libvirt.DomainXMLFlags) (string, error) {
	return call(c, "DomainGetXMLDesc", func(l *libvirt.Libvirt) (string, error) { return l.DomainGetXMLDesc(d, flags) })
}

// Define defines a domain.
func (c *Conn) Define(xml string) (libvirt.Domain, error) {
	return call(c, "DomainDefineXMLFlags", func(l *libvirt.Libvirt) (libvirt.Domain, error) { return l.DomainDefineXMLFlags(xml, 0) })
}

// BlockInfo is how much of a disk is allocated, and its size, in bytes.
func (c *Conn) BlockInfo(d libvirt.Domain, target string) (allocated, capacity uint64, err error) {
	both, err := call(c, "DomainGetBlockInfo", func(l *libvirt.Libvirt) (both [2]uint64, err error) {
		both[0], both[1], _, err = l.DomainGetBlockInfo(d, target, 0)
		return both, err
	})
	return both[0], both[1], err
}

// JobRuns reports whether a job runs, or is beginning or ending.
func (c *Conn) JobRuns(d libvirt.Domain) (bool, error) {
	kind, err := call(c, "DomainGetJobStats", func(l *libvirt.Libvirt) (libvirt.DomainJobType, error) {
		kind, _, err := l.DomainGetJobStats(d, 0)
		return libvirt.DomainJobType(kind), err
	})
	// A backup job that libvirt begins or ends has no data yet, or no longer (qemuBackupGetJobInfoStats).
	if Is(err, libvirt.ErrInternalError) && strings.Contains(err.Error(), "backup job data missing") {
		return true, nil
	}
	switch kind {
	case libvirt.DomainJobNone, libvirt.DomainJobCompleted, libvirt.DomainJobCancelled, libvirt.DomainJobFailed:
		return false, err
	}
	return true, err
}

// AbortJob has the job end.
func (c *Conn) AbortJob(d libvirt.Domain) error {
	return run(c, "DomainAbortJob", func(l *libvirt.Libvirt) error { return l.DomainAbortJob(d) })
}

// BackupBegin begins a backup job. An empty checkpoint is none.
func (c *Conn) BackupBegin(d libvirt.Domain, backup, checkpoint string) error {
	var with libvirt.OptString
	if checkpoint != "" {
		with = libvirt.OptString{checkpoint}
	}
	return run(c, "DomainBackupBegin", func(l *libvirt.Libvirt) error { return l.DomainBackupBegin(d, backup, with, 0) })
}

// BackupXML describes the backup job that runs.
func (c *Conn) BackupXML(d libvirt.Domain) (string, error) {
	return call(c, "DomainBackupGetXMLDesc", func(l *libvirt.Libvirt) (string, error) { return l.DomainBackupGetXMLDesc(d, 0) })
}

// Checkpoints are those of a domain, parents first.
func (c *Conn) Checkpoints(d libvirt.Domain) ([]libvirt.DomainCheckpoint, error) {
	return call(c, "DomainListAllCheckpoints", func(l *libvirt.Libvirt) ([]libvirt.DomainCheckpoint, error) {
		list, _, err := l.DomainListAllCheckpoints(d, 1, uint32(libvirt.DomainCheckpointListTopological))
		return list, err
	})
}

// Checkpoint finds one by its name.
func (c *Conn) Checkpoint(d libvirt.Domain, name string) (libvirt.DomainCheckpoint, error) {
	return call(c, "DomainCheckpointLookupByName", func(l *libvirt.Libvirt) (libvirt.DomainCheckpoint, error) {
		return l.DomainCheckpointLookupByName(d, name, 0)
	})
}

// CheckpointXML describes a checkpoint.
func (c *Conn) CheckpointXML(p libvirt.DomainCheckpoint, flags libvirt.DomainCheckpointXMLFlags) (string, error) {
	return call(c, "DomainCheckpointGetXMLDesc", func(l *libvirt.Libvirt) (string, error) { return l.DomainCheckpointGetXMLDesc(p, uint32(flags)) })
}

// CheckpointCreate makes a checkpoint, or tells libvirt of one.
func (c *Conn) CheckpointCreate(d libvirt.Domain, xml string, flags libvirt.DomainCheckpointCreateFlags) error {
	return run(c, "DomainCheckpointCreateXML", func(l *libvirt.Libvirt) error {
		_, err := l.DomainCheckpointCreateXML(d, xml, uint32(flags))
		return err
	})
}

// CheckpointDelete deletes a checkpoint.
func (c *Conn) CheckpointDelete(p libvirt.DomainCheckpoint, flags libvirt.DomainCheckpointDeleteFlags) error {
	return run(c, "DomainCheckpointDelete", func(l *libvirt.Libvirt) error { return l.DomainCheckpointDelete(p, flags) })
}

// Freeze has the guest's agent freeze its file systems, Thaw thaw them.
func (c *Conn) Freeze(d libvirt.Domain) error {
	return run(c, "DomainFsfreeze", func(l *libvirt.Libvirt) error {
		_, err := l.DomainFsfreeze(d, nil, 0)
		return err
	})
}

// Thaw thaws the guest's file systems.
func (c *Conn) Thaw(d libvirt.Domain) error {
	return run(c, "DomainFsthaw", func(l *libvirt.Libvirt) error {
		_, err := l.DomainFsthaw(d, nil, 0)
		return err
	})
}

// StartPaused starts a domain, none of whose processors runs.
func (c *Conn) StartPaused(d libvirt.Domain) error {
	// A machine may have much memory to allocate.
	_, err := callWithin(c, "DomainCreateWithFlags", max(c.timeout, starting), func(l *libvirt.Libvirt) (libvirt.Domain, error) {
		return l.DomainCreateWithFlags(d, uint32(libvirt.DomainStartPaused))
	})
	return err
}

// Stop ends a domain's QEMU as it ends by itself: it writes the bitmaps of its images. A QEMU that does not
// end in time goes on running, and that is an error.
func (c *Conn) Stop(d libvirt.Domain) error {
	return run(c, "DomainDestroyFlags", func(l *libvirt.Libvirt) error { return l.DomainDestroyFlags(d, libvirt.DomainDestroyGraceful) })
}

// HasSavedState reports whether a stopped domain's memory was saved: its next start goes on from there.
func (c *Conn) HasSavedState(d libvirt.Domain) (bool, error) {
	has, err := call(c, "DomainHasManagedSaveImage", func(l *libvirt.Libvirt) (int32, error) { return l.DomainHasManagedSaveImage(d, 0) })
	return has != 0, err
}

// NeverRan reports whether no processor of a running domain has run since its QEMU was started, or since the
// domain was reset while none ran.
func (c *Conn) NeverRan(d libvirt.Domain) (bool, error) {
	text, err := call(c, "QEMUDomainMonitorCommand", func(l *libvirt.Libvirt) (string, error) {
		return l.QEMUDomainMonitorCommand(d, `{"execute":"query-status"}`, 0)
	})
	if err != nil {
		return false, err
	}
	var answer struct {
		Return struct {
			Status string `json:"status"`
		} `json:"return"`
	}
	if err := json.Unmarshal([]byte(text), &answer); err != nil {
		return false, fmt.Errorf("QEMU's answer to query-status: %w", err)
	}
	return answer.Return.Status == "prelaunch", nil // RunState of QEMU's qapi/run-state.json
}

// SetMark writes an element of metadata into a domain's definition, or removes it if xml is empty.
// Elements are told apart by their namespace.
func (c *Conn) SetMark(d libvirt.Domain, of libvirt.DomainModificationImpact, key, namespace, xml string) error {
	var element libvirt.OptString
	if xml != "" {
		element = libvirt.OptString{xml}
	}
	err := run(c, "DomainSetMetadata", func(l *libvirt.Libvirt) error {
		return l.DomainSetMetadata(d, int32(libvirt.DomainMetadataElement), element, libvirt.OptString{key}, libvirt.OptString{namespace}, of)
	})
	if xml == "" && Is(err, libvirt.ErrNoDomainMetadata) {
		return nil
	}
	return err
}

// Mark returns the element of metadata of a namespace; empty if the domain has none.
func (c *Conn) Mark(d libvirt.Domain, of libvirt.DomainModificationImpact, namespace string) (string, error) {
	xml, err := call(c, "DomainGetMetadata", func(l *libvirt.Libvirt) (string, error) {
		return l.DomainGetMetadata(d, int32(libvirt.DomainMetadataElement), libvirt.OptString{namespace}, of)
	})
	if Is(err, libvirt.ErrNoDomainMetadata) {
		return "", nil
	}
	return xml, err
}
