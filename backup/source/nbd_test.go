package source_test

import (
	"bytes"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/varve-io/varve/backup/nbddisk"
	"github.com/varve-io/varve/backup/source"
	"github.com/varve-io/varve/fusefs/diskfs/diskfstest"
)

// serveNBD runs a server of others on a socket until the test ends, or stop is called.
func serveNBD(t *testing.T, name string, args ...string) (stop func()) {
	t.Helper()
	diskfstest.NeedTool(t, name)
	pid := filepath.Join(t.TempDir(), "pid")
	flag := "--pid-file"
	if name == "nbdkit" {
		flag = "-P"
	}
	cmd := exec.Command(name, append([]string{flag, pid}, args...)...)
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	ended := make(chan struct{})
	var why error
	go func() { why = cmd.Wait(); close(ended) }()
	stop = func() { _ = cmd.Process.Kill(); <-ended }
	t.Cleanup(stop)
	for {
		if _, err := os.Stat(pid); err == nil {
			return stop
		}
		select {
		case <-ended:
			t.Fatalf("the server did not start: %v", why)
		case <-time.After(5 * time.Millisecond):
		}
	}
}

// TestNBDBitmap is a server's own bitmap, from the state in which it began to another.
func TestNBDBitmap(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	path, sock := filepath.Join(dir, "vm.qcow2"), filepath.Join(dir, "sock")
	uri := "nbd+unix:///disk?socket=" + sock
	tool(t, "qemu-img", "create", "-q", "-f", "qcow2", path, "8M")
	write(t, path, "write -P 1 0 4M")
	tool(t, "qemu-img", "bitmap", "--add", path, "monday")
	before := &state{bytes: contents(t, path), id: "monday"}
	write(t, path, "write -P 2 1M 64k", "discard 2M 1M")
	now := contents(t, path)
	serveNBD(t, "qemu-nbd", "-t", "-r", "-e", "8", "-f", "qcow2", "-x", "disk", "-B", "monday", "-k", sock, path)

	opt := source.Options{Bitmap: "monday", ChangeID: "tuesday"}
	next := take(t, uri, opt, before)
	if next.by != "bitmap" || next.id != "tuesday" || !bytes.Equal(next.bytes, now) {
		t.Errorf("by %s (%v), change ID %q, or other bytes", next.by, next.why, next.id)
	}
	before.id = "sunday"
	if next = take(t, uri, opt, before); next.by != "allocation" || len(next.why) != 1 || !bytes.Equal(next.bytes, now) {
		t.Errorf("of another base: by %s (%v), or other bytes", next.by, next.why)
	}
	if full := take(t, uri, source.Options{}, nil); full.by != "allocation" || !bytes.Equal(full.bytes, now) {
		t.Errorf("a full is by %s, or has other bytes", full.by)
	}
	if _, err := source.Open(t.Context(), uri, source.Options{Bitmap: "none"}); !errors.Is(err, nbddisk.ErrNoBitmap) {
		t.Errorf("a bitmap that is not there: %v", err)
	}
	if _, err := source.Open(t.Context(), uri, source.Options{Track: true}); !errors.Is(err, source.ErrNoTracking) {
		t.Errorf("tracking an export: %v", err)
	}
	if _, err := source.Open(t.Context(), "nbd://", source.Options{}); !errors.Is(err, source.ErrURI) {
		t.Errorf("a URI without a host: %v", err)
	}
}

// TestNBDOfNBDKit is a server with sectors of 512 bytes that reports no allocation.
func TestNBDOfNBDKit(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	sock := filepath.Join(dir, "sock")
	serveNBD(t, "nbdkit", "-f", "-U", sock, "--filter=noextents", "--filter=blocksize-policy", "pattern", "4M", "blocksize-minimum=512", "blocksize-preferred=4096", "blocksize-maximum=64K", "blocksize-error-policy=error")
	s, err := source.Open(t.Context(), "nbd+unix:///?socket="+sock, source.Options{})
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	full := takeSession(t, s, nil)
	for _, off := range []int64{0, 1, 511, 513, 70_001, 4<<20 - 3} {
		p := make([]byte, 200_000)
		n, _ := s.Disks()[0].Bytes.ReadAt(p, off)
		if want := min(int64(len(p)), 4<<20-off); int64(n) != want || !bytes.Equal(p[:n], full.bytes[off:off+want]) {
			t.Errorf("%d bytes at %d, want %d, or others", n, off, want)
		}
	}
	if full.bytes[4<<20-1] != 0xf8 { // the offset of the last 8 bytes ends so
		t.Errorf("the last byte is %#x", full.bytes[4<<20-1])
	}
}

// TestNBDRestarted has a server that is started again while a backup reads, and says less then: what
// is read is the same disk, or an error.
func TestNBDRestarted(t *testing.T) {
	t.Parallel()
	for name, c := range map[string]struct {
		args []string // of the second server, beside those of the first
		want error
		text string
	}{
		"the same":           {nil, nil, ""},
		"without allocation": {[]string{"--no-sr"}, nbddisk.ErrOtherDisk, nbddisk.Allocation},
		"another moment":     {[]string{"offset=8M"}, nbddisk.ErrOtherMoment, "no point was made"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			dir := t.TempDir()
			sock, path := filepath.Join(dir, "sock"), filepath.Join(dir, "disk")
			content := bytes.Repeat([]byte("monday  "), 1<<20)
			if err := os.WriteFile(path, append(bytes.Clone(content), bytes.Repeat([]byte("tuesday "), 1<<20)...), 0o600); err != nil {
				t.Fatal(err)
			}
			serve := func(more ...string) func() {
				return serveNBD(t, "nbdkit", append([]string{"-f", "-r", "-U", sock, "--filter=offset", "file", path, "range=8M"}, more...)...)
			}
			stop := serve()
			s, err := source.Open(t.Context(), "nbd+unix:///?socket="+sock, source.Options{})
			if err != nil {
				t.Fatal(err)
			}
			defer s.Close()
			disk := s.Disks()[0].Bytes
			if _, err := disk.ReadAt(make([]byte, 4<<20), 0); err != nil {
				t.Fatal(err)
			}
			stop()
			_ = os.Remove(sock)
			serve(c.args...)
			got := make([]byte, 8<<20)
			if _, err = disk.ReadAt(got, 0); err == nil {
				err = s.Check(t.Context())
			}
			if c.want == nil && (err != nil || !bytes.Equal(got, content)) {
				t.Errorf("the same disk: %v, or other bytes", err)
			}
			if c.want != nil && (!errors.Is(err, c.want) || !strings.Contains(err.Error(), c.text)) {
				t.Errorf("want %v with %q: %v", c.want, c.text, err)
			}
		})
	}
}
