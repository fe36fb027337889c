package backup

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"math/rand/v2"
	"os"
	"slices"
	"strconv"
	"testing"
	"time"

	"github.com/varve-io/varve/backup/blocktree"
	"github.com/varve-io/varve/backup/cbt"
	"github.com/varve-io/varve/backup/disk"
	"github.com/varve-io/varve/backup/image"
	"github.com/varve-io/varve/backup/repository"
)

// The model test plays random steps on a few volumes and a repository, and
// holds every recovery point against a plain copy of the bytes that the disk
// had. VARVE_MODEL_STEPS and VARVE_MODEL_SEED choose the run, VARVE_MODEL_WRITES how
// many times as often as else the disks are written between other steps: a long run
// is then about large changes rather than many points.

const pageSize = 4096

// pageDisk is a sparse disk in memory. Pages are never changed once shared, so
// a copy costs a map.
type pageDisk struct {
	size  int64
	pages map[int64][]byte
}

func (d *pageDisk) clone() *pageDisk { return &pageDisk{size: d.size, pages: maps.Clone(d.pages)} }

func (d *pageDisk) Size() int64      { return d.size }
func (d *pageDisk) CheckSize() error { return nil }

func (d *pageDisk) ReadAt(p []byte, off int64) (int, error) {
	if off >= d.size {
		return 0, io.EOF
	}
	n := int(min(int64(len(p)), d.size-off))
	for done := 0; done < n; {
		at := off + int64(done)
		within := at % pageSize
		k := min(n-done, int(pageSize-within))
		if page, ok := d.pages[at/pageSize]; ok {
			copy(p[done:done+k], page[within:])
		} else {
			clear(p[done : done+k])
		}
		done += k
	}
	if n < len(p) {
		return n, io.EOF
	}
	return n, nil
}

// write changes [off, off+len(p)).
func (d *pageDisk) write(p []byte, off int64) {
	for len(p) > 0 {
		page := make([]byte, pageSize)
		copy(page, d.pages[off/pageSize])
		k := copy(page[off%pageSize:], p)
		d.pages[off/pageSize] = page
		p, off = p[k:], off+int64(k)
	}
}

func (d *pageDisk) resize(size int64) {
	for n := range d.pages {
		switch {
		case n*pageSize >= size:
			delete(d.pages, n)
		case (n+1)*pageSize > size: // what is cut off must not come back by growing
			page := bytes.Clone(d.pages[n])
			clear(page[size-n*pageSize:])
			d.pages[n] = page
		}
	}
	d.size = size
}

// holeyDisk is a pageDisk, not to be written any more, that knows its holes.
type holeyDisk struct {
	*pageDisk
	data []int64 // pages that are there, sorted
}

func (d *pageDisk) holey() *holeyDisk {
	return &holeyDisk{d, slices.Sorted(maps.Keys(d.pages))}
}

func (d *holeyDisk) DataRange(off int64) (start, end int64, err error) {
	i, _ := slices.BinarySearch(d.data, off/pageSize)
	if off >= d.size || i == len(d.data) {
		return 0, 0, io.EOF
	}
	start, end = max(off, d.data[i]*pageSize), (d.data[i]+1)*pageSize
	for i++; i < len(d.data) && d.data[i]*pageSize == end; i++ {
		end += pageSize
	}
	return start, min(end, d.size), nil
}

// modelVolume is a volume under test.
type modelVolume struct {
	name   Volume
	disk   *pageDisk
	dirty  map[int64]bool // pages written since the latest point
	change int            // number of the latest change ID
	points map[string]*pageDisk
}

type model struct {
	t       *testing.T
	rng     *rand.Rand
	conf    string
	repo    *repository.Repository
	volumes []*modelVolume
	counts  map[string]int
	writes  int // how many times as often as else steps write, at least 1
}

// modelSteps are taken in each of the modelRuns of an ordinary run.
const (
	modelSteps = 1200
	modelRuns  = 2
)

