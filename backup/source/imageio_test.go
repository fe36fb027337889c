package source_test

import (
	"bytes"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/varve-io/varve/backup/imageio"
	"github.com/varve-io/varve/backup/imageio/imageiotest"
	"github.com/varve-io/varve/backup/source"
)

// transferOf is the URI of a service's transfer, whose URL is in a file.
func transferOf(t *testing.T, s *imageiotest.Server) string {
	t.Helper()
	file := filepath.Join(t.TempDir(), "url")
	if err := os.WriteFile(file, []byte(s.URL+"\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	return "imageio://" + file + "?tls-ca=" + s.CA
}

// TestImageio is a full of a transfer and increments from one checkpoint to the next. The
// disk shrinks and grows between them, which no bitmap notes: the first rule of bitmaps.
func TestImageio(t *testing.T) {
	t.Parallel()
	disk := bytes.Repeat([]byte("a disk "), 600_000)
	full := take(t, transferOf(t, imageiotest.Start(t, imageiotest.Config{Disk: disk, ReadOnly: true})), source.Options{ChangeID: "monday"}, nil)
	if full.by != "allocation" || full.id != "monday" || !bytes.Equal(full.bytes, disk) {
		t.Errorf("the full is by %s, of %q, or has other bytes", full.by, full.id)
	}
	copy(disk[1<<20:], "written")
	clear(disk[2<<20 : 2<<20+65536])
	s := imageiotest.Start(t, imageiotest.Config{Disk: disk, ReadOnly: true, Pieces: 10_000, Dirty: []imageiotest.Range{{Offset: 1 << 20, Length: 65536}}})
	opt := source.Options{BaseChangeID: "monday", ChangeID: "tuesday"}
	next := take(t, transferOf(t, s), opt, full)
	if next.by != "imageio" || next.id != "tuesday" || !bytes.Equal(next.bytes, disk) {
		t.Errorf("the increment is by %s (%v), of %q, or misses a change", next.by, next.why, next.id)
	}
	full.id = "sunday"
	if next = take(t, transferOf(t, s), opt, full); next.by != "allocation" || len(next.why) != 1 || !bytes.Equal(next.bytes, disk) {
		t.Errorf("of another checkpoint: by %s (%v), or other bytes", next.by, next.why)
	}
}

// TestImageioOneLayer is the second rule of bitmaps: a transfer that shows one layer of the
// disk hides the data of the layers beneath.
func TestImageioOneLayer(t *testing.T) {
	t.Parallel()
	yes := true
	s := imageiotest.Start(t, imageiotest.Config{Disk: make([]byte, 1<<20), ReadOnly: true,
		Hook: imageiotest.AnswerExtents([]imageiotest.Extent{{Length: 65536}, {Start: 65536, Length: 1<<20 - 65536, Hole: &yes}})})
	if _, err := source.Open(t.Context(), transferOf(t, s), source.Options{}); !errors.Is(err, imageio.ErrHidden) {
		t.Errorf("one layer of a disk: %v", err)
	}
}

func TestImageioRefused(t *testing.T) {
	t.Parallel()
	s := imageiotest.Start(t, imageiotest.Config{Disk: make([]byte, 4096)})
	uri := transferOf(t, s)
	for name, c := range map[string]struct {
		uri  string
		opt  source.Options
		want error
	}{
		"on the command line": {s.URL, source.Options{}, source.ErrURI},
		"a bitmap":            {uri, source.Options{Bitmap: "b"}, source.ErrURI},
		"tracked":             {uri, source.Options{Track: true}, source.ErrNoTracking},
		"no file":             {"imageio:///nothing/there", source.Options{}, os.ErrNotExist},
	} {
		if _, err := source.Open(t.Context(), c.uri, c.opt); !errors.Is(err, c.want) || strings.Contains(err.Error(), imageiotest.Ticket) {
			t.Errorf("%s: %v", name, err)
		}
	}
}
