package nbdattach

import (
	"context"
	"errors"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/mdlayher/genetlink"
	"github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"

	"github.com/varve-io/varve/nbdserver/nbdclient"
	"github.com/varve-io/varve/nbdserver/proto"
)

// script is a list of events; the device is detached after the last.
type script struct {
	events   []any // an error, or the index of a device with a dead connection
	detached bool
}

func (s *script) Receive() ([]genetlink.Message, []netlink.Message, error) {
	if len(s.events) == 0 {
		s.detached = true
		return nil, nil, os.ErrDeadlineExceeded
	}
	e := s.events[0]
	s.events = s.events[1:]
	if err, ok := e.(error); ok {
		return nil, nil, err
	}
	enc := netlink.NewAttributeEncoder()
	enc.Uint32(attrIndex, uint32(e.(int)))
	data, err := enc.Encode()
	return []genetlink.Message{{Header: genetlink.Header{Command: cmdLinkDead}, Data: data}}, nil, err
}

func (s *script) SetReadDeadline(time.Time) error { return nil }
func (s *script) Close() error                    { return nil }

// Every dead connection is replaced, even if the kernel lost events, and a missing server is
// retried until it is back.
func TestWatch(t *testing.T) {
	quiet, tooMuch := os.ErrDeadlineExceeded, &netlink.OpError{Op: "receive", Err: os.NewSyscallError("recvmsg", unix.ENOBUFS)}
	for _, c := range []struct {
		name        string
		connections int
		events      []any
		adopted     bool
		away        int // tries that fail
		want        int
		err         error
	}{
		{"one died", 4, []any{3}, false, 0, 1, nil},
		{"another device's", 4, []any{4, 3, 4}, false, 0, 1, nil},
		{"the server is away", 4, []any{3, 3}, false, 20, 2, nil},
		{"too much news", 4, []any{tooMuch, 3}, false, 0, 5, nil},
		{"a signal", 4, []any{unix.EINTR, 3}, false, 0, 1, nil},
		{"taken over", 4, nil, true, 2, 4, nil},
		{"no news any more", 4, []any{unix.EBADF}, false, 0, 0, unix.EBADF},
		{"the only one died", 1, []any{3, quiet}, false, 3, 1, nil},
		{"the new one ended the old one", 1, []any{3, 3, tooMuch, 3, quiet, 4}, true, 0, 1, nil},
		{"the new one died", 1, []any{3, 3, quiet, 3, quiet}, false, 0, 2, nil},
	} {
		t.Run(c.name, func(t *testing.T) {
			news := &script{events: c.events}
			got := 0
			w := &Watcher{
				log: slog.New(slog.DiscardHandler), news: news,
				free:  func(int) bool { return news.detached },
				pause: func(context.Context, time.Duration) {},
				replace: func(_ context.Context, a *Attachment, u *nbdclient.URI, _ Options, dialed func()) error {
					if u.Export != a.Info.Name {
						t.Errorf("connected to %q", u.Export)
					}
					if c.away > 0 {
						c.away--
						return errors.New("connection refused")
					}
					dialed()
					got++
					return nil
				},
			}
			a := &Attachment{Index: 3, Info: nbdclient.Info{Name: "shop/db@1"}, connections: c.connections, adopted: c.adopted}
			err := w.Watch(t.Context(), a, &nbdclient.URI{Export: "shop/db@latest"}, Options{})
			if !errors.Is(err, c.err) || got != c.want {
				t.Errorf("%d connections, %v; want %d, %v", got, err, c.want, c.err)
			}
		})
	}
}

// The kernel gets the disk's identity, and how long requests wait, even if that is zero.
func TestConnectRequest(t *testing.T) {
	info := nbdclient.Info{Name: "shop/db@2026-11-20T10:00:00Z", Size: 1000, Flags: proto.FlagReadOnly, Description: "full"}
	attributes := func(e *netlink.AttributeEncoder) map[uint16][]byte {
		b, err := e.Encode()
		if err != nil {
			t.Fatal(err)
		}
		d, err := netlink.NewAttributeDecoder(b)
		if err != nil {
			t.Fatal(err)
		}
		m := map[uint16][]byte{}
		for d.Next() {
			m[d.Type()] = d.Bytes()
		}
		return m
	}
	got := attributes(connectRequest(&dialed{info: info}, Options{Index: 2}))
	if b := strings.TrimSuffix(string(got[attrBackend]), "\x00"); b != "varve 1000 - shop/db@2026-11-20T10:00:00Z" {
		t.Errorf("the disk is %q", b)
	}
	if b := got[attrDeadTimeout]; !slices.Equal(b, make([]byte, 8)) {
		t.Errorf("requests wait % x", b)
	}
	if _, ok := got[attrTimeout]; ok {
		t.Error("requests have a timeout")
	}
	a := &Attachment{Index: 2, backend: backendOf(info)}
	got = attributes(a.renewal(&dialed{}, Options{DeadTimeout: time.Minute}))
	if b := got[attrDeadTimeout]; len(b) != 8 || b[0] != 60 {
		t.Errorf("requests wait % x", b)
	}
	if b := strings.TrimSuffix(string(got[attrBackend]), "\x00"); b != a.backend {
		t.Errorf("the disk is %q", b)
	}
}

