package main

import (
	"bytes"
	"math/rand/v2"
	"os"
	"path/filepath"
	"syscall"
	"testing"
)

// TestSparseWriter compares the file with what was written, in pieces of any length, and
// checks that zeroes take no space.
func TestSparseWriter(t *testing.T) {
	rng := rand.New(rand.NewPCG(1, 2))
	for round := range 50 {
		want := make([]byte, rng.IntN(40*sparseUnit))
		for range rng.IntN(5) {
			at := rng.IntN(len(want) + 1)
			for i := range want[at:min(at+rng.IntN(2*sparseUnit), len(want))] {
				want[at+i] = byte(rng.Uint32())
			}
		}
		name := filepath.Join(t.TempDir(), "f")
		f, err := os.Create(name)
		if err != nil {
			t.Fatal(err)
		}
		w := &sparseWriter{file: f}
		for rest := want; len(rest) > 0; {
			n := 1 + rng.IntN(min(len(rest), 3*sparseUnit))
			if m, err := w.Write(rest[:n]); m != n || err != nil {
				t.Fatal(m, err)
			}
			rest = rest[n:]
		}
		if err := w.Finish(); err != nil {
			t.Fatal(err)
		}
		if err := f.Close(); err != nil {
			t.Fatal(err)
		}
		if got, err := os.ReadFile(name); err != nil || !bytes.Equal(got, want) {
			t.Fatalf("round %d: the file has %d bytes that differ from %d written: %v", round, len(got), len(want), err)
		}
	}

	name := filepath.Join(t.TempDir(), "zero")
	f, err := os.Create(name)
	if err != nil {
		t.Fatal(err)
	}
	w := &sparseWriter{file: f}
	if _, err := w.Write(make([]byte, 1<<20)); err != nil {
		t.Fatal(err)
	}
	if err := w.Finish(); err != nil {
		t.Fatal(err)
	}
	info, err := f.Stat()
	if err != nil || info.Size() != 1<<20 || info.Sys().(*syscall.Stat_t).Blocks != 0 {
		t.Errorf("a file of zeroes: %+v, %v", info, err)
	}
	if err := f.Close(); err != nil {
		t.Fatal(err)
	}
}

// A sparse disk is copied to a sparse file.
func TestNBDReadKeepsHoles(t *testing.T) {
	env, disk := newBackupEnv(t)
	want := append(contents(t, disk)[:64<<10], make([]byte, 8<<20)...)
	if err := os.WriteFile(disk, want, 0o600); err != nil {
		t.Fatal(err)
	}
	backupJSON(t, env, disk, "--volume", "shop/db")
	file := filepath.Join(env["HOME"], "copy")
	mustRun(t, env, "nbd", "read", startServer(t, env).uri(""), file)
	if !bytes.Equal(contents(t, file), want) {
		t.Error("the copy differs")
	}
	info, err := os.Stat(file)
	if err != nil {
		t.Fatal(err)
	}
	if used := info.Sys().(*syscall.Stat_t).Blocks * 512; used > 1<<20 {
		t.Errorf("64 KiB of data in a disk of 8 MiB take %d bytes", used)
	}
}
