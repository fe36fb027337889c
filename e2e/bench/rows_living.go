package main

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"time"

	"github.com/klauspost/compress/zstd"
)

const (
	livingBytes  = 1 << 30
	livingPoints = 20
	// livingScale is pgbench's: 100,000 accounts each, of about 130 bytes.
	livingScale = 30
	// livingTransactions is how many there are between two points. Each changes one row of
	// all accounts, at random, and appends to a table and to the log.
	livingTransactions = 2000
)

// living is a PostgreSQL server whose data is in a file system in an image.
type living struct {
	b                        *bench
	dir, image, mnt, sockets string
	bin                      string

	points int
	state  string // the image as in the previous point
}

// livingRows store increments of a busy database, by exact lists of the changed pages.
func livingRows(b *bench) ([]result, error) {
	l, err := b.newLiving()
	if err != nil {
		return nil, err
	}
	out, err := l.rows()
	return out, errors.Join(err, l.stop())
}

func (b *bench) newLiving() (*living, error) {
	bins, err := filepath.Glob("/usr/lib/postgresql/*/bin/initdb")
	if err != nil || len(bins) == 0 {
		return nil, errors.New("needs PostgreSQL, Debian package postgresql")
	}
	dir, err := os.MkdirTemp(b.cfg.dir, "living-*")
	if err != nil {
		return nil, err
	}
	l := &living{b: b, dir: dir, image: filepath.Join(dir, "disk.img"), mnt: filepath.Join(dir, "mnt"),
		state: filepath.Join(dir, "state.img"), bin: filepath.Dir(bins[len(bins)-1])}
	if l.sockets, err = os.MkdirTemp("", "varve-pg-"); err != nil { // short: a socket's path has 107 bytes at most
		return nil, err
	}
	for d := dir; d != os.TempDir() && d != "/" && d != "/tmp"; d = filepath.Dir(d) { // the user postgres must get there
		if err := os.Chmod(d, 0o755); err != nil {
			return nil, err
		}
	}
	if err := errors.Join(os.Chmod(l.sockets, 0o777), os.Mkdir(l.mnt, 0o755), sparse(l.image, livingBytes)); err != nil {
		return nil, err
	}
	if err := sh("mkfs.ext4", "-q", "-F", "-b", fmt.Sprint(pageBytes), l.image); err != nil {
		return nil, err
	}
	if err := sh("mount", "-o", "loop,noatime", l.image, l.mnt); err != nil {
		return nil, err
	}
	data := filepath.Join(l.mnt, "data")
	if err := sh("install", "-d", "-o", "postgres", "-m", "0700", data); err != nil {
		return l, errors.Join(err, l.stop())
	}
	for _, args := range [][]string{
		{"initdb", "-D", data, "--auth=trust", "-E", "UTF8", "--locale=C", "--no-sync"},
		{"pg_ctl", "-D", data, "-w", "-t", "120", "-l", filepath.Join(l.sockets, "log"),
			"-o", "-c listen_addresses='' -c unix_socket_directories=" + l.sockets + " -c max_wal_size=128MB -c min_wal_size=64MB -c autovacuum=on", "start"},
		{"pgbench", "-h", l.sockets, "-i", "-q", "-s", fmt.Sprint(livingScale), "postgres"},
	} {
		if err := l.postgres(args[0], args[1:]...); err != nil {
			return nil, errors.Join(err, l.stop())
		}
	}
	return l, nil
}

// postgres runs a program of PostgreSQL as its user.
func (l *living) postgres(name string, args ...string) error {
	return sh("setpriv", append([]string{"--reuid=postgres", "--regid=postgres", "--clear-groups", filepath.Join(l.bin, name)}, args...)...)
}

func (l *living) stop() error {
	_ = l.postgres("pg_ctl", "-D", filepath.Join(l.mnt, "data"), "-w", "-m", "immediate", "stop") // it may not have started
	var err error
	for range 50 { // its last process may still be running
		if err = sh("umount", l.mnt); err == nil {
			break
		}
		time.Sleep(100 * time.Millisecond)
	}
	return errors.Join(err, os.RemoveAll(l.sockets))
}

// work lets the database work, and makes an image of its disk as it is then, frozen.
func (l *living) work(image string) error {
	if l.points > 0 {
		if err := l.postgres("pgbench", "-h", l.sockets, "-n", "-c", "4", "-t", fmt.Sprint(livingTransactions/4), "postgres"); err != nil {
			return err
		}
	}
	l.points++
	if err := l.postgres("psql", "-h", l.sockets, "-d", "postgres", "-qc", "checkpoint"); err != nil {
		return err
	}
	if err := sh("fsfreeze", "-f", l.mnt); err != nil {
		return err
	}
	err := sh("cp", "--sparse=always", l.image, image)
	return errors.Join(err, sh("fsfreeze", "-u", l.mnt))
}