func TestModel(t *testing.T) {
	steps, runs := modelSteps, modelRuns
	if testing.Short() {
		steps, runs = 300, 1
	}
	var seed uint64
	writes := 1
	number := func(name string, set func(n int)) {
		if s := os.Getenv(name); s != "" {
			n, err := strconv.Atoi(s)
			if err != nil || n < 1 {
				t.Fatalf("%s=%s is not a number above 0", name, s)
			}
			set(n)
		}
	}
	number("VARVE_MODEL_STEPS", func(n int) { steps, runs = n, 1 })
	number("VARVE_MODEL_WRITES", func(n int) { writes = n })
	if s := os.Getenv("VARVE_MODEL_SEED"); s != "" {
		n, err := strconv.ParseUint(s, 10, 64)
		if err != nil {
			t.Fatal(err)
		}
		seed, runs = n, 1
	}
	for i := range runs {
		t.Run(fmt.Sprint(i), func(t *testing.T) {
			t.Parallel()
			seed := seed
			if seed == 0 {
				seed = rand.Uint64()
			}
			runModel(t, steps, writes, seed)
		})
	}
}

// modelEra is how many steps a repository sees before a new one takes its place, if
// they write no more often than else: within an epoch of six hours Kopia merges no index blobs, and a run that writes
// thousands of them would soon do nothing but list them.
const modelEra = 4000

// runModel plays so many steps, each era with a seed one higher than the last, and
// says now and then how far it is: a long run takes hours.
func runModel(t *testing.T, steps, writes int, seed uint64) {
	started := time.Now()
	total, writing := weights(writes)
	_, once := weights(1)
	era := modelEra * total / (total - writing + once)
	for done := 0; done < steps && !t.Failed(); done += era {
		n := min(era, steps-done)
		t.Run(fmt.Sprintf("seed=%d,steps=%d", seed, n), func(t *testing.T) { playModel(t, n, writes, seed) })
		seed++
		rate := float64(done+n) / time.Since(started).Seconds()
		t.Logf("step %d of %d, %.0f a second, %s to go", done+n, steps, rate,
			time.Duration(float64(steps-done-n)/rate*float64(time.Second)).Round(time.Second))
	}
}

func playModel(t *testing.T, steps, writes int, seed uint64) {
	t.Logf("seed %d, %d steps, writes times %d (VARVE_MODEL_SEED, _STEPS, _WRITES)", seed, steps, writes)
	m := &model{t: t, rng: rand.New(rand.NewPCG(seed, 1)), counts: map[string]int{}, writes: writes}
	m.repo, m.conf = newRepo(t)
	for i := range 3 {
		v := &modelVolume{
			name: Volume{Namespace: "model", Name: fmt.Sprint("v", i), Cluster: "test"},
			disk: &pageDisk{size: int64(i+1) * 300_000, pages: map[int64][]byte{}}, dirty: map[int64]bool{},
			points: map[string]*pageDisk{},
		}
		if i == 2 { // around the end of a segment
			v.disk.size = blocktree.SegmentSize + 100_000
		}
		m.volumes = append(m.volumes, v)
	}
	for n := range steps {
		m.step()
		if t.Failed() {
			t.Logf("failed at step %d of seed %d", n, seed)
			return
		}
	}
	for _, v := range m.volumes {
		for id := range v.points {
			m.compare(v, id)
		}
	}
	t.Logf("%d steps of seed %d: %v", steps, seed, m.counts)
}

// modelKinds are the steps and how often each is taken; the first two write.
var modelKinds = []struct {
	weight int
	name   string
	do     func(*model, *modelVolume)
}{
	{60, "write", (*model).write},
	{10, "zero", (*model).zero},
	{3, "resize", (*model).resize},
	{4, "backup compare", func(m *model, v *modelVolume) { m.backup(v, nil, false) }},
	{1, "backup full", func(m *model, v *modelVolume) { m.backup(v, nil, true) }},
	{6, "backup exact", func(m *model, v *modelVolume) { m.backup(v, m.listing(v, 0), false) }},
	{3, "backup over-reported", func(m *model, v *modelVolume) { m.backup(v, m.listing(v, 20), false) }},
	{2, "lie", (*model).lie},
	{2, "crash", (*model).crash},
	{6, "read", (*model).read},
	{2, "delete", (*model).delete},
	{1, "prune", (*model).prune},
	{1, "maintain", (*model).maintain},
	{1, "reopen", (*model).reopen},
}

// modelWriting is how many of modelKinds write.
const modelWriting = 2

