package backup

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"slices"
	"strconv"
	"sync"

	"github.com/cespare/xxhash/v2"
	"golang.org/x/sys/unix"

	"github.com/varve-io/varve/backup/blocktree"
	"github.com/varve-io/varve/backup/disk"
	"github.com/varve-io/varve/internal/process"
)

// restoreUnit is the unit of the journal, in bytes: a unit is done once the restore has
// written all of its planned part.
const restoreUnit = 4 << 20

// restoreSync is how much is written between two syncs of the target, in bytes.
const restoreSync = 256 << 20

// restoreJournal records the progress of a restore. It is a text file:
//
//	{"format":"varve-restore/1","point":…,"target":…,…}
//	w FIRST LAST CRC      units FIRST to LAST are written
//	s N CRC               the first N "w" lines survive a power failure
//
// The page cache keeps what a killed process wrote to a file, so within one boot of the machine
// every "w" line counts; after a power failure only those that an "s" line covers. On a device
// only those ever count: it may lose power, and its cache, without the machine. A torn or
// damaged line ends the journal.
//
// A target that fails may have lost what it had accepted before, and the kernel reports that
// once only. So then, unless a file was full, the "w" lines that no "s" line covers are
// removed, and none follow.
type restoreJournal struct {
	path   string
	f      *os.File
	logger *slog.Logger

	cached bool // the page cache keeps what was written to the target

	old  []blocktree.Range // done by earlier runs, merged
	safe []blocktree.Range // the part of old that survives a power failure
	plan []blocktree.Range // all that must be written

	mu     sync.Mutex
	open   map[int64]int64 // bytes left of each unit begun
	lines  int64           // "w" lines
	since  int64           // bytes written since the last sync
	wanted *sync.Cond      // a sync is due, or the end
	ended  bool
	mute   bool  // later progress is not recorded
	err    error // of the target
}

// JournalTarget returns the identity of the target in the journal at path, which an
// interrupted restore left. It is empty if no journal can be read.
func JournalTarget(path string) string {
	if path == "" {
		return ""
	}
	f, err := os.Open(path)
	if err != nil {
		return ""
	}
	defer f.Close()
	line, err := bufio.NewReader(io.LimitReader(f, maxJournalHeader)).ReadBytes('\n')
	var head journalHeader
	if err != nil || json.Unmarshal(line, &head) != nil || head.Format != journalFormat {
		return ""
	}
	return head.Target
}

// openJournal opens or creates the journal, if one is wanted and possible: a restore must not
// fail for want of its journal, since a full disk may be the reason for it. resumed means
// that an earlier run has written to the target.
func (r *restore) openJournal(ctx context.Context, plan []blocktree.Range) (resumed bool, err error) {
	if r.opt.Journal == "" {
		return false, nil
	}
	head := journalHeader{
		Format: journalFormat, Point: r.point.ID, Name: r.point.Name(), Root: r.img.Tree().Root().Object.String(),
		Target: r.target.Identity(), Mode: r.res.Mode, Plan: planDigest(plan), Unit: restoreUnit, Boot: process.BootID(),
	}
	if r.opt.Base != nil {
		head.Base = r.opt.Base.ID
	}
	j := &restoreJournal{path: r.opt.Journal, logger: r.logger, cached: isFile(r.target), plan: plan, open: map[int64]int64{}}
	j.wanted = sync.NewCond(&j.mu)
	old, err := lockJournal(j.path)
	if err != nil && !errors.Is(err, ErrOtherRestore) {
		r.goOnWithoutJournal(ctx, err)
		return false, nil
	}
	if err != nil {
		return false, err
	}
	defer func() {
		if old != nil && old != r.stale { // which stays locked
			_ = old.Close()
		}
	}()
	found := false
	if old != nil && !r.opt.Restart {
		if found, err = j.load(old, head); err != nil {
			return false, err
		}
	}
	if found {
		if err := r.checkResumed(ctx, j); err != nil {
			return false, err
		}
	}
	if err := j.create(head); err != nil {
		if old != nil && !found { // it describes what is overwritten now
			if rerr := removeJournal(j.path); rerr != nil {
				return false, fmt.Errorf("%w; it is of an earlier restore: remove it, or set $XDG_STATE_HOME to another place", errors.Join(err, rerr))
			}
		}
		if found { // what it says of the target stays true
			r.stale = old
		}
		r.goOnWithoutJournal(ctx, err)
		return found, nil
	}
	r.log = j
	return found, nil
}

