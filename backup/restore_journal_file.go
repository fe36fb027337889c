package backup

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/varve-io/varve/backup/blocktree"
)

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

// maxJournalHeader bounds the first line, in bytes.
const maxJournalHeader = 64 << 10

// lockJournal opens and locks the journal of an earlier run; nil if there is none. It fails
// if that run is still running.
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

// flock locks a journal. On a file system without locks it does nothing.
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
		return false, nil // another way to the same point: start over
	}
	j.old, j.safe = readUnits(rest, j.cached && head.Boot == want.Boot && want.Boot != "")
	return true, nil
}

// readUnits returns the ranges that a journal lists as done, and those of them that survive a
// power failure. Without cached only the latter count.
func readUnits(lines []byte, cached bool) (done, safe []blocktree.Range) {
	all, durable, _ := scanUnits(lines)
	safe = mergeRanges(slices.Clone(all[:durable]))
	if !cached {
		return safe, safe
	}
	return mergeRanges(all), safe
}

// scanUnits returns the ranges of the "w" lines, how many of them survive a power failure, and
// where the last of those ends.
func scanUnits(lines []byte) (all []blocktree.Range, durable, end int) {
	var ends []int // of the "w" lines
	for at := 0; at < len(lines); {
		text, _, _ := bytes.Cut(lines[at:], []byte("\n"))
		at += len(text) + 1
		body, ok := checkLine(string(text))
		if !ok {
			break
		}
		var a, b int64
		if n, err := fmt.Sscanf(body, "w %d %d", &a, &b); n == 2 && err == nil && a >= 0 && b >= a && b < 1<<38 {
			all = append(all, blocktree.Range{Offset: a * restoreUnit, Length: (b - a + 1) * restoreUnit})
			ends = append(ends, at)
			continue
		}
		if n, err := fmt.Sscanf(body, "s %d", &a); n == 1 && err == nil && a >= 0 && a <= int64(len(all)) {
			durable = int(a)
			continue
		}
		break
	}
	if durable > 0 {
		end = ends[durable-1]
	}
	return all, durable, end
}

// cutJournal removes from a journal all that does not survive a power failure. It leaves no
// mark of that: an earlier version would end its reading there, and count all before it.
func cutJournal(path string) error {
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	return errors.Join(cutLines(f), f.Close())
}

func cutLines(f *os.File) error {
	b, err := io.ReadAll(f)
	if err != nil {
		return err
	}
	head := bytes.IndexByte(b, '\n') + 1
	if head == 0 {
		return errors.New("it has no header")
	}
	_, durable, end := scanUnits(b[head:])
	size := int64(head + end)
	if err := f.Truncate(size); err != nil {
		return err
	}
	if durable > 0 { // the line was behind what is cut off
		if err := journalLine(io.NewOffsetWriter(f, size), fmt.Sprintf("s %d", durable)); err != nil {
			return err
		}
	}
	return f.Sync()
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

// create starts this run's journal with what earlier runs did, in a file that atomically
// replaces the old one.
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
	// Two concurrent restores of one target would write over each other.
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
	done := func(ranges []blocktree.Range) error {
		for _, r := range ranges {
			if err := journalLine(f, fmt.Sprintf("w %d %d", r.Offset/restoreUnit, (r.End()-1)/restoreUnit)); err != nil {
				return err
			}
			j.lines++
		}
		return nil
	}
	if err := done(j.safe); err != nil {
		return err
	}
	if j.lines > 0 {
		if err := journalLine(f, fmt.Sprintf("s %d", j.lines)); err != nil {
			return err
		}
	}
	if err := done(subtractRanges(j.old, j.safe)); err != nil {
		return err
	}
	return f.Sync()
}

func journalLine(w io.Writer, body string) error {
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

// removeJournal removes the journal of a restore that has ended, or that a restore by
// comparing supersedes.
func removeJournal(path string) error {
	if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("remove restore journal: %w", err)
	}
	return nil
}
