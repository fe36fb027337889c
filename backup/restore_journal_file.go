package backup

import (
	"bufio"
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"io/fs"
	"os"
	"path/filepath"
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
	j.old = readUnits(rest, head.Boot == want.Boot && want.Boot != "")
	return true, nil
}

// readUnits returns the ranges that a journal lists as done.
func readUnits(lines []byte, sameBoot bool) []blocktree.Range {
	var all []blocktree.Range
	durable := 0
	sc := bufio.NewScanner(bytes.NewReader(lines))
	for sc.Scan() {
		body, ok := checkLine(sc.Text())
		if !ok {
			break
		}
		var a, b int64
		if n, err := fmt.Sscanf(body, "w %d %d", &a, &b); n == 2 && err == nil && a >= 0 && b >= a && b < 1<<38 {
			all = append(all, blocktree.Range{Offset: a * restoreUnit, Length: (b - a + 1) * restoreUnit})
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
	for _, r := range j.old {
		if err := j.line(f, fmt.Sprintf("w %d %d", r.Offset/restoreUnit, (r.End()-1)/restoreUnit)); err != nil {
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

// removeJournal removes the journal of a restore that has ended, or that a restore by
// comparing supersedes.
func removeJournal(path string) error {
	if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("remove restore journal: %w", err)
	}
	return nil
}
