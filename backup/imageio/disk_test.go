package imageio_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/varve-io/varve/backup/cbt/cbttest"
	"github.com/varve-io/varve/backup/imageio"
	"github.com/varve-io/varve/backup/imageio/imageiotest"
)

// sparse is a disk of data and zeroes.
func sparse(size int) []byte {
	b := make([]byte, size)
	rnd := rand.New(rand.NewPCG(1, 2))
	for off := 0; off < size; off += 1 + rnd.IntN(200_000) {
		n := min(1+rnd.IntN(100_000), size-off)
		for i := off; i < off+n; i++ {
			b[i] = byte(rnd.Uint32())
		}
		off += n
	}
	return b
}

func transfer(t *testing.T, s *imageiotest.Server) *imageio.Transfer {
	t.Helper()
	tr, err := imageio.ParseTransfer(s.URL)
	if err != nil {
		t.Fatal(err)
	}
	return tr
}

func openDisk(t *testing.T, s *imageiotest.Server, opt imageio.Options) *imageio.Disk {
	t.Helper()
	opt.CA = s.CA
	d, err := imageio.Open(t.Context(), transfer(t, s), opt)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = d.Close() })
	return d
}

func TestDisk(t *testing.T) {
	t.Parallel()
	disk := sparse(3<<20 + 511)
	for name, c := range map[string]struct {
		cfg         imageiotest.Config
		connections int
		unix, dense bool
	}{
		"of today":        {imageiotest.Config{}, 4, false, false},
		"in pieces":       {imageiotest.Config{Pieces: 700}, 4, false, false},
		"one reader":      {imageiotest.Config{Features: []string{"extents"}}, 1, false, false},
		"unix socket":     {imageiotest.Config{UnixSocket: true}, 4, true, false},
		"without extents": {imageiotest.Config{Features: []string{"flush"}, MaxReaders: 2}, 2, false, true},
		"before OPTIONS":  {imageiotest.Config{Hook: answerOptions(http.StatusMethodNotAllowed)}, 1, false, true},
		"old proxy":       {imageiotest.Config{Hook: answerOptions(http.StatusNoContent)}, 1, false, true},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			c.cfg.Disk, c.cfg.ReadOnly = disk, true
			s := imageiotest.Start(t, c.cfg)
			d := openDisk(t, s, imageio.Options{})
			if d.Size() != int64(len(disk)) || d.Connections() != c.connections || d.TellsZeroes() == c.dense {
				t.Errorf("size %d, %d connections, tells zeroes: %v", d.Size(), d.Connections(), d.TellsZeroes())
			}
			if !bytes.Equal(cbttest.ReadData(t, d, 77_777), disk) {
				t.Error("the disk reads otherwise")
			}
			p := make([]byte, 1000)
			if n, err := d.ReadAt(p, d.Size()-500); n != 500 || !errors.Is(err, io.EOF) || !bytes.Equal(p[:n], disk[len(disk)-500:]) {
				t.Errorf("the end: %d bytes, %v", n, err)
			}
			if err := d.CheckSize(); err != nil {
				t.Error(err)
			}
			seen := s.Seen()
			if over := seen.OverUnix > 5; over != c.unix {
				t.Errorf("%d requests over the unix socket", seen.OverUnix)
			}
			if seen.AtOnce > c.connections {
				t.Errorf("%d requests at once", seen.AtOnce)
			}
		})
	}
}

func answerOptions(status int) func(*imageiotest.Server, http.ResponseWriter, *http.Request, int) bool {
	return func(_ *imageiotest.Server, w http.ResponseWriter, r *http.Request, _ int) bool {
		if r.Method == http.MethodOptions {
			w.WriteHeader(status)
		}
		return r.Method == http.MethodOptions
	}
}

