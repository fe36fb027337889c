package backup

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"slices"
	"strconv"
	"testing"
	"time"

	"github.com/varve-io/varve/backup/blocktree"
	"github.com/varve-io/varve/backup/cbt"
	"github.com/varve-io/varve/backup/points"
	"github.com/varve-io/varve/backup/repository"
	"github.com/varve-io/varve/internal/zero"
)

// The model test plays random steps on a few volumes and a repository, and compares every
// recovery point with a plain copy of the disk's bytes. VARVE_MODEL_STEPS and
// VARVE_MODEL_SEED choose the run. VARVE_MODEL_WRITES multiplies the writes between other
// steps: a long run then tests large changes rather than many points.

// modelVolume is a volume under test.
type modelVolume struct {
	name   points.Volume
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
	groups  map[string]*modelGroup // by ID
	counts  map[string]int
	writes  int // multiplies the writes of a step, at least 1
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

// modelEra is how many steps a repository sees before a new one replaces it, with writes at
// 1: within an epoch of six hours Kopia merges no index blobs, and a run that writes
// thousands of them would soon only list them.
const modelEra = 4000

// runModel plays this many steps, each era with the next seed, and logs its progress: a long
// run takes hours.
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
	m := &model{t: t, rng: rand.New(rand.NewPCG(seed, 1)), groups: map[string]*modelGroup{}, counts: map[string]int{}, writes: writes}
	m.repo, m.conf = newRepo(t)
	for i := range 3 {
		v := &modelVolume{
			name: points.Volume{Namespace: "model", Name: fmt.Sprint("v", i), Cluster: "test"},
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
	{3, "backup group", (*model).backupGroup},
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

// listing returns what a tracker would report, plus some unchanged pages.
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
		zero := !ok || zero.Only(page)
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

// lie hides one changed page from the backup and lets it check everything.
func (m *model) lie(v *modelVolume) {
	latest := m.latest(v)
	if latest == nil || latest.ChangeID == "" || latest.Size != v.disk.size {
		return
	}
	was := v.points[latest.ID]
	block := latest.BlockSize
	for n := range v.dirty {
		// The block of this page must differ, and no other page of it be reported.
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
		opt.VerifyUnchanged, opt.SpotCheckTime = 1, -1 // everything, however slow the machine is
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
	if err == nil { // too late to stop it
		v.points[p.ID] = v.disk.clone()
		v.dirty = map[int64]bool{}
		return
	}
	if !errors.Is(err, context.Canceled) && !errors.Is(err, errCrash) {
		m.t.Errorf("cancelled backup of %s: %v", v.name, err)
	}
}

func (m *model) catalog() *points.Catalog {
	if err := m.repo.Refresh(m.t.Context()); err != nil {
		m.t.Fatal(err)
	}
	cat, err := points.List(m.t.Context(), m.repo, points.ListOptions{})
	if err != nil {
		m.t.Fatal(err)
	}
	return cat
}

func (m *model) latest(v *modelVolume) *points.Point { return m.catalog().Latest(v.name) }
