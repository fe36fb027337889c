package main

import (
	"crypto/x509"
	"errors"
	"fmt"
	"net"
	"os"
	"strings"
	"syscall"
	"testing"

	"github.com/varve-io/varve/fusefs/diskfs"
	"github.com/varve-io/varve/nbdserver/nbdclient"
	"github.com/varve-io/varve/nbdserver/proto"
)

// An error of the system ends with what to do, unless its text already says so.
func TestHint(t *testing.T) {
	_, missing := os.Open("/nowhere/at/all")
	for _, c := range []struct {
		err  error
		want string
	}{
		{fmt.Errorf("open list: %w", missing), "check the path"},
		{fmt.Errorf("open list: %w: give another one", missing), ""},
		{&net.OpError{Op: "dial", Net: "tcp", Err: os.NewSyscallError("connect", syscall.ECONNREFUSED)}, "nothing listens there"},
		{&net.DNSError{Err: "no such host", Name: "x"}, "spelling"},
		{x509.UnknownAuthorityError{}, "authority"},
		{fmt.Errorf("a/b@latest: %w: there are only zeroes", diskfs.ErrNotRecognised), "varve restore"},
		{&nbdclient.RefusedError{Reply: proto.RepErrUnknown, Text: "no such export"}, "varve nbd list"},
		{&nbdclient.RefusedError{Reply: proto.RepErrTLSRequired}, "nbds://"},
		{&nbdclient.RequestError{Errno: proto.Errno(syscall.EIO), Offset: -1}, "server's log"}, // not this machine's disk
		{errors.New("anything else"), ""},
	} {
		if got := hint(c.err); c.want == "" && got != "" || !strings.Contains(got, c.want) {
			t.Errorf("%v: %q, want %q", c.err, got, c.want)
		}
	}
}

func TestErrorsSayWhatToDoNext(t *testing.T) {
	env, _ := newBackupEnv(t)
	for _, c := range []struct {
		args []string
		want string
	}{
		{[]string{"nbd", "info", "nbd+unix:///?socket=/nowhere"}, "no such file or directory: check the path"},
		{[]string{"backup", "/nowhere", "--volume", "a/b"}, "name a block device or an image file"},
		{[]string{"restore", "shop/db@latest"}, "Usage: varve restore POINT TARGET"},
		{[]string{"list", "shop/db", "--volume", "shop/other"}, "give one"},
		{[]string{"serve", "--listen", "192.0.2.1:0"}, "choose one that it has"},
	} {
		if r := runVarve(t, env, c.args...); r.code == exitOK || !strings.Contains(r.stderr, c.want) {
			t.Errorf("%v: exit code %d\n%s", c.args, r.code, r.stderr)
		}
	}
}