// TestDiskOfBadServer reads the disk in spite of a service that cuts, shortens and fails
// every third answer.
func TestDiskOfBadServer(t *testing.T) {
	t.Parallel()
	disk := sparse(2 << 20)
	s := imageiotest.Start(t, imageiotest.Config{Disk: disk, ReadOnly: true, Pieces: 5000,
		Hook: func(_ *imageiotest.Server, w http.ResponseWriter, r *http.Request, n int) bool {
			if r.Method == http.MethodOptions || n%3 != 0 {
				return false
			}
			var first, last int
			_, _ = fmt.Sscanf(r.Header.Get("Range"), "bytes=%d-%d", &first, &last)
			of := http.Header{"Content-Range": {fmt.Sprintf("bytes %d-%d/%d", first, last, len(disk))}}
			switch n / 3 % 4 {
			case 0:
				imageiotest.Cut(w, http.StatusPartialContent, of, last-first+1, 0)
			case 1:
				imageiotest.Cut(w, http.StatusPartialContent, of, last-first+1, (last-first+1)/2)
			case 2:
				imageiotest.Fail(w, http.StatusInternalServerError, "Internal server error")
			default:
				panic(http.ErrAbortHandler) // the connection is dropped, as an idle one is
			}
			return true
		}})
	d := openDisk(t, s, imageio.Options{Retry: time.Minute})
	if !bytes.Equal(cbttest.ReadData(t, d, 77_777), disk) {
		t.Error("the disk reads otherwise")
	}
}

