package backup

import (
	"bytes"
	"context"
	"encoding/binary"
	"math/rand/v2"
	"os"
	"testing"

	"github.com/varve-io/varve/backup/repository"
	"github.com/varve-io/varve/backup/repository/repotest"
)

// TestBadReadIsNotKept has one process read a small blob damaged, once: it reads the blob again when it
// looks again, and passes no copy on.
func TestBadReadIsNotKept(t *testing.T) {
	for _, kind := range []string{"q", "xn"} {
		t.Run(kind, func(t *testing.T) {
			t.Parallel()
			repo := repotest.New(t)
			data := randomBytes(rand.New(rand.NewPCG(17, 18)), 2<<20)
			backup := func(r *repository.Repository) {
				data[5]++
				mustBackup(t, r, Options{Volume: testVolume, Disk: &memDisk{data: bytes.Clone(data)}})
			}
			requests(t, repo, backup)
			conf, f := repo.ConnectFaulty(t)
			r, err := repository.Open(t.Context(), repository.OpenOptions{ConfigFile: conf, Password: repotest.Password})
			if err != nil {
				t.Fatal(err)
			}
			for range 3 {
				requests(t, repo, backup)
			}
			repo.RemoveBlob(t, "varve.recent")
			f.Add(repotest.Fault{Op: repotest.Get, Prefix: kind, Count: 1, FlipBit: 2401})
			first, again := r.Refresh(t.Context()), r.Refresh(t.Context())
			f.Clear()
			if n := len(mustCatalog(t, r).Points()); again != nil || kind == "xn" && n != 4 {
				t.Errorf("%d points are listed, want 4; %v, and then %v", n, first, again)
			}
			backup(r)
			if err := r.Close(context.WithoutCancel(t.Context())); err != nil {
				t.Fatal(err)
			}
			for id, p := range copiesIn(t, copiesFile(t, repo.Dir)) {
				if want, err := os.ReadFile(repo.BlobPath(t, id)); err != nil || !bytes.Equal(p, want) {
					t.Errorf("the copy of %s is damaged, %v", id, err)
				}
			}
			requests(t, repo, func(r *repository.Repository) {
				if n := len(mustCatalog(t, r).Points()); n != 5 {
					t.Errorf("%d points are listed, want 5", n)
				}
			})
		})
	}
}

// copiesIn reads a file of copies of small blobs (docs/format.md).
func copiesIn(t *testing.T, file string) map[string][]byte {
	t.Helper()
	p, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	p = p[len("varve recent 1\n") : len(p)-32]
	cut := func() []byte {
		n := binary.BigEndian.Uint32(p)
		head := p[4:][:n]
		p = p[4+n:]
		return head
	}
	out := map[string][]byte{}
	for len(p) > 0 {
		id := string(cut())
		out[id] = cut()
	}
	if len(out) == 0 {
		t.Fatal("no copies")
	}
	return out
}
