package source_test

import (
	"bytes"
	"fmt"
	"math/rand/v2"
	"os"
	"slices"
	"strings"
	"testing"

	"github.com/varve-io/varve/backup/cbt"
	"github.com/varve-io/varve/backup/cbt/cbttest"
	"github.com/varve-io/varve/backup/source"
	"github.com/varve-io/varve/backup/source/cephtest"
)

// TestRBDOfCeph has snapshots in a real Ceph cluster.
func TestRBDOfCeph(t *testing.T) {
	t.Parallel()
	c := cephtest.Start(t)
	conf := os.Getenv("CEPH_CONF")
	_ = os.Remove(conf) // of a process of the same number that was killed
	if err := os.Symlink(c.Conf, conf); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.Remove(conf) })
	t.Run("increments", func(t *testing.T) { rbdIncrements(t, c) })
	t.Run("conforms", func(t *testing.T) { rbdConforms(t, c) })
}

// rbdIncrements backs up an image while it is written, discarded, zeroed, resized and rolled back.
func rbdIncrements(t *testing.T, c *cephtest.Cluster) {
	seed := rand.Uint64()
	t.Logf("seed %d", seed)
	random := rand.New(rand.NewPCG(seed, 0))
	const object, most = 1 << 20, 24 << 20
	c.Run(t, "rbd", "create", "pool/vm", "--size", "16M", "--object-size", "1M", "--image-feature", "layering,exclusive-lock,object-map,fast-diff")
	size := int64(16 << 20)
	change := func() {
		var args []string
		for range 8 {
			off := random.Int64N(size/512) * 512
			n := min(size-off, (1+random.Int64N(2*object/512))*512)
			command := []string{"write -P %[3]d %[1]d %[2]d", "write -P %[3]d %[1]d %[2]d", "discard %[1]d %[2]d", "write -z %[1]d %[2]d"}[random.IntN(4)]
			if strings.HasPrefix(command, "write -P") {
				args = append(args, "-c", fmt.Sprintf(command, off, n, 1+random.IntN(255)))
			} else {
				args = append(args, "-c", fmt.Sprintf(command, off, n))
			}
		}
		c.Run(t, "qemu-io", append([]string{"-f", "raw", "rbd:pool/vm"}, args...)...)
	}
	resize := func(to int64) {
		size = to
		c.Run(t, "rbd", "resize", "--no-progress", "--allow-shrink", "--size", fmt.Sprintf("%dK", to>>10), "pool/vm")
	}
	var last *state
	for i, before := range []func(){
		change, change,
		func() { resize(most); change() },
		func() { resize(most/2 + 64<<10); resize(most); change() },
		func() { c.Run(t, "rbd", "snap", "rollback", "--no-progress", "pool/vm@s1"); size = 16 << 20; change() },
		func() {},
		func() { resize(5<<20 + 3<<10); change() },
	} {
		before()
		name := fmt.Sprintf("s%d", i)
		c.Run(t, "rbd", "snap", "create", "--no-progress", "pool/vm@"+name)
		want := c.Run(t, "rbd", "export", "--no-progress", "pool/vm@"+name, "-")
		change() // which is not of the snapshot
		now := take(t, "rbd://pool/vm@"+name, source.Options{}, last)
		if !bytes.Equal(now.bytes, want) {
			t.Fatalf("%s has other bytes, by %s", name, now.by)
		}
		if now.by != "rbd-diff" {
			t.Errorf("%s is by %s: %v", name, now.by, now.why)
		}
		last = now
	}
	// A name that was given again.
	c.Run(t, "rbd", "snap", "rm", "--no-progress", "pool/vm@s6")
	change()
	c.Run(t, "rbd", "snap", "create", "--no-progress", "pool/vm@s6")
	change()
	c.Run(t, "rbd", "snap", "create", "--no-progress", "pool/vm@s7")
	now := take(t, "rbd://pool/vm@s7", source.Options{}, last)
	if want := c.Run(t, "rbd", "export", "--no-progress", "pool/vm@s7", "-"); now.by == "rbd-diff" || !bytes.Equal(now.bytes, want) {
		t.Errorf("after another s6: by %s, or other bytes", now.by)
	}
}

// rbdConforms has the snapshots of images say what the rules of all sources ask for.
func rbdConforms(t *testing.T, c *cephtest.Cluster) {
	n := 0
	leftOut := notSaid()
	leftOut["DifferenceForFullRequest"] = "for a full rbd is asked for what is stored"
	cbttest.All(t, leftOut, func(t *testing.T, l cbttest.Listing) cbt.Source {
		n++
		name := fmt.Sprintf("pool/rule%d", n)
		// Objects of the size that the rules count in: a hole is an object that is gone.
		c.Run(t, "rbd", "create", name, "--size", fmt.Sprintf("%dB", l.Size), "--object-size", "4K")
		var base string
		if l.Base != "" {
			c.Run(t, "qemu-io", "-f", "raw", "-c", fmt.Sprintf("write -P 1 0 %d", l.Size), "rbd:"+name)
			c.Run(t, "rbd", "snap", "create", "--no-progress", name+"@base")
			base = take(t, "rbd://"+name+"@base", source.Options{}, nil).id
		}
		var args []string
		for _, e := range l.Extents {
			off, n := sectors(e)
			if e.Zero {
				args = append(args, "-c", fmt.Sprintf("discard %d %d", off, n))
			} else {
				args = append(args, "-c", fmt.Sprintf("write -P 2 %d %d", off, n))
			}
		}
		if len(args) > 0 {
			c.Run(t, "qemu-io", slices.Concat([]string{"-f", "raw", "rbd:" + name}, args)...)
		}
		c.Run(t, "rbd", "snap", "create", "--no-progress", name+"@target")
		s, err := source.Open(t.Context(), "rbd://"+name+"@target", source.Options{})
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() {
			if err := s.Close(); err != nil {
				t.Error(err)
			}
		})
		return renamed{s.Disks()[0].Changes[0], base, l}
	})
}