// list lists the pages of two images that differ, and also returns them.
func (l *living) list(old, now, list string, point int) (pages []byte, err error) {
	f, err := os.Open(now)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	var text bytes.Buffer
	enc := json.NewEncoder(&text)
	head := map[string]any{"format": "varve-extents/1", "base": nil, "target": fmt.Sprint("state-", point), "size": livingBytes}
	if old == "" {
		err = errors.Join(enc.Encode(head), enc.Encode(map[string]int64{"offset": 0, "length": livingBytes}), enc.Encode(map[string]any{"end": true, "count": 1}))
		return nil, errors.Join(err, os.WriteFile(list, text.Bytes(), 0o600))
	}
	g, err := os.Open(old)
	if err != nil {
		return nil, err
	}
	defer g.Close()
	head["base"] = fmt.Sprint("state-", point-1)
	if err := enc.Encode(head); err != nil {
		return nil, err
	}
	const chunk = 4 << 20
	p, q := make([]byte, chunk), make([]byte, chunk)
	count := 0
	for off := int64(0); off < livingBytes; off += chunk {
		if _, err := io.ReadFull(g, p); err != nil {
			return nil, err
		}
		if _, err := io.ReadFull(f, q); err != nil {
			return nil, err
		}
		for i := 0; i < chunk; i += pageBytes {
			if !bytes.Equal(p[i:i+pageBytes], q[i:i+pageBytes]) {
				count++
				pages = append(pages, q[i:i+pageBytes]...)
				if err := enc.Encode(map[string]int64{"offset": off + int64(i), "length": pageBytes}); err != nil {
					return nil, err
				}
			}
		}
	}
	if err := enc.Encode(map[string]any{"end": true, "count": count}); err != nil {
		return nil, err
	}
	return pages, os.WriteFile(list, text.Bytes(), 0o600)
}

func (l *living) rows() ([]result, error) {
	s, err := l.b.newPair("FIXED-1M")
	if err != nil {
		return nil, err
	}
	defer s.remove()
	enc, err := zstd.NewWriter(nil, zstd.WithEncoderLevel(zstd.SpeedFastest))
	if err != nil {
		return nil, err
	}
	now, list := filepath.Join(l.dir, "now.img"), filepath.Join(l.dir, "extents.jsonl")
	var ours, peer, changed, packed int64
	for i := range livingPoints + 1 {
		if err := l.work(now); err != nil {
			return nil, err
		}
		old := l.state
		if i == 0 {
			old = ""
		}
		pages, err := l.list(old, now, list, i)
		if err != nil {
			return nil, err
		}
		a, err := grown(s.varve, func() error { _, err := s.save(now, "--extents", list); return err })
		if err != nil {
			return nil, err
		}
		p, err := grown(s.stock, func() error { _, err := s.kopiaSave(now); return err })
		if err != nil {
			return nil, err
		}
		if i > 0 {
			ours, peer, changed = ours+a, peer+p, changed+int64(len(pages))
			packed += int64(len(enc.EncodeAll(pages, nil)))
		}
		fmt.Fprintf(os.Stderr, "   point %d: %s changed, stored %s, flat %s\n", i, megabytes(int64(len(pages))), megabytes(a), megabytes(p))
		if err := os.Rename(now, l.state); err != nil {
			return nil, err
		}
	}
	if err := l.readBack(s); err != nil {
		return nil, err
	}
	work := fmt.Sprintf("bytes stored by %d increments of a living database of %d MB (pgbench, %d transactions each, exact extents, %s changed)",
		livingPoints, livingScale*15, livingTransactions, megabytes(changed))
	line := func(peerName string, theirs int64, g goal, why string) result {
		x := float64(ours) / float64(theirs)
		return result{work: work, varve: megabytes(ours), peerName: peerName, peer: megabytes(theirs), ratio: fmt.Sprintf("%.2f x", x), goal: g, reached: g.reached(x), why: why}
	}
	const why = "the database changes rows at random, so that nearly each changed page lies in another block, and the block is stored"
	return []result{
		line("flat table of 1 MiB blocks", peer, atMost(0.25, "<= 0.25 x"), why),
		line("the changed pages alone, compressed at once", packed, atMost(2, "<= 2 x"), why),
	}, nil
}

// readBack compares the latest point with its disk.
func (l *living) readBack(s *site) error {
	target := filepath.Join(l.dir, "restored.img")
	if _, err := l.b.varve(s.conf, "restore", latest, target); err != nil {
		return err
	}
	if out, err := exec.Command("cmp", l.state, target).CombinedOutput(); err != nil {
		return fmt.Errorf("the latest point reads back different: %w: %s", err, out)
	}
	return os.Remove(target)
}
