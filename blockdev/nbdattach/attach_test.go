package nbdattach

import (
	"bytes"
	"errors"
	"net"
	"strings"
	"testing"

	"github.com/varve-io/varve/nbdserver"
	"github.com/varve-io/varve/nbdserver/nbdclient"
	"github.com/varve-io/varve/nbdserver/nbdtest"
)

func TestParseDevice(t *testing.T) {
	for in, want := range map[string]int{"/dev/nbd0": 0, "nbd15": 15, "3": 3, "/dev/sda": -1, "": -1, "nbd-1": -1, "/dev/nbd9999999": -1} {
		n, err := ParseDevice(in)
		if (err == nil) != (want >= 0) || err == nil && n != want {
			t.Errorf("%q: %d, %v", in, n, err)
		}
	}
}

// The kernel gets connections at the first request, with simple replies.
func TestDial(t *testing.T) {
	_, socket := nbdtest.Serve(t, nbdserver.Config{Catalog: nbdserver.NewStatic(nbdserver.Opened{Name: "disk", Export: nbdtest.NewDisk(nbdtest.Image())})})
	u := &nbdclient.URI{Network: "unix", Address: socket, Export: "disk"}
	d, err := dial(t.Context(), u, 4)
	if err != nil {
		t.Fatal(err)
	}
	defer d.close()
	if len(d.conns) != 4 || d.info.Size != nbdtest.ImageSize {
		t.Errorf("%d connections to %+v", len(d.conns), d.info)
	}
	for _, c := range d.conns {
		request := bytes.Join([][]byte{
			{0x25, 0x60, 0x95, 0x13, 0, 0, 0, 0, 1, 2, 3, 4, 5, 6, 7, 8}, make([]byte, 8), {0, 0, 2, 0},
		}, nil)
		if _, err := c.Write(request); err != nil {
			t.Fatal(err)
		}
		reply := make([]byte, 16+512)
		if _, err := readFull(c, reply); err != nil {
			t.Fatal(err)
		}
		if !bytes.Equal(reply[:4], []byte{0x67, 0x44, 0x66, 0x98}) || !bytes.Equal(reply[16:], nbdtest.Image()[:512]) {
			t.Errorf("reply % x", reply[:16])
		}
	}
	for _, bad := range []struct {
		u    *nbdclient.URI
		n    int
		want string
	}{
		{u, 0, "1 to 64"},
		{u, 65, "1 to 64"},
		{&nbdclient.URI{Network: "unix", Address: socket, Export: "disk", TLS: true}, 1, "TLS"},
		{&nbdclient.URI{Network: "unix", Address: socket, Export: "other"}, 1, "refused"},
	} {
		if _, err := dial(t.Context(), bad.u, bad.n); err == nil || !strings.Contains(err.Error(), bad.want) {
			t.Errorf("%d connections to %v: %v", bad.n, bad.u, err)
		}
	}
}

func readFull(c net.Conn, p []byte) (n int, err error) {
	for n < len(p) && err == nil {
		var k int
		k, err = c.Read(p[n:])
		n += k
	}
	return n, err
}

// Without the driver the error says so.
func TestNoDriver(t *testing.T) {
	if hasDriver() {
		t.Skip("this kernel has the nbd driver loaded")
	}
	_, err := Connect(t.Context(), &nbdclient.URI{Network: "unix", Address: "/nonexistent"}, Options{Index: Any, Connections: 1})
	if !errors.Is(err, ErrNoDriver) {
		t.Errorf("%v", err)
	}
	if err := Disconnect(0); !errors.Is(err, ErrNoDriver) {
		t.Errorf("%v", err)
	}
}
