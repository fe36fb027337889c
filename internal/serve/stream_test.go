package serve

import (
	"errors"
	"strings"
	"testing"

	"github.com/varve-io/varve/backup"
	"github.com/varve-io/varve/backup/image"
	"github.com/varve-io/varve/backup/points"
	"github.com/varve-io/varve/backup/repository/repotest"
	"github.com/varve-io/varve/nbdserver"
)

// TestStreamsAreNoExports: a recovery point that holds a stream is not exported, and
// selecting it is an error that says so.
func TestStreamsAreNoExports(t *testing.T) {
	r := repotest.New(t).Open(t)
	save(t, r, "c", "shop/db", text(5000, 1))
	v := points.Volume{Namespace: "shop", Name: "dump", Cluster: "c"}
	p, _, err := backup.RunStream(t.Context(), r, backup.StreamOptions{Volume: v, Reader: strings.NewReader("dump")})
	if err != nil {
		t.Fatal(err)
	}
	c := openCatalog(t, r, Options{})
	if names, _ := c.Points(); len(names) != 1 || !strings.HasPrefix(names[0], "shop/db@") {
		t.Errorf("exports %v", names)
	}
	for _, name := range []string{"shop/dump@latest", p.Name(), p.ID} {
		if _, err := c.Open(t.Context(), name, nbdserver.Client{}); !errors.Is(err, nbdserver.ErrUnknownExport) {
			t.Errorf("%s: %v", name, err)
		}
		if _, err := Open(t.Context(), r, image.NewCache(1<<20), Options{Cluster: "c", Select: []string{name}}); !errors.Is(err, points.ErrStream) {
			t.Errorf("serve %s: %v", name, err)
		}
	}
}