// isFile reports whether a target is known to be a file of this machine.
func isFile(target RestoreTarget) bool {
	t, ok := target.(interface{ Device() bool })
	return ok && !t.Device()
}

// isFull reports whether a write failed for want of room alone, so that what was written
// before is still there. Only a direct write to a file tells: a buffered one may return the
// error of an earlier one, which is lost then (NFS).
func isFull(target RestoreTarget, err error) bool {
	t, ok := target.(interface{ Direct() bool })
	return ok && t.Direct() && isFile(target) && (errors.Is(err, unix.ENOSPC) || errors.Is(err, unix.EDQUOT))
}

func (r *restore) goOnWithoutJournal(ctx context.Context, err error) {
	r.logger.WarnContext(ctx, "restoring without a journal: if interrupted, it starts from the beginning; $XDG_STATE_HOME names another place for it",
		"target", r.target.Path(), "error", err)
}

// checkResumed reads part of what the journal says is written: a disk mounted or formatted in
// between, or a file edited, has the same identity but other bytes. The beginning, where file
// systems and partition tables record their use, is always read. If anything differs, all of
// it is compared, and units that differ are written again.
func (r *restore) checkResumed(ctx context.Context, j *restoreJournal) error {
	missing := j.missing(j.plan)
	there := subtractRanges(j.plan, missing)
	if r.opt.SpotCheck <= 0 || len(there) == 0 {
		return nil
	}
	spots := r.spots(missing, there)
	if there[0].Offset < restoreUnit {
		spots = append(spots, blocktree.Range{Offset: there[0].Offset, Length: min(there[0].Length, restoreUnit-there[0].Offset)})
	}
	bad, err := r.look(ctx, "spot check", mergeRanges(spots))
	if err != nil || len(bad) == 0 {
		return err
	}
	r.logger.WarnContext(ctx, "the target was changed since the restore of it was interrupted: comparing all that was written",
		"target", r.target.Path(), "offset", bad[0].Offset, "journal", j.path)
	buf := disk.AlignedBuffer(restoreUnit)
	done, all := int64(0), total(there)
	var again []blocktree.Range
	for _, s := range there {
		for _, part := range cutRange(s) {
			if bad, err = r.differs(ctx, part, buf, nil); err != nil {
				return err
			}
			if len(bad) > 0 {
				unit := part.Offset / restoreUnit * restoreUnit
				again = append(again, blocktree.Range{Offset: unit, Length: restoreUnit})
			}
			done += part.Length
			r.opt.Progress(Progress{Phase: "compare", Done: done, Total: all})
		}
	}
	again = mergeRanges(again)
	j.old, j.safe = subtractRanges(j.old, again), subtractRanges(j.safe, again)
	return nil
}

func planDigest(plan []blocktree.Range) string {
	h := xxhash.New()
	for _, x := range plan {
		fmt.Fprintf(h, "%d+%d,", x.Offset, x.Length)
	}
	return strconv.FormatUint(h.Sum64(), 16)
}

// missing returns the parts of ranges that earlier runs have not written.
func (j *restoreJournal) missing(ranges []blocktree.Range) []blocktree.Range {
	return subtractRanges(ranges, j.old)
}

