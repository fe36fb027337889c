package backup

import (
	"bytes"
	"encoding/binary"
	"errors"
	"io"
	"math/rand/v2"
	"reflect"
	"strings"
	"testing"

	"github.com/varve-io/varve/backup/blocktree"
	"github.com/varve-io/varve/backup/cbt"
	"github.com/varve-io/varve/backup/points"
	"github.com/varve-io/varve/backup/repository"
)

// putExt4 makes bytes the beginning of an ext4 file system.
func putExt4(p []byte, uuid byte) []byte {
	sb := p[1024:2048]
	clear(sb)
	le := binary.LittleEndian
	for at, v := range map[int]uint32{0: 64, 4: 1024, 0x20: 8192, 0x28: 64, 0x4c: 1, 0x60: 0x40} {
		le.PutUint32(sb[at:], v)
	}
	le.PutUint16(sb[0x38:], 0xef53)
	for i := range 16 {
		sb[0x68+i] = uuid
	}
	return p
}

// partitioned makes a disk with an MBR and a partition of 1 MiB for each part.
func partitioned(id uint32, parts ...[]byte) []byte {
	disk := make([]byte, (len(parts)+1)<<20)
	le := binary.LittleEndian
	le.PutUint32(disk[440:], id)
	for i, part := range parts {
		entry := disk[446+16*i:]
		entry[4] = 0x83
		le.PutUint32(entry[8:], uint32(i+1)<<11)
		le.PutUint32(entry[12:], 1<<11)
		copy(disk[(i+1)<<20:], part)
	}
	disk[510], disk[511] = 0x55, 0xaa
	return disk
}

// hardDisk is a disk with a serial number.
type hardDisk struct {
	memDisk
	serial string
}

func (d *hardDisk) Serial() string { return d.serial }

func TestOtherDiskIsRefused(t *testing.T) {
	t.Parallel()
	r, _ := newRepo(t)
	const size = 2 << 20
	ext4 := func(n int, uuid byte) []byte { return putExt4(make([]byte, n), uuid) }
	noise := func(seed uint64, n int) []byte { return randomBytes(rand.New(rand.NewPCG(seed, 1)), n) }
	blank := make([]byte, size)
	on := func(serial string, data []byte) Disk { return &hardDisk{memDisk{data: data}, serial} }
	a, b, c := ext4(1<<20, 1), ext4(1<<20, 2), ext4(1<<20, 3)
	for _, tc := range []struct {
		name     string
		was, now Disk
		want     error
		note     string // part of one in the new point
	}{
		{"the same file system", on("", ext4(size, 1)), on("", ext4(size, 1)), nil, ""},
		{"another file system", on("", ext4(size, 1)), on("", ext4(size, 2)), ErrOtherDisk, ""},
		{"another one on the same hardware", on("x", ext4(size, 1)), on("x", ext4(size, 2)), ErrOtherDisk, ""},
		{"wiped", on("x", ext4(size, 1)), on("x", blank), ErrOtherDisk, ""},
		{"overwritten with noise", on("x", ext4(size, 1)), on("x", noise(1, size)), ErrOtherDisk, ""},
		{"smaller", on("", ext4(size, 1)), on("", ext4(1<<20, 1)), ErrShrunk, ""},
		{"empty", on("", ext4(size, 1)), on("", nil), ErrShrunk, ""},
		{"noise, smaller", on("", noise(1, size)), on("", noise(1, size-1)), ErrShrunk, ""},
		{"larger", on("", ext4(size, 1)), on("", ext4(2*size, 1)), nil, ""},
		{"nothing at all, then something", on("", nil), on("", ext4(size, 1)), nil, ""},
		{"the first file system", on("x", blank), on("x", ext4(size, 1)), nil, ""},
		{"the first data without a name", on("", blank), on("", noise(1, size)), nil, ""},
		{"data without a name, changed", on("x", noise(1, size)), on("x", noise(2, size)), nil, ""},
		{"data without a name, wiped", on("", noise(1, size)), on("", blank), ErrOtherDisk, ""},
		{"data without a name, formatted", on("", noise(1, size)), on("", ext4(size, 1)), ErrOtherDisk, ""},
		{"data without a name on other hardware", on("x", noise(1, size)), on("y", noise(1, size)), ErrOtherDisk, ""},
		{"copied to other hardware", on("x", ext4(size, 1)), on("y", ext4(size, 1)), nil, "serial"},
		{"one partition formatted anew", on("", partitioned(7, a, b)), on("", partitioned(7, a, c)), nil, "partition 2"},
		{"all partitions formatted anew", on("", partitioned(7, a, b)), on("", partitioned(7, c, c)), ErrOtherDisk, ""},
		{"another table around the file systems", on("", partitioned(7, a, b)), on("", partitioned(8, b)), ErrShrunk, ""},
		{"another table of the same size", on("", partitioned(7, a, b)), on("", partitioned(8, b, a)), nil, ""},
		{"the first file system on a table", on("", partitioned(7, make([]byte, 1<<20))), on("", partitioned(7, a)), nil, ""},
		{"another table without file systems", on("", partitioned(7, make([]byte, 1<<20))), on("", partitioned(8, make([]byte, 1<<20))), ErrOtherDisk, ""},
	} {
		v := points.Volume{Namespace: "disks", Name: strings.NewReplacer(" ", "-", ",", "").Replace(tc.name), Cluster: "test"}
		before, _ := mustBackup(t, r, Options{Volume: v, Disk: tc.was})
		for _, full := range []bool{false, true} {
			p, rec, err := Run(t.Context(), r, Options{Volume: v, Disk: tc.now, Full: full})
			if !errors.Is(err, tc.want) {
				t.Errorf("%s: %v, want %v", tc.name, err, tc.want)
			}
			if err != nil {
				if tc.want != nil && !strings.Contains(err.Error(), "--new-disk") {
					t.Errorf("%s: the error says no way on: %v", tc.name, err)
				}
				if latest := mustList(t, r).Latest(v); latest.ID != before.ID {
					t.Errorf("%s: refused, and a point was made", tc.name)
				}
				continue
			}
			if p.Lineage != "" {
				t.Errorf("%s: the point is of lineage %s", tc.name, p.Lineage)
			}
			if notes := strings.Join(rec.Notes, "\n"); tc.note != "" && !full && !strings.Contains(notes, tc.note) {
				t.Errorf("%s: notes %q, want one with %q", tc.name, notes, tc.note)
			}
		}
	}
}

