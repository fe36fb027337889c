package source

import (
	"bytes"
	"context"
	"fmt"
	"path/filepath"
	"strings"

	"github.com/varve-io/varve/backup/libvirt"
	"github.com/varve-io/varve/backup/qemu"
	"github.com/varve-io/varve/internal/plain"
	"github.com/varve-io/varve/nbdserver/nbdclient"
)

// sshHost is another machine, on which QEMU's programs run over ssh.
type sshHost struct{ uri *libvirt.URI }

func (h sshHost) qemu() qemu.Host { return qemu.Host{Command: h.uri.Command} }

func (h sshHost) serve(ctx context.Context, s qemu.Serve) (imageServer, error) {
	l, err := h.uri.Listen(ctx, filepath.Dir(s.Path), func(socket string) []string {
		return append([]string{"qemu-nbd", "-k", socket}, s.Args()...)
	})
	if err != nil {
		return nil, qemu.Explain("qemu-nbd", err.Error(), err)
	}
	return sshServer{l}, nil
}

func (h sshHost) stamp(ctx context.Context, path string) (string, error) {
	cmd, err := h.uri.Command(ctx, "/", "stat", "-L", "-c", "%d %i %s %y", "--", path)
	if err != nil {
		return "", err
	}
	var said bytes.Buffer
	cmd.Stderr = &said
	out, err := cmd.Output()
	if err != nil {
		return "", fmt.Errorf("%s of %s: %w: %s", path, h.uri.Host, err, plain.Clip(strings.TrimSpace(said.String()), 500))
	}
	return string(out), nil
}

// sshServer is a qemu-nbd of another machine.
type sshServer struct{ *libvirt.Listener }

func (s sshServer) URI() *nbdclient.URI {
	return &nbdclient.URI{Network: "unix", Address: s.Socket()}
}

// Hide has nothing to remove: the socket is in a folder of this user's.
func (sshServer) Hide() error { return nil }
