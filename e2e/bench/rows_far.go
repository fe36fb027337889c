package main

import (
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"path"
	"path/filepath"
	"time"
)

// farBytes is the disk of the rows on S3, none of which compresses.
const farBytes = 96 << 20

// farSite is a repository of each program on a far S3 server.
type farSite struct {
	*site
	f     *far
	image string
	cache string // of both programs; removed before each cold run
	ours  string // configuration of stock Kopia for our repository

	states, pages int // of the disk with a list, and written
}

// farRows measure what each request to an object store costs.
func farRows(b *bench) ([]result, error) {
	f, err := b.startFar()
	if err != nil {
		return nil, err
	}
	s, err := b.newFarSite(f)
	var out []result
	for _, delay := range []time.Duration{30 * time.Millisecond, 5 * time.Millisecond} {
		if err == nil {
			var rows []result
			f.delay.Store(int64(delay))
			rows, err = s.rows(delay)
			out = append(out, rows...)
		}
	}
	return out, errors.Join(err, f.stop())
}

func (b *bench) newFarSite(f *far) (*farSite, error) {
	s, err := b.newFarSiteOf(f, farBytes)
	if err != nil {
		return nil, err
	}
	if _, err := s.listed(); err != nil {
		return nil, err
	}
	for _, c := range []struct{ do, conf, bucket, cache string }{
		{"create", s.stockConf, "kopia", s.cache + "-kopia"},
		{"connect", s.ours, "varve", s.cache + "-kopia-ours"},
	} {
		if _, err := b.kopia(c.conf, "repository", c.do, "s3", "--bucket="+c.bucket, "--endpoint="+f.address, "--region=us-east-1", "--disable-tls",
			"--access-key="+farKey, "--secret-access-key="+farSecret, "--cache-directory="+c.cache); err != nil {
			return nil, err
		}
	}
	_, err = b.kopia(s.stockConf, "snapshot", "create", s.image)
	return s, err
}

// newFarSiteOf makes a repository of ours, by arguments beside the usual ones, with a backup of a disk that does not
// compress.
func (b *bench) newFarSiteOf(f *far, size int64, args ...string) (*farSite, error) {
	dir, err := os.MkdirTemp(b.cfg.dir, "site-*")
	if err != nil {
		return nil, err
	}
	s := &farSite{
		site:  &site{b: b, dir: dir, conf: filepath.Join(dir, "varve.config"), stockConf: filepath.Join(dir, "kopia.config")},
		f:     f,
		image: filepath.Join(dir, "disk.img"), cache: filepath.Join(dir, "cache"), ours: filepath.Join(dir, "ours.config"),
	}
	for _, bucket := range []string{"varve", "kopia"} {
		if err := os.Mkdir(filepath.Join(f.dir, bucket), 0o700); err != nil {
			return nil, err
		}
	}
	noise, err := os.Create(s.image)
	if err != nil {
		return nil, err
	}
	_, err = io.CopyN(noise, rand.NewChaCha8([32]byte{15}), size)
	if err := errors.Join(err, noise.Close()); err != nil {
		return nil, err
	}
	secret := filepath.Join(dir, "secret")
	if err := os.WriteFile(secret, []byte(farSecret), 0o600); err != nil {
		return nil, err
	}
	if _, err := b.varve(s.conf, append([]string{"repo", "create", "s3", "--bucket", "varve", "--endpoint", f.address, "--region", "us-east-1", "--disable-tls",
		"--access-key-id", farKey, "--secret-access-key-file", secret, "--cache-directory", s.cache}, args...)...); err != nil {
		return nil, err
	}
	_, err = s.save(s.image)
	return s, err
}

// cold removes what both programs keep of the repository on this machine.
func (s *farSite) cold() {
	_ = os.RemoveAll(s.cache)
	_ = os.RemoveAll(s.cache + "-kopia")
	_ = os.RemoveAll(s.cache + "-kopia-ours")
}

// moved measures a command with nothing cached, and what it moved.
func (s *farSite) moved(t *traffic, do func() (sample, error)) func() (sample, error) {
	return func() (out sample, err error) {
		s.cold()
		settle()
		*t, err = s.f.count(func() (err error) { out, err = do(); return err })
		return out, err
	}
}

