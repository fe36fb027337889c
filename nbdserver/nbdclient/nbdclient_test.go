package nbdclient

import (
	"bytes"
	"context"
	"net"
	"testing"
	"time"

	"github.com/varve-io/varve/nbdserver/proto"
)

func TestParseURI(t *testing.T) {
	for in, want := range map[string]URI{
		"nbd://example.com/disk":                   {Network: "tcp", Address: "example.com:10809", Export: "disk", ServerName: "example.com"},
		"nbd://example.com":                        {Network: "tcp", Address: "example.com:10809", ServerName: "example.com"},
		"nbd://example.com//disk":                  {Network: "tcp", Address: "example.com:10809", Export: "/disk", ServerName: "example.com"},
		"nbd://example.com/hello%20world":          {Network: "tcp", Address: "example.com:10809", Export: "hello world", ServerName: "example.com"},
		"nbds://[::1]:99/x":                        {TLS: true, Network: "tcp", Address: "[::1]:99", Export: "x", ServerName: "::1"},
		"nbd+unix:///shop/db@latest?socket=/run/v": {Network: "unix", Address: "/run/v", Export: "shop/db@latest"},
		"nbd+unix:///?socket=%00name":              {Network: "unix", Address: "@name"},
		"nbd+unix:///a+b?socket=/run/a+b.sock":     {Network: "unix", Address: "/run/a+b.sock", Export: "a+b"},
		"nbd+unix:///?socket=/my%20dir/%2B%26":     {Network: "unix", Address: "/my dir/+&"},
		"nbds+unix:///a?socket=s&tls-hostname=h&tls-verify-peer=0&tls-certificates=/pki&x-y=1": {TLS: true, Network: "unix",
			Address: "s", Export: "a", ServerName: "h", NoVerify: true, Certificates: "/pki"},
	} {
		got, err := ParseURI(in)
		if err != nil || *got != want {
			t.Errorf("%s: %+v, %v", in, got, err)
			continue
		}
		if again, err := ParseURI(got.String()); err != nil || *again != want {
			t.Errorf("%s became %s: %+v, %v", in, got, again, err)
		}
	}
	for _, bad := range []string{"", "disk", "http://x", "nbd:///disk", "nbd:x", "nbd+unix:///disk", "nbd://h?socket=s",
		"nbd://h:0/", "nbd://h:99999/", "nbd://h/x#y", "nbd://h/?colour=red", "nbd://h/a%00b", "nbds://h/?tls-type=psk", "nbd://h/%zz"} {
		if u, err := ParseURI(bad); err == nil {
			t.Errorf("%q is taken for %+v", bad, u)
		}
	}
}

// Other clients know no + for a blank.
func TestURIOfABlank(t *testing.T) {
	u := URI{Network: "unix", Address: "/tmp/my dir/a+b", Export: "c d"}
	if got := u.String(); got != "nbd+unix:///c%20d?socket=/tmp/my%20dir/a%2Bb" {
		t.Error(got)
	}
}

func FuzzParseURI(f *testing.F) {
	f.Add("nbd+unix:///shop/db@latest?socket=/run/v&tls-hostname=x")
	f.Add("nbds://[::1]:99//x")
	f.Fuzz(func(t *testing.T, s string) {
		u, err := ParseURI(s)
		if err != nil {
			return
		}
		again, err := ParseURI(u.String())
		if err != nil || *again != *u {
			t.Errorf("%q: %+v became %q: %+v, %v", s, u, u, again, err)
		}
	})
}

// FuzzServerBytes feeds whatever a server may send to the client: it must end,
// and never panic.
func FuzzServerBytes(f *testing.F) {
	hello := append([]byte("NBDMAGICIHAVEOPT"), 0, 3)
	ack := []byte{0, 3, 0xe8, 0x89, 4, 0x55, 0x65, 0xa9, 0, 0, 0, 8, 0, 0, 0, 1, 0, 0, 0, 0}
	f.Add(append(bytes.Clone(hello), ack...))
	info := []byte{0, 3, 0xe8, 0x89, 4, 0x55, 0x65, 0xa9, 0, 0, 0, 7, 0, 0, 0, 3, 0, 0, 0, 12, 0, 0, 0, 0, 0, 0, 0, 0, 16, 0, 0, 1}
	done := []byte{0, 3, 0xe8, 0x89, 4, 0x55, 0x65, 0xa9, 0, 0, 0, 7, 0, 0, 0, 1, 0, 0, 0, 0}
	chunk := []byte{0x66, 0x8e, 0x33, 0xef, 0, 1, 0, 2, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 12, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 2, 0}
	f.Add(bytes.Join([][]byte{hello, ack, info, done, chunk}, nil))
	f.Fuzz(func(t *testing.T, b []byte) {
		ours, theirs := net.Pipe()
		defer func() { _ = ours.Close() }()
		go func() {
			go func() { // swallow what the client says
				buf := make([]byte, 4096)
				for {
					if _, err := theirs.Read(buf); err != nil {
						return
					}
				}
			}()
			_ = theirs.SetWriteDeadline(time.Now().Add(5 * time.Second))
			_, _ = theirs.Write(b)
			_ = theirs.Close()
		}()
		ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
		defer cancel()
		c, err := New(ours)
		if err != nil {
			return
		}
		if _, err := c.Negotiate(Structured); err != nil {
			return
		}
		e, err := c.Go("x")
		if err != nil {
			return
		}
		p := bytes.Repeat([]byte{1}, 512)
		if _, err := e.ReadAt(ctx, p, 0); err == nil && bytes.Contains(p, []byte{1, 1, 1, 1, 1, 1, 1, 1}) && !bytes.Contains(b, []byte{1, 1, 1, 1, 1, 1, 1, 1}) {
			t.Error("read succeeded without all bytes")
		}
		_, _ = e.BlockStatus(ctx, 0, 512, proto.CmdFlagReqOne)
		_ = e.Close()
	})
}
