package overlay_test

import (
	"net"
	"path/filepath"
	"testing"

	"github.com/varve-io/varve/backup/overlay"
	"github.com/varve-io/varve/nbdserver"
	"github.com/varve-io/varve/nbdserver/nbdtest"
)

// An overlay is a writable export as it is.
var (
	_ nbdserver.Export     = (*overlay.Overlay)(nil)
	_ nbdserver.Writer     = (*overlay.Overlay)(nil)
	_ nbdserver.Statuser   = (*overlay.Overlay)(nil)
	_ nbdserver.Prefetcher = (*overlay.Overlay)(nil)
)

// The NBD conformance suite, writes included, over an overlay.
func TestServed(t *testing.T) {
	nbdtest.Run(t, nbdtest.Traits{Writable: true}, func(t *testing.T) nbdtest.Target {
		dir := t.TempDir()
		base := nbdtest.NewDisk(nbdtest.Image())
		base.Extra = map[string]func(int64) uint32{"qemu:allocation-depth": func(int64) uint32 { return 1 }}
		o, err := overlay.Open(base, overlay.Options{Dir: filepath.Join(dir, "overlay"), BaseID: "image"})
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() {
			if err := o.Close(); err != nil {
				t.Error(err)
			}
		})
		srv, err := nbdserver.New(nbdserver.Config{Catalog: nbdserver.NewStatic(nbdserver.Opened{Name: "disk", Export: o})})
		if err != nil {
			t.Fatal(err)
		}
		socket := filepath.Join(dir, "nbd")
		l, err := nbdserver.Listen("unix:" + socket)
		if err != nil {
			t.Fatal(err)
		}
		served := make(chan error, 1)
		go func() { served <- srv.Serve(l) }()
		t.Cleanup(func() {
			srv.Close()
			<-served
		})
		return nbdtest.Target{Export: "disk", Dial: func(t testing.TB) net.Conn {
			c, err := net.Dial("unix", socket)
			if err != nil {
				t.Fatal(err)
			}
			return c
		}}
	})
}
