package repotest

import (
	"bytes"
	"cmp"
	"context"
	"encoding/json"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/kopia/kopia/fs"
	"github.com/kopia/kopia/repo"
	"github.com/kopia/kopia/repo/blob/filesystem"
	"github.com/kopia/kopia/repo/content"
	"github.com/kopia/kopia/repo/object"
	"github.com/kopia/kopia/snapshot"

	"github.com/varve-io/varve/backup/repository"
)

// veleroBlock is the block of Velero's block data mover, in bytes.
const veleroBlock = 1 << 20

// VeleroSource is whose snapshots Velero's block data mover writes here.
var VeleroSource = repository.Source{User: "default", Host: "default", Path: "snapshot-data-upload-download/kopia/shop/db-data"}

// NewVelero makes a repository the way Velero does, with nothing of Varve's in
// it. Connect makes ConfigFile.
func NewVelero(t testing.TB) *Repo {
	t.Helper()
	ctx := t.Context()
	dir := t.TempDir()
	r := &Repo{Dir: filepath.Join(dir, "blobs"), ConfigFile: filepath.Join(dir, "config", "repository.config")}
	if err := os.Mkdir(r.Dir, 0o700); err != nil {
		t.Fatal(err)
	}
	st, err := filesystem.New(ctx, &filesystem.Options{Path: r.Dir}, true)
	if err != nil {
		t.Fatal(err)
	}
	defer st.Close(context.WithoutCancel(ctx))
	if err := repo.Initialize(ctx, st, &repo.NewRepositoryOptions{}, Password); err != nil {
		t.Fatalf("initialize: %v", err)
	}
	// Velero's own connection: Varve's is read-only.
	own := filepath.Join(dir, "velero.config")
	if err := repo.Connect(ctx, own, st, Password, &repo.ConnectOptions{
		ClientOptions: repo.ClientOptions{Username: VeleroSource.User, Hostname: VeleroSource.Host},
	}); err != nil {
		t.Fatalf("connect: %v", err)
	}
	r.veleroConfig = own
	return r
}

// Connect connects Varve to the repository, as "varve repo connect filesystem"
// does, and writes ConfigFile.
func (r *Repo) Connect(t testing.TB) {
	t.Helper()
	if err := repository.Connect(t.Context(), repository.ConnectOptions{
		ConfigFile: r.ConfigFile, Password: Password, Storage: &repository.Filesystem{Path: r.Dir},
	}); err != nil {
		t.Fatalf("connect: %v", err)
	}
}

// WriteVelero saves a volume as Velero's block data mover does: a file padded
// with zeroes to whole blocks, as a flat table of one entry a block, in a
// directory "bdev-root"; the real size is in a tag that lacks Kopia's prefix.
// Blocks that are as in parent share its entries and are not written. It
// returns what the next increment needs.
func (r *Repo) WriteVelero(t testing.TB, device string, data []byte, parent *VeleroSnapshot) *VeleroSnapshot {
	t.Helper()
	out := &VeleroSnapshot{data: bytes.Clone(data)}
	r.with(t, cmp.Or(r.veleroConfig, r.ConfigFile), time.Now, func(ctx context.Context, w repo.DirectRepositoryWriter) error {
		put := func(p []byte, prefix string) (object.ID, error) {
			ow := w.NewObjectWriter(ctx, object.WriterOptions{Prefix: content.IDPrefix(prefix), Splitter: "FIXED-8M"})
			defer ow.Close()
			if _, err := ow.Write(p); err != nil {
				return object.EmptyID, err
			}
			return ow.Result()
		}
		for off := 0; off < len(data); off += veleroBlock {
			block := padded(data, off)
			if i := off / veleroBlock; parent != nil && i < len(parent.table) && bytes.Equal(padded(parent.data, off), block) {
				out.table = append(out.table, parent.table[i])
				out.Shared++
				continue
			}
			id, err := put(block, "")
			if err != nil {
				return err
			}
			out.table = append(out.table, object.IndirectObjectEntry{Start: int64(off), Length: veleroBlock, Object: id})
		}
		index, err := json.Marshal(struct {
			Stream  string                       `json:"stream"`
			Entries []object.IndirectObjectEntry `json:"entries"`
		}{"kopia:indirect", out.table})
		if err != nil {
			return err
		}
		indexID, err := put(index, "x")
		if err != nil {
			return err
		}
		file, err := object.ParseID("I" + indexID.String())
		if err != nil {
			return err
		}
		now := fs.UTCTimestampFromTime(w.Time())
		size := int64(len(out.table)) * veleroBlock
		dir, err := json.Marshal(snapshot.DirManifest{
			StreamType: "kopia:directory",
			Summary:    &fs.DirectorySummary{TotalFileCount: 1, TotalFileSize: size, TotalDirCount: 1, MaxModTime: now},
			Entries: []*snapshot.DirEntry{{
				Name: strings.ReplaceAll(device, "/", "-"), Type: snapshot.EntryTypeFile,
				Permissions: 0o777, FileSize: size, ModTime: now, ObjectID: file,
			}},
		})
		if err != nil {
			return err
		}
		dirID, err := put(dir, "k")
		if err != nil {
			return err
		}
		id, err := snapshot.SaveSnapshot(ctx, w, &snapshot.Manifest{
			Source:    snapshot.SourceInfo{UserName: VeleroSource.User, Host: VeleroSource.Host, Path: VeleroSource.Path},
			StartTime: now, EndTime: now,
			RootEntry: &snapshot.DirEntry{
				Name: "bdev-root", Type: snapshot.EntryTypeDirectory, Permissions: 0o777, ModTime: now, ObjectID: dirID,
			},
			Tags: map[string]string{"bdev-source-size": strconv.Itoa(len(data)), "snapshot-requester": "velero"},
		})
		out.ManifestID = string(id)
		return err
	})
	return out
}

// WriteFile adds a snapshot of a single file as stock Kopia makes it, and
// returns the ID of its manifest.
func (r *Repo) WriteFile(t testing.TB, source repository.Source, data []byte) string {
	t.Helper()
	var manifest string
	r.Write(t, func(ctx context.Context, w repo.DirectRepositoryWriter) error {
		oid, err := writeObject(ctx, w, Object{Data: data})
		if err != nil {
			return err
		}
		now := fs.UTCTimestampFromTime(w.Time())
		id, err := snapshot.SaveSnapshot(ctx, w, &snapshot.Manifest{
			Source:    snapshot.SourceInfo{UserName: source.User, Host: source.Host, Path: source.Path},
			StartTime: now, EndTime: now,
			RootEntry: &snapshot.DirEntry{
				Name: "disk.img", Type: snapshot.EntryTypeFile, Permissions: 0o600, FileSize: int64(len(data)), ModTime: now, ObjectID: oid,
			},
		})
		manifest = string(id)
		return err
	})
	return manifest
}

// VeleroSnapshot is a snapshot that WriteVelero wrote.
type VeleroSnapshot struct {
	ManifestID string
	Shared     int // entries taken from the parent

	data  []byte
	table []object.IndirectObjectEntry
}

// padded is the block of data at off, with zeroes behind the end.
func padded(data []byte, off int) []byte {
	block := make([]byte, veleroBlock)
	if off < len(data) {
		copy(block, data[off:])
	}
	return block
}
