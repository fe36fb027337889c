package repository_test

import (
	"bytes"
	"context"
	"fmt"
	"math/rand/v2"
	"path/filepath"
	"testing"

	"github.com/klauspost/compress/s2"

	"github.com/varve-io/varve/backup/repository"
	"github.com/varve-io/varve/backup/repository/repotest"
)

// half is n bytes that compress to about half.
func half(n int, seed byte) []byte {
	p := make([]byte, n)
	_, _ = rand.NewChaCha8([32]byte{seed}).Read(p)
	for i := range p {
		if i%16 < 8 {
			p[i] = "varve ee"[i%8]
		}
	}
	return p
}

// openFormat makes a repository of a format, and opens it.
func openFormat(t testing.TB, f repository.Format) *repository.Repository {
	t.Helper()
	dir := repotest.Dir(t)
	o := repository.CreateOptions{Format: f}
	o.Storage = &repository.Filesystem{Path: filepath.Join(dir, "blobs")}
	o.ConfigFile, o.Password = filepath.Join(dir, "repository.config"), repotest.Password
	if err := repository.Create(t.Context(), o); err != nil {
		t.Fatal(err)
	}
	r, err := repository.Open(t.Context(), repository.OpenOptions{ConfigFile: o.ConfigFile, Password: o.Password})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = r.Close(context.WithoutCancel(t.Context())) })
	return r
}

func writeBlocks(t testing.TB, r *repository.Repository, blocks [][]byte) (ids []repository.ObjectID) {
	t.Helper()
	w, err := r.NewWriter(t.Context(), "test")
	if err != nil {
		t.Fatal(err)
	}
	for _, b := range blocks {
		id, err := w.WriteBlock(t.Context(), b)
		if err != nil {
			t.Fatal(err)
		}
		ids = append(ids, id)
	}
	if err := w.Flush(t.Context()); err != nil {
		t.Fatal(err)
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	if err := r.Refresh(t.Context()); err != nil {
		t.Fatal(err)
	}
	return ids
}

// TestReadPastKopiasBuffers: what is decoded here is what Kopia decodes, of all formats; and it is decoded here.
func TestReadPastKopiasBuffers(t *testing.T) {
	blocks := [][]byte{
		{7}, half(100, 1), half(4096, 2), half(128<<10, 3), bytes.Repeat([]byte("compresses well "), 8<<10),
		make([]byte, 64<<10), half(1<<20+3, 4), make([]byte, 3<<20),
	}
	noise := make([]byte, 128<<10)
	_, _ = rand.NewChaCha8([32]byte{9}).Read(noise)
	blocks = append(blocks, noise)
	var formats []repository.Format
	for _, c := range append(repository.Compressions(), repository.CompressionOff) {
		formats = append(formats, repository.Format{Compression: c})
	}
	for _, e := range repository.Encryptions() {
		formats = append(formats, repository.Format{Encryption: e})
	}
	for _, h := range repository.Hashes() {
		formats = append(formats, repository.Format{Hash: h})
	}
	formats = append(formats, repository.Format{ECCOverheadPercent: 10})
	for _, f := range formats {
		t.Run(fmt.Sprintf("%+v", f), func(t *testing.T) {
			t.Parallel()
			r := openFormat(t, f)
			ids := writeBlocks(t, r, blocks)
			for i, id := range ids {
				p, err := r.ReadDirectly(t.Context(), id)
				if err != nil || !bytes.Equal(p, blocks[i]) {
					t.Errorf("block %d is not read directly, %v, or reads other bytes", i, err)
				}
				if p, err := r.ReadObject(t.Context(), id); err != nil || !bytes.Equal(p, blocks[i]) {
					t.Errorf("block %d reads other bytes, or %v", i, err)
				}
			}
			if !r.ReadByKopia() {
				t.Error("nothing of a local repository is read directly")
			}
			for i, id := range ids {
				if p, err := r.ReadObject(t.Context(), id); err != nil || !bytes.Equal(p, blocks[i]) {
					t.Errorf("Kopia reads other bytes of block %d, or %v", i, err)
				}
			}
		})
	}
}

// FuzzDecompressS2 gives streams of S2, whole, cut off and damaged, to both decoders.
func FuzzDecompressS2(f *testing.F) {
	stream := func(p []byte) []byte {
		var out bytes.Buffer
		w := s2.NewWriter(&out, s2.WriterConcurrency(1), s2.WriterBlockSize(64<<10))
		_, _ = w.Write(p)
		_ = w.Close()
		return out.Bytes()
	}
	block := half(4096, 2)
	if got, ok := repository.DecompressS2(stream(block), len(block)); !ok || !bytes.Equal(got, block) {
		f.Error("a block is not decoded in place")
	}
	for _, p := range [][]byte{nil, {7}, half(1000, 1), make([]byte, 70_000)} {
		out := stream(p)
		f.Add(out, len(p))
		f.Add(out[:len(out)/2], len(p))
	}
	f.Fuzz(func(t *testing.T, p []byte, n int) {
		if n < 0 || n > 1<<20 {
			return
		}
		ours, ok := repository.DecompressS2(p, n)
		if !ok {
			return
		}
		var theirs bytes.Buffer
		if _, err := theirs.ReadFrom(s2.NewReader(bytes.NewReader(p))); err != nil || !bytes.Equal(ours, theirs.Bytes()) {
			t.Errorf("%d bytes were decoded that are not, %v", len(ours), err)
		}
	})
}

// BenchmarkReadObject reads blocks of 128 KiB, by Kopia and past its buffers.
func BenchmarkReadObject(b *testing.B) {
	for _, compression := range []string{"s2-default", "zstd-fastest", "off"} {
		for _, kopia := range []bool{true, false} {
			b.Run(fmt.Sprintf("%s/kopia=%v", compression, kopia), func(b *testing.B) {
				r := openFormat(b, repository.Format{Compression: compression})
				var blocks [][]byte
				for i := range 100 {
					blocks = append(blocks, half(128<<10, byte(i)))
				}
				ids := writeBlocks(b, r, blocks)
				if kopia {
					r.ReadByKopia()
				}
				b.SetBytes(128 << 10)
				b.ReportAllocs()
				for i := 0; b.Loop(); i++ {
					if _, err := r.ReadObject(b.Context(), ids[i%len(ids)]); err != nil {
						b.Fatal(err)
					}
				}
			})
		}
	}
}
