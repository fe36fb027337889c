// Command makepoints writes many recovery points of simulated volumes in one
// process, so that benchmarks get their long chains and full repositories in
// minutes. Each point after a volume's first changes one page of 4 KiB. With
// -first-byte it reads from a recovery point instead, as a running server would.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"log/slog"
	"math/rand/v2"
	"os"
	"os/signal"
	"slices"
	"time"

	"github.com/varve-io/varve/backup"
	"github.com/varve-io/varve/backup/cbt"
	"github.com/varve-io/varve/backup/disks"
	"github.com/varve-io/varve/backup/image"
	"github.com/varve-io/varve/backup/points"
	"github.com/varve-io/varve/backup/repository"
)

const page = 4096

func main() {
	var o options
	flag.StringVar(&o.config, "config", "", "configuration file of the connected repository; $VARVE_PASSWORD opens it")
	flag.Int64Var(&o.size, "size", 1<<30, "bytes of each volume")
	flag.IntVar(&o.volumes, "volumes", 1, "volumes, bench/disk0 and on")
	flag.IntVar(&o.points, "points", 1, "recovery points in all, each volume in turn")
	flag.IntVar(&o.pages, "pages", 0, "pages written before a volume's first point, the same as those of that many points")
	flag.BoolVar(&o.quick, "quick", false, "only write what a point consists of, for thousands of them; all have the disk of the first")
	flag.BoolVar(&o.once, "once", false, "with -quick, all in one flush: points without the index blobs that come with time")
	flag.IntVar(&o.merged, "merged", 0, "with -quick, the first so many points in one flush: their index blobs were merged since")
	flag.StringVar(&o.read, "first-byte", "", "open this point and read 4 KiB of it, -times times, each with an empty cache; the median in microseconds goes to standard output")
	flag.IntVar(&o.times, "times", 101, "see -first-byte")
	flag.Int64Var(&o.offset, "offset", 0, "where -first-byte reads, in bytes")
	flag.Parse()
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt)
	defer stop()
	if err := run(ctx, o); err != nil {
		slog.Error("makepoints", "error", err)
		os.Exit(1)
	}
}

type options struct {
	config                 string
	size                   int64
	volumes, points, pages int
	merged                 int
	quick, once            bool
	read                   string
	offset                 int64
	times                  int
}

func run(ctx context.Context, o options) error {
	repo, err := repository.Open(ctx, repository.OpenOptions{ConfigFile: o.config, Password: os.Getenv("VARVE_PASSWORD"), Log: slog.Default()})
	if err != nil {
		return err
	}
	defer repo.Close(context.WithoutCancel(ctx))
	if o.read != "" {
		return firstByte(ctx, repo, o)
	}
	if o.quick {
		return crowd(ctx, repo, o)
	}
	disks := make([]*simulated, o.volumes)
	for i := range disks {
		disks[i] = &simulated{size: o.size, seed: uint64(i), pages: map[int64]bool{}}
		for range o.pages {
			disks[i].write()
		}
	}
	for n := range o.points {
		i := n % o.volumes
		d := disks[i]
		if n >= o.volumes || o.pages == 0 {
			d.write()
		}
		v := points.Volume{Namespace: "bench", Name: fmt.Sprintf("disk%d", i), Cluster: repo.Cluster()}
		if _, _, err := backup.Run(ctx, repo, backup.Options{Volume: v, Disk: d, Source: d, ToolVersion: "makepoints"}); err != nil {
			return fmt.Errorf("point %d of %s: %w", n, v, err)
		}
	}
	return nil
}

// firstByte measures opening a point and reading from it.
func firstByte(ctx context.Context, repo *repository.Repository, o options) error {
	cat, err := points.List(ctx, repo, points.ListOptions{})
	if err != nil {
		return err
	}
	p, err := points.Names{Catalog: cat, Cluster: repo.Cluster()}.Read(o.read)
	if err != nil {
		return err
	}
	took := make([]time.Duration, max(o.times, 1))
	for i := range took {
		start := time.Now()
		if err := readOnce(ctx, repo, p, o.offset); err != nil {
			return err
		}
		took[i] = time.Since(start)
	}
	slices.Sort(took)
	_, err = fmt.Fprintln(os.Stdout, took[len(took)/2].Microseconds())
	return err
}

func readOnce(ctx context.Context, repo *repository.Repository, p *points.Point, off int64) error {
	cache := image.NewCache(16 << 20)
	defer cache.Close()
	held := disks.New(repo, cache, disks.Options{Purpose: "measure", Lease: disks.OnDemand})
	d, err := held.Hold(ctx, p)
	if err == nil {
		_, err = d.ReadAt(ctx, make([]byte, page), off)
		d.Release()
	}
	return errors.Join(err, held.Close(ctx))
}

// simulated is a disk of zeroes but for some pages, and the source of its own
// changed blocks.
type simulated struct {
	size  int64
	seed  uint64
	pages map[int64]bool
	last  int64 // page written last
	count int   // pages written
	state int   // points taken
}

// write writes the next page: a large odd stride spreads them over the disk.
func (d *simulated) write() {
	total := d.size / page
	d.last = int64(d.count) * 257 % total
	d.pages[d.last] = true
	d.count++
}

func (d *simulated) Size() int64      { return d.size }
func (d *simulated) CheckSize() error { return nil }

func (d *simulated) ReadAt(p []byte, off int64) (int, error) {
	n := min(int64(len(p)), d.size-off)
	clear(p[:n])
	for i := (off + page - 1) / page; (i+1)*page <= off+n; i++ {
		if d.pages[i] {
			rng := rand.New(rand.NewPCG(d.seed, uint64(i)))
			for k := range int64(page) {
				p[i*page-off+k] = byte(rng.Uint32())
			}
		}
	}
	if n < int64(len(p)) {
		return int(n), io.EOF
	}
	return int(n), nil
}

// Changes implements cbt.Source.
func (d *simulated) Changes(_ context.Context, req cbt.Request, emit func(cbt.Extent) error) (cbt.Report, error) {
	rep := cbt.Report{Source: "simulated", Size: d.size, Exact: true}
	d.state++
	rep.TargetChangeID = fmt.Sprint(d.state)
	if req.Base != nil {
		rep.BaseChangeID, rep.Reported = req.Base.ChangeID, page
		return rep, emit(cbt.Extent{Offset: d.last * page, Length: page})
	}
	rep.Allocated = true
	for i := range d.pages {
		rep.Reported += page
		if err := emit(cbt.Extent{Offset: i * page, Length: page}); err != nil {
			return rep, err
		}
	}
	return rep, nil
}
