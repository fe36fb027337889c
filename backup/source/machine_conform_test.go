package source_test

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/varve-io/varve/backup/cbt"
	"github.com/varve-io/varve/backup/cbt/cbttest"
	"github.com/varve-io/varve/backup/source"
)

// notSaid are the rules about listings that a QEMU is never made to give: its answers have neither
// offsets nor names of volumes. They are tried with the bitmaps of NBD exports (backup/nbddisk), by
// which those of images, of QMP and of libvirt are read.
func notSaid() map[string]string {
	never, sector := "a QEMU does not say it", "QEMU's disks have whole sectors"
	return map[string]string{
		"Duplicated": never, "Overlapping": never, "BehindTheEnd": never, "NegativeOffset": never, "NegativeLength": never, "EmptyExtent": never,
		"Overflowing": never, "Cut": never, "CutAtOnce": never, "CutBeforeTheEndMark": never, "WrongVolume": never,
		"BrokenAtOnce": never, "BrokenOften": never, "Straddling": never, "Repeating": never, "EndsEarly": never,
		"EndsEarlyAtOnce": never, "EndsEarlyThenBreaks": never, "SizeZero": never,
		"FixedLengthShortTail": sector, "Unaligned": sector, "WrongSizeLarger": sector, "Many": "QEMU's bits are of a sector at least",
	}
}

// fine has clusters of 4 KiB within a qcow2 of the usual layout: what the rules count in.
const fine = "extended_l2=on,cluster_size=128k"

// sectors widens an extent to whole sectors, which is all that a guest can write.
func sectors(e cbt.Extent) (off, length int64) {
	off = e.Offset / 512 * 512
	return off, (e.End()+511)/512*512 - off
}

// TestImageConforms has the bitmaps of image files say what the rules of all sources ask for.
func TestImageConforms(t *testing.T) {
	t.Parallel()
	cbttest.All(t, notSaid(), func(t *testing.T, l cbttest.Listing) cbt.Source {
		path := filepath.Join(t.TempDir(), "vm.qcow2")
		tool(t, "qemu-img", "create", "-q", "-f", "qcow2", "-o", fine, path, fmt.Sprint(l.Size))
		var before *state
		opt := source.Options{Owner: track.Owner}
		if l.Base != "" {
			write(t, path, fmt.Sprintf("write -P 1 0 %d", l.Size))
			before = take(t, path, track, nil)
			tool(t, "qemu-img", "bitmap", "--remove", path, before.id)
			tool(t, "qemu-img", "bitmap", "--add", "-g", "4096", path, before.id)
		} else {
			opt.Track = true
		}
		for _, e := range l.Extents {
			off, n := sectors(e)
			if e.Zero {
				write(t, path, fmt.Sprintf("write -z %d %d", off, n))
			} else {
				write(t, path, fmt.Sprintf("write -P 2 %d %d", off, n))
			}
		}
		s, err := source.Open(t.Context(), path, opt)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() {
			if err := s.Close(); err != nil {
				t.Error(err)
			}
		})
		changes := s.Disks()[0].Changes
		if l.Base == "" {
			return renamed{changes[1], "", l}
		}
		return renamed{changes[0], before.id, l}
	})
}

// libvirtConforms has the checkpoints of a real libvirt say what the rules of all sources ask for. One
// domain serves all rules: its first disk is made anew for each.
func libvirtConforms(t *testing.T, d *domain) {
	n := 0
	var last source.Session // a rule may open several, one after the other
	cbttest.All(t, notSaid(), func(t *testing.T, l cbttest.Listing) cbt.Source {
		if n++; last != nil {
			if err := last.Close(); err != nil {
				t.Error(err)
			}
		}
		d.recreate(t, l.Size)
		options := func(before machine) source.Options {
			opt := before.options(t.TempDir())
			opt.Owner, opt.Include = fmt.Sprintf("repo1234-rule%04d", n), []string{"vda"}
			return opt
		}
		before := machine{}
		if l.Base != "" {
			d.hmp(t, "vda", fmt.Sprintf("write -P 1 0 %d", l.Size))
			var err error
			if before, err = before.backup(t.Context(), d.uri(), options(before), nil, nil); err != nil {
				t.Fatal(err)
			}
			for _, c := range []string{
				`{"execute":"block-dirty-bitmap-remove","arguments":{"node":"%s","name":"%s"}}`,
				`{"execute":"block-dirty-bitmap-add","arguments":{"node":"%s","name":"%s","granularity":4096,"persistent":true}}`,
			} {
				if out := d.virsh(t, "qemu-monitor-command", d.name, fmt.Sprintf(c, d.top(t, "vda"), before["vda"].id)); strings.Contains(out, "error") {
					t.Fatal(out)
				}
			}
		}
		for _, e := range l.Extents {
			off, n := sectors(e)
			if e.Zero {
				d.hmp(t, "vda", fmt.Sprintf("write -z %d %d", off, n))
			} else {
				d.hmp(t, "vda", fmt.Sprintf("write -P 2 %d %d", off, n))
			}
		}
		s, err := source.Open(t.Context(), d.uri(), options(before))
		if err != nil {
			t.Fatal(err)
		}
		last = s
		t.Cleanup(func() {
			if err := s.Close(); err != nil {
				t.Error(err)
			}
		})
		changes := s.Disks()[0].Changes
		if l.Base == "" {
			return renamed{changes[1], "", l}
		}
		return renamed{changes[0], before["vda"].id, l}
	})
	d.virsh(t, "destroy", d.name)
}

// recreate starts the domain with a first disk that is new.
func (d *domain) recreate(t *testing.T, size int64) {
	t.Helper()
	if strings.TrimSpace(d.virsh(t, "domstate", d.name)) != "shut off" {
		d.virsh(t, "destroy", d.name)
	}
	for _, c := range strings.Fields(d.virsh(t, "checkpoint-list", d.name, "--name")) {
		d.virsh(t, "checkpoint-delete", d.name, c, "--metadata")
	}
	if err := os.Remove(d.path("vda")); err != nil {
		t.Fatal(err)
	}
	tool(t, "qemu-img", "create", "-q", "-f", "qcow2", "-o", fine, d.path("vda"), fmt.Sprint(size))
	d.start(t)
}