// weights returns the sum of all weights and of those that write.
func weights(writes int) (total, writing int) {
	for i, k := range modelKinds {
		if i < modelWriting {
			k.weight *= writes
			writing += k.weight
		}
		total += k.weight
	}
	return total, writing
}

func (m *model) step() {
	v := m.volumes[m.rng.IntN(len(m.volumes))]
	total, _ := weights(m.writes)
	n := m.rng.IntN(total)
	for i, k := range modelKinds {
		if i < modelWriting {
			k.weight *= m.writes
		}
		if n -= k.weight; n < 0 {
			m.counts[k.name]++
			k.do(m, v)
			return
		}
	}
}

// somewhere returns a range of at most limit bytes, often near an edge.
func (m *model) somewhere(v *modelVolume, limit int64) (off, length int64) {
	length = min(1+m.rng.Int64N(limit), v.disk.size)
	off = m.rng.Int64N(v.disk.size - length + 1)
	switch m.rng.IntN(8) {
	case 0:
		off = 0
	case 1:
		off = v.disk.size - length
	case 2:
		off = max(0, min(blocktree.SegmentSize-length/2, v.disk.size-length))
	}
	return off, length
}

func (m *model) touch(v *modelVolume, off, length int64) {
	for n := off / pageSize; n*pageSize < off+length; n++ {
		v.dirty[n] = true
	}
}

func (m *model) write(v *modelVolume) {
	off, length := m.somewhere(v, 20_000)
	p := make([]byte, length)
	for i := range p {
		p[i] = byte(m.rng.IntN(3)) // few values: blocks repeat
	}
	v.disk.write(p, off)
	m.touch(v, off, length)
	m.mark(v)
}

// mark keeps a disk from becoming blank, which a backup would refuse.
func (m *model) mark(v *modelVolume) {
	v.disk.write([]byte{1}, 0)
	m.touch(v, 0, 1)
}

func (m *model) zero(v *modelVolume) {
	off, length := m.somewhere(v, 200_000)
	v.disk.write(make([]byte, length), off)
	m.touch(v, off, length)
	m.mark(v)
}

func (m *model) resize(v *modelVolume) {
	size := max(1, v.disk.size+m.rng.Int64N(300_000)-150_000)
	v.disk.resize(size)
	m.mark(v)
}

// listing is what a tracker would say, with extra pages reported for nothing.
func (m *model) listing(v *modelVolume, extra int) cbt.Source {
	rep := cbt.Report{TargetChangeID: fmt.Sprint("change-", v.change+1)}
	latest := m.latest(v)
	if latest == nil {
		rep.Allocated = true
	} else {
		rep.BaseChangeID = latest.ChangeID
		if rep.BaseChangeID == "" {
			return nil // the parent was made without a change ID: compare
		}
	}
	pages := map[int64]bool{}
	for n := range v.dirty {
		pages[n] = true
	}
	if rep.Allocated {
		for n := range v.disk.pages {
			pages[n] = true
		}
	}
	for range extra {
		pages[m.rng.Int64N(v.disk.size/pageSize+1)] = true
	}
	var extents []cbt.Extent
	for n := range pages {
		off := n * pageSize
		if off >= v.disk.size {
			continue
		}
		length := min(pageSize, v.disk.size-off)
		page, ok := v.disk.pages[n]
		zero := !ok || disk.IsZero(page)
		extents = append(extents, cbt.Extent{Offset: off, Length: length, Zero: zero && m.rng.IntN(2) == 0})
	}
	m.rng.Shuffle(len(extents), func(i, j int) { extents[i], extents[j] = extents[j], extents[i] })
	return listSource{rep: rep, extents: extents}
}

func (m *model) options(v *modelVolume, src cbt.Source, full bool) Options {
	var d Disk = v.disk.clone()
	if m.rng.IntN(2) == 0 {
		d = v.disk.clone().holey()
	}
	return Options{
		Volume: v.name, Disk: d, Source: src, Full: full, AllowShrink: true, BlockSize: m.blockSize(v, full),
		VerifyUnchanged: []float64{0, 0.001, 1}[m.rng.IntN(3)], Workers: 1 + m.rng.IntN(4),
	}
}

func (m *model) blockSize(v *modelVolume, full bool) int64 {
	if full || len(v.points) == 0 {
		return blocktree.MinBlockSize << m.rng.IntN(3)
	}
	return 0
}