func (s *farSite) rows(delay time.Duration) ([]result, error) {
	at := fmt.Sprintf("S3 at %d ms a request, nothing cached: ", delay.Milliseconds())
	root, err := s.kopiaRoot()
	if err != nil {
		return nil, err
	}
	point, err := s.kopiaRootOf(s.ours, "/"+path.Base(volume))
	if err != nil {
		return nil, err
	}
	var out []result
	var ours, theirs traffic
	target := filepath.Join(s.dir, "restored")
	restore := s.moved(&ours, func() (sample, error) {
		_ = os.RemoveAll(target) // a folder, of Kopia
		return s.b.varve(s.conf, "restore", latest, target)
	})
	for _, peer := range []struct {
		name, conf, root string
		goal             goal
		why              string
	}{
		{"kopia snapshot restore of the same point", s.ours, point, atLeast(8, ">= 8 x"), "the nearer the store, the less its requests cost Kopia, while decoding takes the same"},
		{"kopia snapshot restore of its own snapshot, whose contents have about 4 MiB", s.stockConf, root, atLeast(1, ">= 1 x"),
			"each block of 128 KiB is a content of its own, which is decoded and kept in Kopia's disk cache by itself"},
	} {
		a, p, err := s.b.pair(restore, s.moved(&theirs, func() (sample, error) {
			_ = os.RemoveAll(target)
			return s.b.kopia(peer.conf, "snapshot", "restore", peer.root, target)
		}))
		if err != nil {
			return nil, err
		}
		_ = os.RemoveAll(target)
		out = append(out, faster(at+fmt.Sprintf("restore of %s that do not compress (%v)", megabytes(farBytes), ours), fmt.Sprintf("%s (%v)", peer.name, theirs), peer.goal, peer.why, a, p))
	}

	var serve traffic
	read, first, err := s.b.pair(s.moved(&serve, func() (sample, error) { return s.serveAnd("nbdcopy", "--connections=4", "URI", "null:") }), restore)
	if err != nil {
		return nil, err
	}
	out = append(out, slower(at+fmt.Sprintf("NBD sequential read of it, the server's start included (%v)", serve), "varve restore", atMost(1.2, "<= 1.2 x its time"), "a client asks for less ahead than a restore does", read, first))

	for _, one := range []struct {
		what  string
		most  float64
		reads int64
		do    func() (sample, error)
	}{
		{"NBD first byte of a process of its own", 0.6, 12, func() (sample, error) { return s.serveAnd("qemu-io", "-r", "-f", "raw", "-c", "read 1M 4k", "URI") }},
		{"list", 0.5, 10, func() (sample, error) { return s.b.varve(s.conf, "list", volume) }},
		{"increment of one block, by comparing", 1.5, 25, s.increment},
		{"increment of one block, by a list of extents", 1.5, 25, s.listed},
	} {
		var t traffic
		var all []sample
		for range s.b.cfg.runs {
			x, err := s.moved(&t, one.do)()
			if err != nil {
				return nil, err
			}
			all = append(all, x)
		}
		x := medianOf(all, wallOf)
		out = append(out, single(at+fmt.Sprintf("%s (%v)", one.what, t), seconds(x), x, atMost(one.most, fmt.Sprintf("<= %g s, <= %d reads", one.most, one.reads)),
			"the requests that need each other's answers follow one after the other"))
	}
	return out, nil
}

// serveAnd starts a server and runs a client of it; URI among its arguments is the
// server's.
func (s *farSite) serveAnd(client string, args ...string) (sample, error) {
	start := time.Now()
	c := &chain{site: s.site}
	n, err := c.serveVarve()
	if err != nil {
		return sample{}, err
	}
	for i := range args {
		if args[i] == "URI" {
			args[i] = n.uri
		}
	}
	err = sh(client, args...)
	out := sample{wall: time.Since(start)}
	return out, errors.Join(err, n.stop())
}

// increment changes one page and backs the disk up, by comparing.
func (s *farSite) increment() (sample, error) {
	if err := s.scribble(); err != nil {
		return sample{}, err
	}
	return s.save(s.image)
}

// listed backs the disk up by a list of extents: all of it at first, then the page that
// increment changes.
func (s *farSite) listed() (sample, error) {
	base, offset, length := "null", int64(0), int64(farBytes)
	if s.states > 0 {
		base, offset, length = fmt.Sprintf(`"state-%d"`, s.states), changedPage, pageBytes
	}
	s.states++
	if err := s.scribble(); err != nil {
		return sample{}, err
	}
	list := filepath.Join(s.dir, "extents.jsonl")
	text := fmt.Sprintf(`{"format":"varve-extents/1","base":%s,"target":"state-%d","size":%d}`+"\n"+
		`{"offset":%d,"length":%d}`+"\n"+`{"end":true,"count":1}`+"\n", base, s.states, int64(farBytes), offset, length)
	if err := os.WriteFile(list, []byte(text), 0o600); err != nil {
		return sample{}, err
	}
	return s.b.varve(s.conf, "backup", s.image, "--volume", volume+"-listed", "--extents", list)
}

// changedPage is where scribble writes.
const changedPage = 40 << 20

// scribble writes a page of other bytes to the disk.
func (s *farSite) scribble() error {
	f, err := os.OpenFile(s.image, os.O_RDWR, 0)
	if err != nil {
		return err
	}
	s.pages++
	p := make([]byte, pageBytes)
	noise := rand.NewChaCha8([32]byte{byte(s.pages), byte(s.pages >> 8), 1})
	_, _ = noise.Read(p)
	_, err = f.WriteAt(p, changedPage)
	return errors.Join(err, f.Close())
}