func TestAllowShrink(t *testing.T) {
	t.Parallel()
	r, _ := newRepo(t)
	data := putExt4(make([]byte, 2<<20), 1)
	mustBackup(t, r, Options{Volume: testVolume, Disk: &memDisk{data: data}})
	p, _ := mustBackup(t, r, Options{Volume: testVolume, Disk: &memDisk{data: data[:1<<20]}, AllowShrink: true})
	if p.Lineage != "" || p.Size != 1<<20 {
		t.Errorf("the smaller disk's point: %+v", p)
	}
	mustBackup(t, r, Options{Volume: testVolume, Disk: &memDisk{data: data[:1<<20]}})
	// A smaller disk may be meant, but an empty one is another.
	if _, _, err := Run(t.Context(), r, Options{Volume: testVolume, Disk: &memDisk{}, AllowShrink: true}); !errors.Is(err, ErrOtherDisk) {
		t.Errorf("an empty disk: %v", err)
	}
}

func TestLineages(t *testing.T) {
	t.Parallel()
	r, _ := newRepo(t)
	rng := rand.New(rand.NewPCG(5, 5))
	first, second := putExt4(randomBytes(rng, 3<<20), 1), putExt4(randomBytes(rng, 2<<20), 2)
	change := func(data []byte) Disk { data[len(data)-1]++; return &memDisk{data: bytes.Clone(data)} }
	run := func(opt Options) *points.Point {
		t.Helper()
		opt.Volume = testVolume
		p, _ := mustBackup(t, r, opt)
		return p
	}
	a1 := run(Options{Disk: change(first)})
	a2 := run(Options{Disk: change(first)})
	// The list of changes is of the other disk; it must not be used.
	b1 := run(Options{Disk: change(second), OtherDisk: NewDisk, Source: failingSource{}})
	if b1.Lineage != b1.ID || b1.Parent != a2.ID || b1.Generation != 3 {
		t.Fatalf("the new disk's point: %+v", b1)
	}
	if rec, err := points.LoadRecord(t.Context(), r, b1); err != nil || rec.LineageReason == "" || rec.Lineage != b1.ID {
		t.Errorf("its record: %+v, %v", rec, err)
	}
	checkPoint(t, r, b1, second)
	b2 := run(Options{Disk: change(second)})
	if b2.Lineage != b1.ID || b2.Parent != b1.ID {
		t.Errorf("the new disk's second point: %+v", b2)
	}
	if _, _, err := Run(t.Context(), r, Options{Volume: testVolume, Disk: &memDisk{data: first}}); !errors.Is(err, ErrOtherDisk) {
		t.Errorf("the first disk came back: %v", err)
	}
	a3 := run(Options{Disk: change(first), OtherDisk: BeginLineage})
	if a3.Lineage != "" || a3.Parent != a2.ID || a3.Generation != 5 {
		t.Errorf("the first disk's point when it came back: %+v", a3)
	}
	checkPoint(t, r, a3, first)

	plan, err := Prune(t.Context(), r, PruneOptions{Policy: Policy{Latest: 1}, Cluster: "test"})
	if err != nil {
		t.Fatal(err)
	}
	left := func() (ids []string) {
		for _, p := range mustList(t, r).Of(testVolume) {
			ids = append(ids, p.ID)
		}
		return ids
	}
	if got := left(); !reflect.DeepEqual(got, []string{b2.ID, a3.ID}) {
		t.Errorf("%d removed (%s among them), left %v", len(plan.Removed()), a1.ID, got)
	}
	if _, err := Prune(t.Context(), r, PruneOptions{Policy: Policy{Latest: 1, MergeLineages: true}, Cluster: "test"}); err != nil {
		t.Fatal(err)
	}
	if got := left(); !reflect.DeepEqual(got, []string{a3.ID}) {
		t.Errorf("all counted together: left %v", got)
	}
}