// done records that a piece was written.
func (j *restoreJournal) done(off, n int64) error {
	j.mu.Lock()
	defer j.mu.Unlock()
	if j.err != nil {
		return j.err
	}
	first, last := int64(-1), int64(-1) // run of units just completed
	flush := func() {
		if first < 0 {
			return
		}
		j.lines++
		j.note(fmt.Sprintf("w %d %d", first, last))
		first = -1
	}
	for end := off + n; off < end; {
		unit := off / restoreUnit
		step := min((unit+1)*restoreUnit, end) - off
		left, begun := j.open[unit]
		if !begun {
			left = j.toWrite(unit)
		}
		if left -= step; left > 0 {
			j.open[unit] = left
		} else {
			delete(j.open, unit)
			if first < 0 {
				first = unit
			}
			last = unit
		}
		off += step
		if left > 0 || off == end {
			flush()
		}
	}
	if j.since += n; j.since >= restoreSync {
		j.wanted.Signal()
	}
	return nil
}

// note appends a line unless an earlier one failed; j.mu is held.
func (j *restoreJournal) note(body string) {
	if j.mute {
		return
	}
	if err := journalLine(j.f, body); err != nil {
		j.giveUp(err)
	}
}

// giveUp ends the journal, not the restore: what it says so far stays true.
func (j *restoreJournal) giveUp(err error) {
	if !j.mute {
		j.logger.Warn("cannot record the progress of the restore: if interrupted, it continues from here", "journal", j.path, "error", err)
	}
	j.mute = true
}

// targetFailed ends the journal after an error of the target, and the restore.
func (j *restoreJournal) targetFailed(err error) {
	j.mu.Lock()
	defer j.mu.Unlock()
	j.distrust(err)
}

// distrust is targetFailed with j.mu held, so that no worker adds a line to what is cut.
func (j *restoreJournal) distrust(err error) {
	if j.err != nil {
		return
	}
	j.err, j.mute = err, true
	distrustJournal(j.path, j.logger)
}

// distrustJournal has the journal at path list only what survives a power failure, or removes
// it.
func distrustJournal(path string, logger *slog.Logger) {
	err := cutJournal(path)
	if err == nil {
		return
	}
	if rerr := removeJournal(path); rerr != nil {
		logger.Warn("the target may have lost what the restore journal lists as written, and the journal could not be removed: remove it, or start the next restore with --restart",
			"journal", path, "error", errors.Join(err, rerr))
	}
}

// toWrite returns how many bytes of a unit are in the plan. Units done by earlier runs do not
// occur.
func (j *restoreJournal) toWrite(unit int64) int64 {
	start, end := unit*restoreUnit, (unit+1)*restoreUnit
	i, _ := slices.BinarySearchFunc(j.plan, start, func(r blocktree.Range, at int64) int {
		if r.End() <= at {
			return -1
		}
		return 1
	})
	n := int64(0)
	for ; i < len(j.plan) && j.plan[i].Offset < end; i++ {
		n += min(end, j.plan[i].Offset+j.plan[i].Length) - max(start, j.plan[i].Offset)
	}
	return n
}

// syncInBackground syncs the target from time to time, and records what is safe since. stop
// ends it, waits, and returns the first error of a sync: the kernel reports a failed write to
// one sync only.
func (j *restoreJournal) syncInBackground(target RestoreTarget) (stop func() error) {
	var wg sync.WaitGroup
	wg.Go(func() {
		j.mu.Lock()
		defer j.mu.Unlock()
		for {
			for j.since < restoreSync && !j.ended {
				j.wanted.Wait()
			}
			if j.ended {
				return
			}
			lines := j.lines
			j.since = 0
			j.mu.Unlock()
			err := target.Sync()
			noted := j.f.Sync() // the lines before the one that makes them count
			j.mu.Lock()
			switch {
			case err != nil:
				j.distrust(err)
			case noted != nil:
				j.giveUp(noted)
			default:
				j.note(fmt.Sprintf("s %d", lines))
			}
		}
	})
	return func() error {
		j.mu.Lock()
		j.ended = true
		j.wanted.Signal()
		j.mu.Unlock()
		wg.Wait()
		return j.err
	}
}

// close keeps the journal for the next run.
func (j *restoreJournal) close() error { return j.f.Close() }
