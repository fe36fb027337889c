package main

import (
	"os"
	"path/filepath"
)

func restoreRows(b *bench) ([]result, error) {
	s, err := b.newPair("")
	if err != nil {
		return nil, err
	}
	defer s.remove()
	full, err := b.fullList()
	if err != nil {
		return nil, err
	}
	if _, err := s.save(b.disk, "--extents", full); err != nil {
		return nil, err
	}
	if _, err := s.save(b.changed, "--extents", b.extents); err != nil {
		return nil, err
	}
	if _, err := s.kopiaSave(b.changed); err != nil {
		return nil, err
	}
	root, err := s.kopiaRoot()
	if err != nil {
		return nil, err
	}
	r := &restoreBench{site: s, target: filepath.Join(s.dir, "target.img"), where: "a file",
		why: "both sides wait for the same disk, which the row against dd shows, and for CPUs shared with other work: the sync of what Kopia left in the page cache is counted"}
	out, err := r.fulls(root)
	if err != nil {
		return nil, err
	}
	more, err := r.deltas()
	if err != nil {
		return nil, err
	}
	out = append(out, more...)
	memory, err := os.MkdirTemp("/dev/shm", "varve-bench-*")
	if err != nil {
		return nil, err
	}
	defer os.RemoveAll(memory)
	r = &restoreBench{site: s, target: filepath.Join(memory, "target.img"), where: "a file in memory (tmpfs)",
		why: "decoding takes all CPUs, and the kernel clears and fills each page"}
	more, err = r.fulls(root)
	return append(out, more...), err
}

type restoreBench struct {
	*site
	target, where string
	why           string // if a goal is missed
}

func (r *restoreBench) clean() {
	_ = os.Remove(r.target)
	settle()
}

func (r *restoreBench) ours() (sample, error) {
	r.clean()
	run, err := r.b.varve(r.conf, "restore", latest, r.target)
	return synced(run, err, r.target)
}

// fulls compares restores of the whole disk to a fresh file.
func (r *restoreBench) fulls(root string) ([]result, error) {
	stock := func(args ...string) func() (sample, error) {
		return func() (sample, error) {
			r.clean()
			run, err := r.b.kopia(r.stockConf, append([]string{"snapshot", "restore", root, r.target}, args...)...)
			return synced(run, err, r.target)
		}
	}
	dd := func() (sample, error) {
		r.clean()
		run, err := r.b.exec("dd", "if="+r.b.changed, "of="+r.target, "bs=4M", "conv=sparse", "status=none")
		return synced(run, err, r.target)
	}
	var out []result
	for _, peer := range []struct {
		name string
		goal goal
		why  string
		run  func() (sample, error)
	}{
		{"kopia snapshot restore", atLeast(4, ">= 4 x"), r.why, stock()},
		{"kopia snapshot restore, sparse", atLeast(3, ">= 3 x"), r.why, stock("--write-sparse-files")},
		{"dd of the same bytes from the page cache, sparse", atLeast(0.7, ">= 0.7 x its rate when the CPU allows"),
			"decryption and decompression take more CPU than the machine had free", dd},
	} {
		a, p, err := r.b.pair(r.ours, peer.run)
		if err != nil {
			return nil, err
		}
		out = append(out, faster("full restore to "+r.where, peer.name, peer.goal, peer.why, a, p))
	}
	return out, nil
}

// deltas restore over a file that holds the older point.
func (r *restoreBench) deltas() ([]result, error) {
	var out []result
	for _, delta := range []struct {
		work string
		goal goal
		why  string
		args []string
	}{
		{"delta restore with a known base, 1 % different", atLeast(15, ">= 15 x"),
			"a changed page costs decoding and writing its block of 128 KiB, and opening the repository and writing two leases is a floor", []string{"--delta", "--base", "bench/disk@latest~1"}},
		{"delta restore by comparing", atLeast(2, ">= 2 x"),
			"it reads and hashes all of the target, which takes as long as writing it where the disk is fast and the CPUs are busy", []string{"--delta"}},
	} {
		run := func() (sample, error) {
			r.clean()
			if err := sh("cp", "--sparse=always", r.b.disk, r.target); err != nil {
				return sample{}, err
			}
			settle()
			run, err := r.b.varve(r.conf, append([]string{"restore", latest, r.target}, delta.args...)...)
			return synced(run, err, r.target)
		}
		a, p, err := r.b.pair(run, r.ours)
		if err != nil {
			return nil, err
		}
		out = append(out, faster(delta.work, "varve full restore", delta.goal, delta.why, a, p))
	}
	return out, nil
}
