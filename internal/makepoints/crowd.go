package main

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"fmt"
	"maps"
	"slices"
	"strconv"
	"time"

	"github.com/varve-io/varve/backup"
	"github.com/varve-io/varve/backup/blocktree"
	"github.com/varve-io/varve/backup/points"
	"github.com/varve-io/varve/backup/repository"
)

// crowd writes points of many volumes without the work of a backup, which lists
// and proves each time: of each point the same number of flushes, contents and
// manifests reaches the repository, and the points are valid. All share the disk
// of a first one that a backup made.
func crowd(ctx context.Context, repo *repository.Repository, o options) error {
	d := &simulated{size: o.size, pages: map[int64]bool{}}
	d.write()
	v := points.Volume{Namespace: "bench", Name: "disk", Cluster: repo.Cluster()}
	p, rec, err := backup.Run(ctx, repo, backup.Options{Volume: v, Disk: d, Source: d, ToolVersion: "makepoints"})
	if err != nil {
		return err
	}
	first, err := repo.LoadSnapshot(ctx, p.ManifestID)
	if err != nil {
		return err
	}
	files, err := repo.ReadDirectory(ctx, first.Root)
	if err != nil {
		return err
	}
	w, err := repo.NewWriter(ctx, "makepoints")
	if err != nil {
		return err
	}
	defer w.Close()
	c := &crowdWriter{w: w, first: first, files: files, rec: *rec, block: make([]byte, page)}
	for n := range o.points {
		if c.once = o.once || n < o.merged; !c.once && n == o.merged {
			if err := w.Flush(ctx); err != nil {
				return err
			}
		}
		if err := c.point(ctx, n, o.volumes); err != nil {
			return fmt.Errorf("point %d: %w", n, err)
		}
	}
	return w.Flush(ctx)
}

type crowdWriter struct {
	w     *repository.Writer
	first *repository.Snapshot
	files []repository.File
	rec   blocktree.Record
	block []byte
	once  bool // no flush for each point
}

func (c *crowdWriter) flush(ctx context.Context) error {
	if c.once {
		return nil
	}
	return c.w.Flush(ctx)
}

// point writes one point by three flushes, as an increment does: what protects
// the parent, what was stored, the point itself.
func (c *crowdWriter) point(ctx context.Context, n, volumes int) error {
	rec := c.rec
	var id [16]byte
	_, _ = rand.Read(id[:])
	_, _ = rand.Read(c.block)
	rec.ID = hex.EncodeToString(id[:])
	rec.Name, rec.Generation = fmt.Sprintf("disk%d", n%volumes), int64(n/volumes+1)
	rec.Time = c.rec.Time.Add(time.Duration(n) * 8 * time.Second)

	held := *c.first
	held.Source = sourceOf(c.first.Source, c.rec.Name, rec.Name)
	held.Incomplete, held.Tags = "backup in progress", nil
	if err := c.w.SaveSnapshot(ctx, &held, c.files); err != nil {
		return err
	}
	if err := c.flush(ctx); err != nil {
		return err
	}
	if _, err := c.w.WriteBlock(ctx, c.block); err != nil {
		return err
	}
	if _, err := c.w.WriteIndex(ctx, c.block); err != nil {
		return err
	}
	if err := c.flush(ctx); err != nil {
		return err
	}
	doc, err := rec.Encode()
	if err != nil {
		return err
	}
	recID, err := c.w.WriteFile(ctx, doc)
	if err != nil {
		return err
	}
	files := slices.Clone(c.files)
	for i := range files {
		if files[i].Name == blocktree.RecordFile {
			files[i].Object, files[i].Size = recID, int64(len(doc))
		}
	}
	s := *c.first
	s.Source, s.Start, s.End = held.Source, rec.Time, rec.Time
	s.Tags = maps.Clone(c.first.Tags)
	s.Tags["varve-id"], s.Tags["varve-generation"] = rec.ID, strconv.FormatInt(rec.Generation, 10)
	if err := c.w.SaveSnapshot(ctx, &s, files); err != nil {
		return err
	}
	if err := c.w.DeleteSnapshot(ctx, held.ManifestID); err != nil {
		return err
	}
	return c.flush(ctx)
}

// sourceOf is the source of another volume beside that of a first.
func sourceOf(s repository.Source, from, to string) repository.Source {
	s.Path = s.Path[:len(s.Path)-len(from)] + to
	return s
}