func (m *model) backup(v *modelVolume, src cbt.Source, full bool) {
	if full {
		src = nil
	}
	p, rec, err := Run(m.t.Context(), m.repo, m.options(v, src, full))
	if err != nil {
		m.t.Errorf("backup of %s: %v", v.name, err)
		return
	}
	v.points[p.ID] = v.disk.clone()
	v.dirty = map[int64]bool{}
	if rec.ChangeID != "" {
		v.change++
	}
	if m.rng.IntN(4) == 0 {
		m.compare(v, p.ID)
	}
}

// lie hides one changed page from the backup and has everything checked.
func (m *model) lie(v *modelVolume) {
	latest := m.latest(v)
	if latest == nil || latest.ChangeID == "" || latest.Size != v.disk.size {
		return
	}
	was := v.points[latest.ID]
	block := latest.BlockSize
	for n := range v.dirty {
		// The block of this page must differ, and no other page of it be told of.
		first := n * pageSize / block * block
		a, b := make([]byte, min(block, v.disk.size-first)), make([]byte, min(block, v.disk.size-first))
		if _, err := v.disk.ReadAt(a, first); err != nil {
			continue
		}
		if _, err := was.ReadAt(b, first); err != nil || bytes.Equal(a, b) {
			continue
		}
		src, ok := m.listing(v, 0).(listSource)
		if !ok {
			return
		}
		src.extents = slices.DeleteFunc(src.extents, func(e cbt.Extent) bool {
			return e.Offset < first+block && e.End() > first
		})
		opt := m.options(v, src, false)
		opt.VerifyUnchanged = 1
		if _, _, err := Run(m.t.Context(), m.repo, opt); !errors.Is(err, ErrSourceLied) {
			m.t.Errorf("a hidden change of %s at %d: %v", v.name, first, err)
		}
		return
	}
}

var errCrash = errors.New("crash")

// crash ends a backup at some step, by an error of the disk or by cancelling.
func (m *model) crash(v *modelVolume) {
	ctx, cancel := context.WithCancelCause(m.t.Context())
	defer cancel(nil)
	opt := m.options(v, nil, m.rng.IntN(3) == 0)
	left := 1 + m.rng.IntN(6)
	opt.step = func(string) {
		if left--; left == 0 {
			cancel(errCrash)
		}
	}
	p, _, err := Run(ctx, m.repo, opt)
	if err == nil { // it was too late to stop it
		v.points[p.ID] = v.disk.clone()
		v.dirty = map[int64]bool{}
		return
	}
	if !errors.Is(err, context.Canceled) && !errors.Is(err, errCrash) {
		m.t.Errorf("cancelled backup of %s: %v", v.name, err)
	}
}

func (m *model) catalog() *Catalog {
	if err := m.repo.Refresh(m.t.Context()); err != nil {
		m.t.Fatal(err)
	}
	cat, err := List(m.t.Context(), m.repo, ListOptions{})
	if err != nil {
		m.t.Fatal(err)
	}
	return cat
}

func (m *model) latest(v *modelVolume) *Point { return m.catalog().Latest(v.name) }

func (m *model) read(v *modelVolume) {
	for id := range v.points {
		m.compare(v, id)
		return
	}
}

// compare reads a point and holds it against the copy.
func (m *model) compare(v *modelVolume, id string) {
	ctx, want := m.t.Context(), v.points[id]
	p := m.catalog().ByID(id)
	if p == nil {
		m.t.Errorf("point %s of %s is gone", id, v.name)
		return
	}
	root, err := OpenRoot(ctx, m.repo, p)
	if err != nil {
		m.t.Error(err)
		return
	}
	cache := image.NewCache(16 << 20)
	defer cache.Close()
	img, err := image.Open(m.repo, cache, root, p.Generation)
	if err != nil {
		m.t.Error(err)
		return
	}
	if img.Size() != want.size {
		m.t.Errorf("%s has %d bytes, want %d", p.Name(), img.Size(), want.size)
		return
	}
	err = img.Extents(ctx, 0, img.Size(), func(e image.Extent) error {
		if e.Zero {
			for n := e.Offset / pageSize; n*pageSize < e.Offset+e.Length; n++ {
				page, ok := want.pages[n]
				from, to := max(n*pageSize, e.Offset), min((n+1)*pageSize, e.Offset+e.Length)
				if ok && !disk.IsZero(page[from-n*pageSize:to-n*pageSize]) {
					return fmt.Errorf("zero at %d, where there is data", from)
				}
			}
			return nil
		}
		got, is := make([]byte, e.Length), make([]byte, e.Length)
		if _, err := img.ReadAt(got, e.Offset); err != nil && !errors.Is(err, io.EOF) {
			return err
		}
		if _, err := want.ReadAt(is, e.Offset); err != nil && !errors.Is(err, io.EOF) {
			return err
		}
		if !bytes.Equal(got, is) {
			return fmt.Errorf("different bytes in [%d, %d)", e.Offset, e.Offset+e.Length)
		}
		return nil
	})
	if err != nil {
		m.t.Errorf("%s: %v", p.Name(), err)
	}
}

