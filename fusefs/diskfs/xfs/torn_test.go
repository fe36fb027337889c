package xfs

import (
	"fmt"
	"testing"

	"github.com/varve-io/varve/fusefs/diskfs"
	"github.com/varve-io/varve/fusefs/diskfs/diskfstest"
)

// TestReplayTorn damages records among the last, which can have been in flight when
// power failed, and compares with what the kernel makes of it.
func TestReplayTorn(t *testing.T) {
	requireKernel(t)
	img := crashed(t, true, []string{"--unsupported", "-l", "size=10m"}, nil, func(dir string) {
		p := newFiller(t, dir, 31)
		for round := range 30 {
			workload(p, 40)
			if round%3 == 0 {
				p.many("many", 100+round*10, 20)
			}
			syncfs(t, dir)
		}
	})
	f, err := openImage(t, img, diskfs.Options{Stale: true})
	if err != nil {
		t.Fatal(err)
	}
	l, err := f.newLogRing()
	if err != nil {
		t.Fatal(err)
	}
	ends, err := l.findEnds()
	if err != nil {
		t.Fatal(err)
	}
	var last []record // newest first
	for head := ends.head; len(last) < 10; {
		r, ok, err := l.lastRecord(head, l.n)
		if err != nil || !ok {
			t.Fatal(ok, err)
		}
		last, head = append(last, r), r.blk
	}
	stale := func(b []byte) { // as if these sectors had not been written
		for at := 0; at < len(b); at += sector {
			clear(b[at : at+sector])
		}
	}
	flip := func(b []byte) { b[len(b)/2] ^= 0x40 }
	states := map[string]bool{}
	for _, c := range []struct {
		name   string
		record int // from the end
		from   int // sector in the record
		n      int // sectors; 0: to its end
		damage func([]byte)
	}{
		{"last record flipped", 0, 1, 1, flip},
		{"last record unwritten", 0, 0, 0, stale},
		{"end of the last record unwritten", 0, 1, 0, stale},
		{"header of the last record unwritten", 0, 0, 1, stale},
		{"third flipped", 2, 1, 1, flip},
		{"third unwritten", 2, 0, 0, stale},
		{"end of the third unwritten", 2, 1, 0, stale},
		{"header of the second flipped", 1, 0, 1, flip},
		{"eighth flipped", 7, 1, 1, flip},
	} {
		t.Run(c.name, func(t *testing.T) {
			r := last[c.record]
			n := c.n
			if n == 0 {
				n = r.sectors() - c.from
			}
			torn := diskfstest.CopyImage(t, img)
			patchImage(t, torn, l.start+int64(r.blk+c.from)*sector, n*sector, c.damage)
			states[fmt.Sprint(imageTree(t, checkReplay(t, torn)))] = true
		})
	}
	if len(states) < 3 {
		t.Errorf("%d states in all; the damage made no difference", len(states))
	}
}
