package backup

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"

	"github.com/cespare/xxhash/v2"
	"golang.org/x/sys/unix"

	"github.com/varve-io/varve/backup/disk"
	"github.com/varve-io/varve/backup/image"
)

// restoreUnit is what the journal counts by, in bytes: a unit is done once
// every byte of it that the restore has to write is.
const restoreUnit = 4 << 20

// restoreSync is how much is written between two syncs of the target.
const restoreSync = 256 << 20

// restoreJournal remembers how far a restore has come. It is a text file:
//
//	{"format":"varve-restore/1","point":…,"target":…,…}
//	w FIRST LAST CRC      units FIRST to LAST are written
//	s N CRC               the first N "w" lines survive a power cut
//
// A process that is killed leaves what it wrote in the page cache, so within
// one boot of the machine every "w" line counts; after a power cut only those
// that an "s" line covers. A torn or damaged line ends the journal.
type restoreJournal struct {
	path string
	f    *os.File

	old  []image.Range // done by earlier runs, merged
	plan []image.Range // what has to be written in all

	mu     sync.Mutex
	open   map[int64]int64 // bytes left of units begun
	lines  int64           // "w" lines
	since  int64           // bytes done since the last sync
	wanted *sync.Cond      // a sync is due, or the end
	ended  bool
	mute   bool  // a line could not be written: what was noted counts, the rest is not
	err    error // of a sync of the target
}

type journalHeader struct {
	Format string `json:"format"`
	Point  string `json:"point"`  // ID
	Name   string `json:"name"`   // of the point, for messages
	Root   string `json:"root"`   // object of the disk
	Target string `json:"target"` // identity
	Mode   string `json:"mode"`
	Base   string `json:"base,omitempty"` // ID
	Plan   string `json:"plan"`           // digest of the ranges
	Unit   int64  `json:"unit"`
	Boot   string `json:"boot"`
}

const journalFormat = "varve-restore/1"

// JournalTarget gives the identity of the target that the journal at path is of: that of
// a restore that was interrupted. It is empty where there is none that can be read.
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

// maxJournalHeader bounds the first line, in bytes.
const maxJournalHeader = 64 << 10