// delete forgets a point, any of them.
func (m *model) delete(v *modelVolume) {
	if len(v.points) < 3 {
		return
	}
	for id := range v.points {
		if _, err := Forget(m.t.Context(), m.repo, ForgetOptions{Names: []string{id}, Cluster: testVolume.Cluster}); err != nil {
			m.t.Errorf("forget %s: %v", id, err)
			return
		}
		delete(v.points, id)
		m.rebase(v)
		return
	}
}

// prune keeps the latest few and expects exactly those to stay.
func (m *model) prune(v *modelVolume) {
	if len(v.points) == 0 {
		return
	}
	keep := 2 + m.rng.IntN(4)
	_, err := Prune(m.t.Context(), m.repo, PruneOptions{
		Policy: Policy{Latest: keep}, Volumes: []Volume{v.name}, Cluster: v.name.Cluster,
	})
	if err != nil {
		m.t.Errorf("prune %s: %v", v.name, err)
		return
	}
	left := m.catalog().Of(v.name)
	if want := min(keep, len(v.points)); len(left) != want {
		m.t.Errorf("prune of %s to %d of %d left %d", v.name, keep, len(v.points), len(left))
		return
	}
	stays := map[string]*pageDisk{}
	for _, p := range left {
		if v.points[p.ID] == nil {
			m.t.Errorf("after a prune %s has an unknown point %s", v.name, p.ID)
			return
		}
		stays[p.ID] = v.points[p.ID]
	}
	v.points = stays
	if len(stays) > 0 {
		m.rebase(v)
	}
}

// rebase finds what a tracker would say since the point that is the latest now.
func (m *model) rebase(v *modelVolume) {
	latest := m.latest(v)
	if latest == nil || v.points[latest.ID] == nil {
		m.t.Errorf("latest of %s is wrong after a deletion", v.name)
		return
	}
	v.dirty = map[int64]bool{}
	base := v.points[latest.ID]
	a, b := make([]byte, pageSize), make([]byte, pageSize)
	for n := range v.disk.size/pageSize + 1 {
		if v.disk.pages[n] == nil && base.pages[n] == nil {
			continue
		}
		clear(a)
		clear(b)
		_, _ = v.disk.ReadAt(a, n*pageSize)
		_, _ = base.ReadAt(b, n*pageSize)
		if !bytes.Equal(a, b) {
			v.dirty[n] = true
		}
	}
}

// maintain collects what no point reaches, without safety margins, and reads
// a point of each volume.
func (m *model) maintain(*modelVolume) {
	mode := repository.MaintenanceFull
	if m.rng.IntN(3) == 0 {
		mode = repository.MaintenanceQuick
	}
	if _, err := Maintain(m.t.Context(), m.repo, MaintainOptions{Mode: mode, NoSafety: true}); err != nil {
		m.t.Errorf("maintenance: %v", err)
		return
	}
	for _, v := range m.volumes {
		m.read(v)
	}
}

func (m *model) reopen(*modelVolume) {
	if err := m.repo.Close(m.t.Context()); err != nil {
		m.t.Fatal(err)
	}
	r, err := repository.Open(m.t.Context(), repository.OpenOptions{ConfigFile: m.conf, Password: "secret"})
	if err != nil {
		m.t.Fatal(err)
	}
	m.repo = r
}