// failingSource fails each call.
type failingSource struct{ cbt.Source }

// checkPoint compares what a point holds.
func checkPoint(t *testing.T, r *repository.Repository, p *points.Point, want []byte) {
	t.Helper()
	var got bytes.Buffer
	if _, err := RestoreTo(t.Context(), r, p, &got, RestoreOptions{}); err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(got.Bytes(), want) {
		t.Errorf("%s holds %d bytes that are not the disk's", p.Name(), got.Len())
	}
}

// The identity of a point of an older Varve is read from its disk.
func TestIdentityOfOlderPoints(t *testing.T) {
	t.Parallel()
	r, _ := newRepo(t)
	a, b := putExt4(make([]byte, 1<<20), 1), putExt4(make([]byte, 1<<20), 2)
	p, rec := mustBackup(t, r, Options{Volume: testVolume, Disk: &hardDisk{memDisk{data: partitioned(7, a, b)}, "x"}})
	if rec.Disk == nil || rec.Disk.Serial != "x" || rec.Disk.TableID != "mbr 00000007" || len(rec.Disk.Signatures) != 2 {
		t.Fatalf("identity %+v", rec.Disk)
	}
	older := *rec
	older.Disk = nil
	id, err := identityOf(t.Context(), r, p, &older)
	if err != nil {
		t.Fatal(err)
	}
	want := *rec.Disk
	want.Serial = ""
	if !reflect.DeepEqual(*id, want) {
		t.Errorf("identity %+v, want %+v", *id, want)
	}
}

// A disk whose identity cannot be read does not count as another.
func TestIdentityThatCannotBeRead(t *testing.T) {
	t.Parallel()
	r, _ := newRepo(t)
	data := putExt4(make([]byte, 2<<20), 1)
	_, rec := mustBackup(t, r, Options{Volume: testVolume, Disk: &memDisk{data: data}})
	_, again := mustBackup(t, r, Options{Volume: testVolume, Disk: &badDisk{memDisk{data: data}, []blocktree.Range{{Length: 4096}}}, OnReadError: ZeroOnReadError})
	if !reflect.DeepEqual(rec.Disk, again.Disk) || again.Disk == nil {
		t.Errorf("identity %+v, want that of the point before, %+v", again.Disk, rec.Disk)
	}
}

var _ io.ReaderAt = (*hardDisk)(nil)
