package nbdserver_test

import (
	"bytes"
	"context"
	"net"
	"testing"
	"time"

	"github.com/varve-io/varve/nbdserver"
	"github.com/varve-io/varve/nbdserver/nbdtest"
)

// serve is nbdtest.Serve.
func serve(t testing.TB, cfg nbdserver.Config) (*nbdserver.Server, string) {
	t.Helper()
	return nbdtest.Serve(t, cfg)
}

func dialUnix(t testing.TB, path string) net.Conn {
	t.Helper()
	c, err := net.DialTimeout("unix", path, 10*time.Second)
	if err != nil {
		t.Fatal(err)
	}
	return c
}

// plain hides every capability but the write side, so that the slow paths are
// tested, too.
type plain struct{ nbdserver.Export }

type plainWriter struct {
	nbdserver.Export
	nbdserver.Writer
}

// lender lends a writable disk by copying into memory of its own.
type lender struct {
	plainWriter
	d *nbdtest.Disk
}

type copied []byte

func (copied) Release() {}

func (l lender) Lend(ctx context.Context, dst []nbdserver.Piece, off int64, n int, _ bool) ([]nbdserver.Piece, error) {
	b := make(copied, n)
	if _, err := l.d.ReadAt(ctx, b, off); err != nil {
		return dst, err
	}
	for len(b) > 0 { // as a cache would: block by block, zeroes told
		k := min(len(b), nbdtest.BlockSize)
		if bytes.Equal(b[:k], make([]byte, k)) {
			dst = append(dst, nbdserver.Piece{Zeroes: k})
		} else {
			dst = append(dst, nbdserver.Piece{Data: b[:k], Owner: b})
		}
		b = b[k:]
	}
	return dst, nil
}

// hoarder lends pieces of blocks that are too large to be kept in memory.
type hoarder struct{ lender }

func (h hoarder) Lend(ctx context.Context, dst []nbdserver.Piece, off int64, n int, wait bool) ([]nbdserver.Piece, error) {
	pieces, err := h.lender.Lend(ctx, dst, off, n, wait)
	for i := len(dst); i < len(pieces); i++ {
		pieces[i].Held = 1 << 40
	}
	return pieces, err
}

func TestConformance(t *testing.T) {
	contexts := map[string]func(int64) uint32{
		"qemu:allocation-depth":        func(b int64) uint32 { return uint32(b % 3) },
		"qemu:dirty-bitmap:shop/db@t0": func(b int64) uint32 { return uint32(b / 16 % 2) },
	}
	for name, mk := range map[string]func() (e nbdserver.Export, writable bool){
		"read-only": func() (nbdserver.Export, bool) {
			d := nbdtest.NewDisk(nbdtest.Image())
			d.Extra = contexts
			return d.ReadOnly(), false
		},
		"lent": func() (nbdserver.Export, bool) {
			d := nbdtest.NewDisk(nbdtest.Image())
			d.Lends = true
			return d.ReadOnly(), false
		},
		"plain": func() (nbdserver.Export, bool) {
			return plain{nbdtest.NewDisk(nbdtest.Image()).ReadOnly()}, false
		},
		"padded": func() (nbdserver.Export, bool) {
			return nbdserver.Pad(nbdtest.NewDisk(nbdtest.Image()[:nbdtest.ImageSize-7]).ReadOnly(), 512), false
		},
		"writable": func() (nbdserver.Export, bool) {
			d := nbdtest.NewDisk(nbdtest.Image())
			d.Extra = contexts
			return d.Writable(), true
		},
		"plain-writable": func() (nbdserver.Export, bool) {
			w := nbdtest.NewDisk(nbdtest.Image()).Writable()
			return plainWriter{w, w.(nbdserver.Writer)}, true
		},
		"lent-writable": func() (nbdserver.Export, bool) {
			d := nbdtest.NewDisk(nbdtest.Image())
			w := d.Writable()
			return lender{plainWriter{w, w.(nbdserver.Writer)}, d}, true
		},
		"lent-of-large-blocks": func() (nbdserver.Export, bool) {
			d := nbdtest.NewDisk(nbdtest.Image())
			w := d.Writable()
			return hoarder{lender{plainWriter{w, w.(nbdserver.Writer)}, d}}, true
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			_, writable := mk()
			nbdtest.Run(t, nbdtest.Traits{Writable: writable}, func(t *testing.T) nbdtest.Target {
				e, _ := mk()
				_, path := serve(t, nbdserver.Config{Catalog: nbdserver.NewStatic(nbdserver.Opened{
					Name: "shop/db@2026-11-20T10:00:00Z", Description: "a disk", Export: e,
				})})
				return nbdtest.Target{
					Dial:   func(t testing.TB) net.Conn { return dialUnix(t, path) },
					Export: "shop/db@2026-11-20T10:00:00Z",
				}
			})
		})
	}
}