// TestDiskRefused are services that are not believed. No error shows the ticket.
func TestDiskRefused(t *testing.T) {
	t.Parallel()
	disk := sparse(1 << 20)
	answer := func(when, body string) func(*imageiotest.Server, http.ResponseWriter, *http.Request, int) bool {
		return func(_ *imageiotest.Server, w http.ResponseWriter, r *http.Request, _ int) bool {
			if strings.HasSuffix(r.URL.Path, when) && r.Method == http.MethodGet {
				_, _ = io.WriteString(w, body)
				return true
			}
			return false
		}
	}
	lie := func(of string, status int) func(*imageiotest.Server, http.ResponseWriter, *http.Request, int) bool {
		return func(_ *imageiotest.Server, w http.ResponseWriter, r *http.Request, _ int) bool {
			if r.Header.Get("Range") == "" || r.Header.Get("Range") == "bytes=0-0" {
				return false
			}
			w.Header().Set("Content-Range", of)
			w.WriteHeader(status)
			_, _ = w.Write(make([]byte, 4096))
			return true
		}
	}
	for name, c := range map[string]struct {
		hook func(*imageiotest.Server, http.ResponseWriter, *http.Request, int) bool
		want error
		text string
	}{
		"lists less":     {answer("/extents", `[{"start":0,"length":4096,"zero":true}]`), imageio.ErrSize, "lists 4 KiB"},
		"hides data":     {answer("/extents", `[{"start":0,"length":1048576,"zero":false,"hole":true}]`), imageio.ErrHidden, "shallow"},
		"no list":        {answer("/extents", `{"start":0}`), nil, "no JSON array"},
		"another range":  {lie("bytes 4096-8191/1048576", 206), imageio.ErrSize, ""},
		"another disk":   {lie("bytes 0-4095/2097152", 206), imageio.ErrSize, ""},
		"the whole disk": {lie("", 200), nil, "answered 200"},
		"beyond its end": {lie("", 416), nil, "answered 416"},
		"redirected":     {lie("", 302), nil, "answered 302"},
		"the ticket is gone": {func(_ *imageiotest.Server, w http.ResponseWriter, r *http.Request, _ int) bool {
			if r.Header.Get("Range") != "" {
				imageiotest.Fail(w, http.StatusForbidden, "No such ticket "+imageiotest.Ticket)
			}
			return r.Header.Get("Range") != ""
		}, imageio.ErrDenied, "No such ticket TICKET"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			s := imageiotest.Start(t, imageiotest.Config{Disk: disk, ReadOnly: true, Hook: c.hook})
			d, err := imageio.Open(t.Context(), transfer(t, s), imageio.Options{CA: s.CA, Retry: time.Minute})
			if err == nil {
				defer d.Close()
				_, err = d.ReadAt(make([]byte, 4096), 0)
			}
			if err == nil || c.want != nil && !errors.Is(err, c.want) || !strings.Contains(err.Error(), c.text) || strings.Contains(err.Error(), imageiotest.Ticket) {
				t.Errorf("%v", err)
			}
		})
	}
	s := imageiotest.Start(t, imageiotest.Config{Disk: disk})
	if _, err := imageio.Open(t.Context(), transfer(t, s), imageio.Options{Retry: time.Minute}); err == nil || !strings.Contains(err.Error(), "tls-ca") || strings.Contains(err.Error(), imageiotest.Ticket) {
		t.Errorf("a certificate that is not trusted: %v", err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := imageio.Open(ctx, transfer(t, s), imageio.Options{CA: s.CA}); !errors.Is(err, context.Canceled) {
		t.Errorf("cancelled: %v", err)
	}
}

// TestDiskLarger is a transfer of less than the storage has.
func TestDiskLarger(t *testing.T) {
	t.Parallel()
	disk := sparse(1 << 20)
	s := imageiotest.Start(t, imageiotest.Config{Disk: disk, ReadOnly: true, Hook: func(_ *imageiotest.Server, w http.ResponseWriter, r *http.Request, _ int) bool {
		if strings.HasSuffix(r.URL.Path, "/extents") {
			_, _ = io.WriteString(w, `[{"start":0,"length":1048576,"zero":false},{"start":1048576,"length":4096,"zero":false}]`)
			return true
		}
		return false
	}})
	d := openDisk(t, s, imageio.Options{})
	if d.Size() != 1<<20 || len(d.Notes()) != 1 || !bytes.Equal(cbttest.ReadData(t, d, 77_777), disk) {
		t.Errorf("size %d, notes %v", d.Size(), d.Notes())
	}
}

// TestStayAlive tells the service that the transfer is in use while nothing is read.
func TestStayAlive(t *testing.T) {
	t.Parallel()
	s := imageiotest.Start(t, imageiotest.Config{Disk: make([]byte, 4096), ReadOnly: true})
	openDisk(t, s, imageio.Options{Alive: time.Millisecond})
	for s.Seen().Requests[http.MethodOptions] < 5 {
		if t.Context().Err() != nil {
			t.Fatal("the service was not told")
		}
	}
}

func TestLocate(t *testing.T) {
	dir := t.TempDir()
	file := filepath.Join(dir, "with space")
	const url = "https://host:54322/images/secret-ticket"
	if err := os.WriteFile(file, []byte(url+"\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(dir, "bad"), []byte("secret-ticket"), 0o600); err != nil {
		t.Fatal(err)
	}
	t.Setenv("TRANSFER", url)
	for uri, wantCA := range map[string]string{
		"imageio://" + file: "",
		"imageio://" + dir + "/with%20space?tls-ca=/etc/ca.pem": "/etc/ca.pem",
		"imageio+env://TRANSFER":                                "",
		"imageio+env://TRANSFER?tls-ca=ca.pem":                  "ca.pem",
	} {
		tr, ca, err := imageio.Locate(uri)
		if err != nil || ca != wantCA || tr.String() != "the oVirt transfer at host:54322" || strings.Contains(fmt.Sprintf("%v %+v %#v", tr, tr, tr), "secret") {
			t.Errorf("%s: %#v, %q, %v", uri, tr, ca, err)
		}
	}
	for _, uri := range []string{
		url, "imageio://" + dir + "/bad", "imageio://host/images/secret-ticket", "imageio:///x?ca=y", "imageio+env://NOTHING_THERE",
		"imageio+env:///x", "imageio:x", "imageio:///x?tls-ca=", "imageio:///%zz",
	} {
		if tr, _, err := imageio.Locate(uri); !errors.Is(err, imageio.ErrURL) || uri != "imageio://host/images/secret-ticket" && strings.Contains(err.Error(), "secret-ticket") {
			t.Errorf("%s: %v, %v", uri, tr, err)
		}
	}
	if _, _, err := imageio.Locate("imageio:///nothing/there"); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("no file: %v", err)
	}
	for _, text := range []string{"", "x", "https://host/", "https://host/images/", "https://host/images/*", "https://host/images/a/b", "https://u:p@host/images/a", "https://host/images/a?b", "https:///images/a", "http://host/images/a", "ftp://host/images/a", "https://host/images/\x00"} {
		if tr, err := imageio.ParseTransfer(text); !errors.Is(err, imageio.ErrURL) {
			t.Errorf("%q: %v, %v", text, tr, err)
		}
	}
	if tr, err := imageio.ParseTransfer("http://127.0.0.1:1/images/a"); err != nil {
		t.Errorf("plain HTTP on this machine: %v, %v", tr, err)
	}
}