// openJournal opens or makes the journal, if there is to be one and there is room
// for it: a restore must not fail because of its notes, when a full disk may be what
// it is to help with. resumed tells that an earlier run has written to the target.
func (r *restore) openJournal(ctx context.Context, plan []image.Range) (resumed bool, err error) {
	if r.opt.Journal == "" {
		return false, nil
	}
	head := journalHeader{
		Format: journalFormat, Point: r.point.ID, Name: r.point.Name(), Root: r.img.Tree().Root().Object.String(),
		Target: r.target.Identity(), Mode: r.res.Mode, Plan: planDigest(plan), Unit: restoreUnit, Boot: bootID(),
	}
	if r.opt.Base != nil {
		head.Base = r.opt.Base.ID
	}
	j := &restoreJournal{path: r.opt.Journal, plan: plan, open: map[int64]int64{}}
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
		if old != nil && old != r.stale {
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
		if old != nil && !found { // it would tell of what is overwritten now
			if rerr := removeJournal(j.path); rerr != nil {
				return false, fmt.Errorf("%w; it is of an earlier restore, and has to go before this one: remove it, or name another place by $XDG_STATE_HOME", errors.Join(err, rerr))
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

func (r *restore) goOnWithoutJournal(ctx context.Context, err error) {
	slog.WarnContext(ctx, "restoring without a journal: if this is interrupted it starts from its beginning; $XDG_STATE_HOME names another place for it",
		"target", r.target.Path(), "error", err)
}

// checkResumed reads some of what the journal says is written: a disk that was
// mounted or formatted in between, or a file that was edited, has the identity it
// had and not the bytes. The beginning, where file systems and partition tables
// say that they were used, is always read. If anything differs the journal is
// worth nothing: all of it is compared, and units that differ are written again.
func (r *restore) checkResumed(ctx context.Context, j *restoreJournal) error {
	missing := j.missing(j.plan)
	there := subtractRanges(j.plan, missing)
	if r.opt.SpotCheck <= 0 || len(there) == 0 {
		return nil
	}
	spots := r.spots(missing, there)
	if there[0].Offset < restoreUnit {
		spots = append(spots, image.Range{Offset: there[0].Offset, Length: min(there[0].Length, restoreUnit-there[0].Offset)})
	}
	bad, err := r.look(ctx, "spot check", mergeRanges(spots))
	if err != nil || len(bad) == 0 {
		return err
	}
	slog.WarnContext(ctx, "the target was changed since the restore of it was interrupted: comparing all that was written",
		"target", r.target.Path(), "offset", bad[0].Offset, "journal", j.path)
	buf := disk.AlignedBuffer(restoreUnit)
	done, all := int64(0), total(there)
	var again []image.Range
	for _, s := range there {
		for _, part := range cutRange(s) {
			if bad, err = r.differs(ctx, part, buf, nil); err != nil {
				return err
			}
			if len(bad) > 0 {
				unit := part.Offset / restoreUnit * restoreUnit
				again = append(again, image.Range{Offset: unit, Length: restoreUnit})
			}
			done += part.Length
			r.opt.Progress(Progress{Phase: "compare", Done: done, Total: all})
		}
	}
	j.old = subtractRanges(j.old, mergeRanges(again))
	return nil
}

func planDigest(plan []image.Range) string {
	h := xxhash.New()
	for _, x := range plan {
		fmt.Fprintf(h, "%d+%d,", x.Offset, x.Length)
	}
	return strconv.FormatUint(h.Sum64(), 16)
}

// lockJournal opens the journal of an earlier run; nil if there is none. It
// fails if that run still goes on.
func lockJournal(path string) (*os.File, error) {
	f, err := os.Open(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("open restore journal: %w", err)
	}
	if err := flock(f); err != nil {
		_ = f.Close()
		return nil, fmt.Errorf("%w: it is still running (journal %s)", ErrOtherRestore, path)
	}
	return f, nil
}

// flock locks a journal. A file system that has no locks is done without.
func flock(f *os.File) error {
	if err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB); errors.Is(err, unix.EWOULDBLOCK) {
		return err
	}
	return nil
}

// load reads the journal of an earlier run and refuses that of another restore.
func (j *restoreJournal) load(f io.Reader, want journalHeader) (found bool, err error) {
	b, err := io.ReadAll(f)
	if err != nil {
		return false, fmt.Errorf("read restore journal: %w", err)
	}
	first, rest, ok := bytes.Cut(b, []byte("\n"))
	var head journalHeader
	if !ok || json.Unmarshal(first, &head) != nil || head.Format != journalFormat || head.Unit != want.Unit {
		return false, fmt.Errorf("restore journal %s cannot be read; start the restore from its beginning with --restart", j.path)
	}
	switch {
	case head.Target != want.Target:
		return false, fmt.Errorf("%w: journal %s is of %s, but this target is %s; is it the right one? if so, start from the beginning with --restart",
			ErrOtherRestore, j.path, head.Target, want.Target)
	case head.Point != want.Point || head.Root != want.Root:
		return false, fmt.Errorf("%w: it holds a part of %s; finish that restore, or write this point from the beginning with --restart",
			ErrOtherRestore, head.Name)
	case want.Mode == RestoreDelta && (head.Mode != RestoreDelta || head.Base != want.Base):
		return false, fmt.Errorf("%w: it holds a part of %s and not its base; finish that restore, or use --delta without a base",
			ErrOtherRestore, head.Name)
	case head.Mode != want.Mode || head.Plan != want.Plan:
		return false, nil // another way to the same point: begin anew
	}
	j.old = readUnits(rest, head.Boot == want.Boot && want.Boot != "")
	return true, nil
}

// readUnits returns the ranges that a journal says are done.
func readUnits(lines []byte, sameBoot bool) []image.Range {
	var all []image.Range
	durable := 0
	sc := bufio.NewScanner(bytes.NewReader(lines))
	for sc.Scan() {
		body, ok := checkLine(sc.Text())
		if !ok {
			break
		}
		var a, b int64
		if n, err := fmt.Sscanf(body, "w %d %d", &a, &b); n == 2 && err == nil && a >= 0 && b >= a && b < 1<<38 {
			all = append(all, image.Range{Offset: a * restoreUnit, Length: (b - a + 1) * restoreUnit})
			continue
		}
		if n, err := fmt.Sscanf(body, "s %d", &a); n == 1 && err == nil && a >= 0 && a <= int64(len(all)) {
			durable = int(a)
			continue
		}
		break
	}
	if !sameBoot {
		all = all[:durable]
	}
	return mergeRanges(all)
}

func checkLine(s string) (body string, ok bool) {
	i := strings.LastIndexByte(s, ' ')
	if i < 0 {
		return "", false
	}
	return s[:i], s[i+1:] == lineSum(s[:i])
}

func lineSum(body string) string {
	return fmt.Sprintf("%08x", crc32.Checksum([]byte(body), crc32.MakeTable(crc32.Castagnoli)))
}

// create starts the journal of this run with what earlier ones did, in a file
// that takes the old one's place at once.
func (j *restoreJournal) create(head journalHeader) error {
	if err := os.MkdirAll(filepath.Dir(j.path), 0o700); err != nil {
		return fmt.Errorf("make restore journal: %w", err)
	}
	f, err := os.CreateTemp(filepath.Dir(j.path), "."+filepath.Base(j.path)+"-*")
	if err != nil {
		return fmt.Errorf("make restore journal: %w", err)
	}
	err = j.begin(f, head)
	if err == nil {
		err = os.Rename(f.Name(), j.path)
	}
	if err == nil {
		err = syncDir(filepath.Dir(j.path))
	}
	if err != nil {
		return fmt.Errorf("make restore journal: %w", errors.Join(err, f.Close(), os.Remove(f.Name())))
	}
	j.f = f
	return nil
}

func (j *restoreJournal) begin(f *os.File, head journalHeader) error {
	// Two restores of one target at once would write into each other.
	if err := flock(f); err != nil {
		return err
	}
	b, err := json.Marshal(head)
	if err != nil {
		return err
	}
	if _, err := f.Write(append(b, '\n')); err != nil {
		return err
	}
	for _, r := range j.old {
		if err := j.line(f, fmt.Sprintf("w %d %d", r.Offset/restoreUnit, (r.Offset+r.Length-1)/restoreUnit)); err != nil {
			return err
		}
		j.lines++
	}
	return f.Sync()
}

func (j *restoreJournal) line(w io.Writer, body string) error {
	_, err := io.WriteString(w, body+" "+lineSum(body)+"\n")
	return err
}

func syncDir(path string) error {
	d, err := os.Open(path)
	if err != nil {
		return err
	}
	return errors.Join(d.Sync(), d.Close())
}

// missing returns what earlier runs left of ranges.
func (j *restoreJournal) missing(ranges []image.Range) []image.Range {
	return subtractRanges(ranges, j.old)
}

// done counts a piece that was written.
func (j *restoreJournal) done(off, n int64) error {
	j.mu.Lock()
	defer j.mu.Unlock()
	if j.err != nil {
		return j.err
	}
	first, last := int64(-1), int64(-1) // run of units that got done
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

// note adds a line, as long as that works; j.mu is held.
func (j *restoreJournal) note(body string) {
	if j.mute {
		return
	}
	if err := j.line(j.f, body); err != nil {
		j.giveUp(err)
	}
}

// giveUp ends the notes, not the restore.
func (j *restoreJournal) giveUp(err error) {
	if !j.mute {
		slog.Warn("cannot note how far the restore is: if it is interrupted it goes on from here", "journal", j.path, "error", err)
	}
	j.mute = true
}

// toWrite returns how many bytes of a unit the plan has. Units done by earlier
// runs never come here.
func (j *restoreJournal) toWrite(unit int64) int64 {
	start, end := unit*restoreUnit, (unit+1)*restoreUnit
	i, _ := slices.BinarySearchFunc(j.plan, start, func(r image.Range, at int64) int {
		if r.Offset+r.Length <= at {
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

// syncInBackground syncs the target now and then, and notes what is safe since.
// The returned function ends it, waits, and tells what went wrong: the kernel
// reports a failed write to one sync only.
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
			noted := j.f.Sync() // the lines before the one that says they count
			j.mu.Lock()
			switch {
			case err != nil && j.err == nil:
				j.err = err
			case err == nil && noted != nil:
				j.giveUp(noted)
			case err == nil:
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

// removeJournal ends the journal of a restore that is done, or one that a
// restore by comparing has made pointless.
func removeJournal(path string) error {
	if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("remove restore journal: %w", err)
	}
	return nil
}
