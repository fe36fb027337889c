package overlay_test

import (
	"path/filepath"
	"testing"

	"github.com/varve-io/varve/backup/overlay"
	"github.com/varve-io/varve/nbdserver"
	"github.com/varve-io/varve/nbdserver/nbdtest"
)

// An overlay is a writable export.
var (
	_ nbdserver.Export     = (*overlay.Overlay)(nil)
	_ nbdserver.Writer     = (*overlay.Overlay)(nil)
	_ nbdserver.Prefetcher = (*overlay.Overlay)(nil)
)

// The NBD conformance suite, writes included, over an overlay.
func TestServed(t *testing.T) {
	nbdtest.Run(t, nbdtest.Traits{Writable: true}, func(t *testing.T) nbdtest.Target {
		dir := t.TempDir()
		base := nbdtest.NewDisk(nbdtest.Image())
		o, err := overlay.Open(base, overlay.Options{Dir: filepath.Join(dir, "overlay"), BaseID: "image"})
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() {
			if err := o.Close(); err != nil {
				t.Error(err)
			}
		})
		_, socket := nbdtest.Serve(t, nbdserver.Config{Catalog: nbdserver.NewStatic(nbdserver.Opened{Name: "disk", Export: o})})
		return nbdtest.Target{Export: "disk", Dial: nbdtest.DialUnix(socket)}
	})
}
