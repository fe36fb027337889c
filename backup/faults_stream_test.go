package backup

import (
	"bytes"
	"testing"
	"time"

	"github.com/varve-io/varve/backup/blocktree"
	"github.com/varve-io/varve/backup/points"
	"github.com/varve-io/varve/backup/repository/repotest"
)

// TestStreamWithFailingStorage makes each operation of storage fail while a stream is stored. The run
// fails or makes a right point, older ones do not change, and the same process makes the next one.
func TestStreamWithFailingStorage(t *testing.T) {
	for _, op := range allOps {
		t.Run(string(op), func(t *testing.T) {
			t.Parallel()
			s := newFaultSite(t)
			made, tried := map[string][]byte{}, [][]byte{}
			data := randomBytes(s.rng, 3<<20)
			try := func() error {
				data = bytes.Clone(data)
				copy(data[s.rng.IntN(2<<20):], randomBytes(s.rng, 200_000))
				p, _, err := RunStream(t.Context(), s.faulty, StreamOptions{Volume: dumpVolume, Reader: bytes.NewReader(data), CheckpointEvery: time.Nanosecond})
				if err != nil {
					tried = append(tried, data)
					return err
				}
				made[p.ID] = data
				return nil
			}
			s.look = func() {
				t.Helper()
				pts := mustList(t, s.clean).Of(dumpVolume)
				for _, p := range pts {
					got := streamed(t, s.clean, p)
					want, known := made[p.ID]
					for _, data := range tried { // written just before the run failed
						if !known && bytes.Equal(got, data) {
							made[p.ID], want, known = data, data, true
						}
					}
					if !known || !bytes.Equal(got, want) {
						t.Errorf("%s is another stream (known: %v)", p.Name(), known)
					}
				}
				if len(pts) != len(made) {
					t.Errorf("%d points, want %d", len(pts), len(made))
				}
			}
			s.sweep(op, 8, try)
			if err := try(); err != nil {
				t.Errorf("after the faults: %v", err)
			}
			s.look()
			if _, err := Verify(t.Context(), s.clean, VerifyOptions{Read: 1}); err != nil {
				t.Error(err)
			}
		})
	}
}

// TestGroupWithFailingStorage makes each operation of storage fail while the points of a group are
// made. Those that were made are whole and returned with the error, and the group is complete only if all are
// there.
func TestGroupWithFailingStorage(t *testing.T) {
	for _, op := range allOps {
		t.Run(string(op), func(t *testing.T) {
			t.Parallel()
			s := newFaultSite(t)
			before := len(mustList(t, s.clean).Points())
			disks := map[string]map[string][]byte{} // by the group's ID and the volume
			var last *blocktree.Group
			var made []Made
			var failed error
			at := 0
			try := func() error {
				at++
				g, members := groupRun(t, groupDay.Add(time.Duration(at)*time.Hour), "a", "b")
				disks[g.ID] = map[string][]byte{}
				for _, opt := range members {
					disks[g.ID][opt.Volume.Name] = opt.Disk.(*memDisk).data
				}
				last = g
				made, failed = RunGroup(t.Context(), s.faulty, g, members)
				return failed
			}
			s.look = func() {
				t.Helper()
				cat := mustList(t, s.clean)
				have := map[string]*points.Point{}
				n := 0
				for _, p := range cat.Points() {
					if p.Group == nil {
						continue
					}
					n++
					if !bytes.Equal(readPoint(t, s.clean, p), disks[p.Group.ID][p.Volume.Name]) {
						t.Errorf("%s of group %s is another disk", p.Name(), p.Group.ID)
					}
					if p.Group.ID == last.ID {
						have[p.ID] = p
					}
				}
				if len(cat.Points()) != before+n {
					t.Errorf("%d points are of no group, want %d", len(cat.Points())-n, before)
				}
				for _, m := range made {
					if have[m.Point.ID] == nil {
						t.Errorf("%s was returned and is not there", m.Point.Name())
					}
				}
				if failed == nil && len(made) != 2 {
					t.Errorf("no error, and %d points", len(made))
				}
				for _, g := range cat.Groups().All() {
					if g.ID == last.ID && g.Complete() != (len(have) == 2) {
						t.Errorf("the group is complete: %v, with %d points", g.Complete(), len(have))
					}
				}
			}
			s.sweep(op, 8, try)
			if err := try(); err != nil {
				t.Errorf("after the faults: %v", err)
			}
			s.look()
			if op == repotest.Put {
				if _, err := Verify(t.Context(), s.clean, VerifyOptions{Read: 1}); err != nil {
					t.Error(err)
				}
			}
		})
	}
}
