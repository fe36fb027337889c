package repotest

import (
	"context"
	"encoding/hex"
	"fmt"
	"testing"

	"github.com/kopia/kopia/repo"
	"github.com/kopia/kopia/repo/blob"
	"github.com/kopia/kopia/repo/content"
	"github.com/kopia/kopia/repo/content/index"
)

// CutIndex replaces the index by two blobs with about half of its contents each, as
// Kopia cuts an index of many millions of contents. It returns their names.
func (r *Repo) CutIndex(t testing.TB) []string {
	t.Helper()
	old := r.Indexes(t)
	var names []string
	r.Write(t, func(ctx context.Context, w repo.DirectRepositoryWriter) error {
		halves := []index.Builder{{}, {}}
		if err := w.ContentReader().IterateContents(ctx, content.IterateOptions{IncludeDeleted: true}, func(ci content.Info) error {
			halves[ci.ContentID.Hash()[0]&1].Add(ci)
			return nil
		}); err != nil {
			return err
		}
		for i, half := range halves {
			name, err := writeIndex(ctx, w, half, i)
			if err != nil {
				return err
			}
			names = append(names, name)
		}
		return nil
	})
	for _, id := range old {
		r.RemoveBlob(t, id)
	}
	return names
}

// writeIndex is kopia internal/blobcrypto, Encrypt, with the name that kopia
// internal/epoch gives to an index blob of the first epoch.
func writeIndex(ctx context.Context, w repo.DirectRepositoryWriter, b index.Builder, n int) (string, error) {
	format := w.ContentReader().ContentFormat()
	mp, err := format.GetMutableParameters(ctx)
	if err != nil {
		return "", err
	}
	shards, done, err := b.BuildShards(mp.IndexVersion, true, 1<<30)
	if err != nil {
		return "", err
	}
	defer done()
	if len(shards) != 1 {
		return "", fmt.Errorf("an index of %d contents has %d shards", len(b), len(shards))
	}
	iv := format.HashFunc()(nil, shards[0])
	out := outputOf(format.Encryptor().Encrypt)
	defer out.Close()
	if err := format.Encryptor().Encrypt(shards[0], iv[len(iv)-16:], out); err != nil {
		return "", err
	}
	name := fmt.Sprintf("xn0_%s-s%016x1-c1", hex.EncodeToString(iv), n)
	return name, w.BlobStorage().PutBlob(ctx, blob.ID(name), out.Bytes(), blob.PutOptions{})
}

// outputOf makes what an encryptor writes to, whose type is internal to Kopia.
func outputOf[In, Out any](func(In, []byte, *Out) error) *Out { return new(Out) }
