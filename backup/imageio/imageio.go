// Package imageio reads and writes disks through oVirt's imageio service: random access
// over HTTPS to a disk or a backup that oVirt has opened for one transfer. The service says
// where zeroes are, and in an incremental backup what was written since a checkpoint.
// (oVirt imageio, docs/images.md.)
//
// A transfer is started and ended with oVirt's own API; this package is given its URL, which
// ends in a ticket. Whoever knows the ticket can read and write the disk, so neither appears
// in errors or logs.
//
// The service is not trusted: its answers are bounded, and a disk whose sizes do not agree
// is refused.
package imageio

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"net/url"
	"strings"
	"time"

	"github.com/varve-io/varve/internal/bytesize"
)

// Options of opening a transfer.
type Options struct {
	// CA is a file of certificates in PEM that sign the service's; empty for the system's.
	CA string
	// Connections at most; 0 for DefaultConnections. The service may allow fewer.
	Connections int
	// Retry is how long a request that failed for a passing reason is repeated; 0 for not at
	// all.
	Retry time.Duration
	// Alive is how often the service is told that the transfer is still in use while nothing
	// is read or written; 0 for DefaultAlive.
	Alive time.Duration
	// Log takes what went wrong without harm; nil for nothing.
	Log *slog.Logger

	write bool // connections are for writing too
}

const (
	// DefaultConnections is how many oVirt's own client uses.
	DefaultConnections = 4
	// DefaultAlive is well below the 60 seconds after which oVirt ends an idle transfer
	// (TransferImageClientInactivityTimeoutInSeconds).
	DefaultAlive = 20 * time.Second
)

// Errors that callers decide by.
var (
	// ErrURL means that what should be the URL of a transfer is none.
	ErrURL = errors.New("not the URL of an oVirt transfer, which is https://HOST:54322/images/TICKET")
	// ErrDenied means that the ticket is not valid, or not any more.
	ErrDenied = errors.New("the ticket is not valid: the transfer ended, expired or never was; start a new transfer")
	// ErrSize means that the service says different things of how large the disk is.
	ErrSize = errors.New("the service contradicts itself about the size of the disk")
	// ErrHidden means that the transfer hides the data of a backing file.
	ErrHidden = errors.New("the transfer shows one layer of the disk only; start it without 'shallow'")
	// ErrReadOnly means that the ticket allows no writing.
	ErrReadOnly = errors.New("the transfer is a download; start an upload")
	// ErrTooSmall means that the disk in oVirt has fewer bytes than the one restored.
	ErrTooSmall = errors.New("the disk of the transfer is too small")
)

// Transfer is the URL of a transfer. It prints without its ticket.
type Transfer struct {
	url    *url.URL
	ticket string
}

// ParseTransfer reads the URL of a transfer. The error is ErrURL, and never shows the text.
func ParseTransfer(text string) (*Transfer, error) {
	u, err := url.Parse(text)
	if err != nil {
		return nil, ErrURL // the error beneath quotes the ticket
	}
	dir, ticket, ok := strings.Cut(strings.TrimPrefix(u.Path, "/"), "/")
	switch {
	case u.Scheme != "https" && u.Scheme != "http", u.Hostname() == "", u.User != nil, u.RawQuery != "", u.Fragment != "":
		return nil, ErrURL
	case !ok, dir != "images", ticket == "", ticket == "*", strings.Contains(ticket, "/"):
		return nil, ErrURL
	case u.Scheme == "http" && !loopback(u.Hostname()):
		return nil, fmt.Errorf("%w; http:// is for this machine only: it would show the ticket to the network", ErrURL)
	}
	return &Transfer{u, ticket}, nil
}

func loopback(host string) bool {
	addr, err := netip.ParseAddr(host)
	return host == "localhost" || err == nil && addr.IsLoopback()
}

// String names the host, without the ticket.
func (t *Transfer) String() string {
	host := t.url.Host
	if t.url.Port() == "" {
		host = net.JoinHostPort(t.url.Hostname(), t.url.Scheme)
	}
	return "the oVirt transfer at " + host
}

// GoString does not show the ticket either.
func (t *Transfer) GoString() string { return t.String() }

// LogValue does not show the ticket either.
func (t *Transfer) LogValue() slog.Value { return slog.StringValue(t.String()) }

// Open opens the disk of a transfer. ctx ends all its requests, until Close does.
func Open(ctx context.Context, t *Transfer, opt Options) (_ *Disk, err error) {
	c, err := newClient(ctx, t, opt)
	var untrusted *tls.CertificateVerificationError
	if errors.As(err, &untrusted) {
		err = fmt.Errorf("%w; name the file of the CA that oVirt's certificates are signed by: tls-ca=FILE", err)
	}
	if err != nil {
		return nil, fmt.Errorf("open %s: %w", t, err)
	}
	d := &Disk{client: c}
	defer func() {
		if err != nil {
			_ = d.Close()
		}
	}()
	if c.can("extents") {
		if d.zeroes, _, err = d.extents(zeroContext); err != nil && !errors.Is(err, errNoContext) {
			return nil, err
		}
	}
	if err := d.measure(); err != nil {
		return nil, err
	}
	return d, nil
}

// measure compares what the service lists with what it offers.
func (d *Disk) measure() (err error) {
	listed, t := int64(-1), d.client.transfer
	if d.zeroes != nil {
		listed = d.zeroes.size()
	}
	if listed == 0 {
		return nil // there is no first byte to ask for
	}
	if d.size, err = d.client.size(); err != nil {
		return err
	}
	switch {
	case d.size < 0 && listed < 0:
		return fmt.Errorf("%s: the service does not say how large the disk is", t)
	case d.size < 0:
		d.size = listed
	case listed < 0 || d.size == listed:
	case d.size > listed:
		return fmt.Errorf("%s: %w: it lists %s and offers %s", t, ErrSize, bytesize.Exact(listed), bytesize.Exact(d.size))
	default: // the storage is larger than the disk that was put on it
		d.notes = append(d.notes, fmt.Sprintf("the storage behind the transfer has %s; the transfer is of the first %s", bytesize.Exact(listed), bytesize.Exact(d.size)))
	}
	return nil
}