// A device continues with its own disk only. A writable disk with another overlay is another
// disk.
func TestSameDisk(t *testing.T) {
	ro := nbdclient.Info{Name: "shop/db@1", Size: 4096, Flags: proto.FlagReadOnly, Description: "full"}
	rw := nbdclient.Info{Name: "shop/db@1", Size: 4096, Description: "full, overlay 11"}
	change := func(i nbdclient.Info, f func(*nbdclient.Info)) nbdclient.Info { f(&i); return i }
	for _, c := range []struct {
		was, now nbdclient.Info
		want     string
	}{
		{ro, ro, ""},
		{ro, change(ro, func(i *nbdclient.Info) { i.Description = "incremental" }), ""},
		{ro, change(ro, func(i *nbdclient.Info) { i.Size++ }), "4097"},
		{ro, change(ro, func(i *nbdclient.Info) { i.Name = "shop/db@2" }), "shop/db@2"},
		{rw, rw, ""},
		{rw, change(rw, func(i *nbdclient.Info) { i.Description = "full, overlay 12" }), "another overlay"},
		{rw, ro, "another overlay"},
	} {
		for _, backend := range []string{backendOf(c.was), ""} {
			err := (&Attachment{Info: c.was, backend: backend}).same(c.now)
			if (err == nil) != (c.want == "") || err != nil && !strings.Contains(err.Error(), c.want) {
				t.Errorf("%+v, then %+v: %v", c.was, c.now, err)
			}
		}
		info, ok := parseBackend(backendOf(c.was))
		if !ok || info.Name != c.was.Name || info.Size != c.was.Size || info.Flags != c.was.Flags {
			t.Errorf("%q is read as %+v, %v", backendOf(c.was), info, ok)
		}
	}
	if b := backendOf(nbdclient.Info{Name: strings.Repeat("x", 2000)}) + backendOf(nbdclient.Info{Name: "a\nb"}); b != "" {
		t.Errorf("a name that does not fit is given as %q", b)
	}
	for asked, want := range map[string]bool{"shop/db@1": true, "shop/db@latest": true, "shop/db@latest~1": true, "shop/db2@latest": false, "shop/other@latest": false, "": false} {
		if mayMean(asked, "shop/db@1") != want {
			t.Errorf("%q: %v", asked, !want)
		}
	}
}

func FuzzBackend(f *testing.F) {
	f.Add("varve 1000 - shop/db@1")
	f.Add("varve 1 0123456789abcdef ")
	f.Add("something else")
	f.Fuzz(func(t *testing.T, text string) {
		info, ok := parseBackend(text)
		if ok && !strings.HasSuffix(text, " "+info.Name) {
			t.Errorf("%q is read as %+v", text, info)
		}
	})
}

// The kernel must not repeat a write that may still be in progress.
func TestWritableTakesOneConnection(t *testing.T) {
	ro, rw := nbdclient.Info{Flags: proto.FlagReadOnly}, nbdclient.Info{}
	for _, o := range []Options{{Connections: 2}, {Connections: 1, Timeout: time.Second}} {
		if err := o.check(rw); !errors.Is(err, ErrWritable) {
			t.Errorf("%+v: %v", o, err)
		}
		if err := o.check(ro); err != nil {
			t.Errorf("%+v, read-only: %v", o, err)
		}
	}
	if err := (Options{Connections: 1, DeadTimeout: time.Minute}).check(rw); err != nil {
		t.Error(err)
	}
}

func TestTune(t *testing.T) {
	for hardware, want := range map[string]string{"32768": "1024", "512": "512", "": "1024"} {
		queue := t.TempDir()
		for name, value := range map[string]string{"io_timeout": "30000\n", "max_sectors_kb": "128\n", "max_hw_sectors_kb": hardware + "\n"} {
			if err := os.WriteFile(filepath.Join(queue, name), []byte(value), 0o600); err != nil {
				t.Fatal(err)
			}
		}
		if err := tune(queue, oneIOTimeout); err != nil {
			t.Fatal(err)
		}
		if timeout, sectors := readSys(queue, "io_timeout"), readSys(queue, "max_sectors_kb"); timeout != "5000" || sectors != want {
			t.Errorf("of %q: %s ms, %s KiB", hardware, timeout, sectors)
		}
	}
	if err := tune(t.TempDir(), time.Second); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("%v", err)
	}
}
