package source

import (
	"context"
	"errors"

	golibvirt "github.com/digitalocean/go-libvirt"

	"github.com/varve-io/varve/backup/libvirt"
)

// libvirtAgent is the guest agent of a domain, which libvirt is connected to.
type libvirtAgent struct {
	conn   *libvirt.Conn
	domain golibvirt.Domain
}

func openLibvirtFreezer(ctx context.Context, target string) (freezer, error) {
	uri, err := libvirt.ParseURI(target)
	if err != nil {
		return nil, err
	}
	conn, err := libvirt.Dial(ctx, uri, "", "")
	if err != nil {
		return nil, err
	}
	domain, err := conn.Domain(uri)
	if err != nil {
		return nil, errors.Join(err, conn.Close())
	}
	return libvirtAgent{conn, domain}, nil
}

func (a libvirtAgent) freeze(context.Context) error {
	return a.conn.Freeze(a.domain)
}

func (a libvirtAgent) thaw(context.Context) error {
	return a.conn.Thaw(a.domain)
}

// thawed is not known: to ask the agent past libvirt would mark the domain as tainted. To thaw a
// guest that is not frozen does no harm.
func (a libvirtAgent) thawed(context.Context) bool { return false }

func (a libvirtAgent) close() error { return a.conn.Close() }
