package repository

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"net/url"
	"os"
	"strconv"
	"strings"

	"github.com/kopia/kopia/repo/blob"
	"github.com/kopia/kopia/repo/blob/azure"
	"github.com/kopia/kopia/repo/blob/b2"
	"github.com/kopia/kopia/repo/blob/gcs"
	"github.com/kopia/kopia/repo/blob/s3"
	"github.com/kopia/kopia/repo/blob/sftp"
	"github.com/kopia/kopia/repo/blob/webdav"
	"golang.org/x/crypto/ssh"
	"golang.org/x/crypto/ssh/knownhosts"
)

// Guarded is a storage named by an untrusted user, who must not reach through this process
// what only this process can reach. S3, SFTP and WebDAV are refused at loopback, link-local
// and metadata addresses, by any name or redirect. The hosts of GCS, Azure and B2 belong to
// their providers: a caller that lets others choose parts of their names checks those. Call
// GuardTransport first.
type Guarded struct{ Storage Storage }

func (s *Guarded) validate() error {
	if _, err := s.options(); err != nil {
		return err
	}
	return s.Storage.validate()
}

// guardedType is the type in the connection's configuration, so that the storage stays
// guarded when it is opened again. Stock Kopia does not know it.
const guardedType = "varve-guarded"

// guardedOptions are the configuration.
type guardedOptions struct {
	Storage blob.ConnectionInfo `json:"storage"`
}

func (s *Guarded) options() (*guardedOptions, error) {
	var ci blob.ConnectionInfo
	switch o := s.Storage.(type) {
	case *S3:
		ci = blob.ConnectionInfo{Type: "s3", Config: o.options()}
	case *GCS:
		ci = blob.ConnectionInfo{Type: "gcs", Config: o.options()}
	case *Azure:
		ci = blob.ConnectionInfo{Type: "azureBlob", Config: o.options()}
	case *B2:
		ci = blob.ConnectionInfo{Type: "b2", Config: o.options()}
	case *SFTP:
		ci = blob.ConnectionInfo{Type: "sftp", Config: o.options()}
	case *WebDAV:
		ci = blob.ConnectionInfo{Type: "webdav", Config: o.options()}
	default:
		return nil, invalid("a storage of type %T cannot be guarded", s.Storage)
	}
	return &guardedOptions{Storage: ci}, nil
}

func (s *Guarded) open(ctx context.Context, create bool) (blob.Storage, error) {
	o, err := s.options()
	if err != nil {
		return nil, err
	}
	return openGuarded(ctx, o, create)
}

func init() { RegisterStorage(guardedType, openGuarded) }

// unguarded returns the storage without its guard.
func unguarded(ci blob.ConnectionInfo) blob.ConnectionInfo {
	if o, ok := ci.Config.(*guardedOptions); ok {
		return o.Storage
	}
	return ci
}

func openGuarded(ctx context.Context, o *guardedOptions, create bool) (blob.Storage, error) {
	if !transportIsGuarded(ctx) {
		return nil, invalid("this process is not fit to open a guarded storage")
	}
	ctx = guard(ctx)
	var st blob.Storage
	var err error
	switch c := o.Storage.Config.(type) {
	case *s3.Options:
		if err := checkHost(ctx, c.Endpoint); err != nil {
			return nil, err
		}
		st, err = s3.New(ctx, c, create)
	case *webdav.Options:
		u, perr := url.Parse(c.URL)
		if perr != nil {
			return nil, invalid("the URL of a WebDAV repository: %v", perr)
		}
		if err := checkHost(ctx, u.Host); err != nil {
			return nil, err
		}
		if c.TrustedServerCertificateFingerprint != "" {
			return nil, invalid("a guarded WebDAV storage takes no certificate fingerprint")
		}
		by := *c
		by.URL = guardedScheme + c.URL
		if create {
			by.Options = shardsOf(create)
		}
		st, err = webdav.New(ctx, &by, create)
	case *sftp.Options:
		by, perr := pinned(ctx, *c)
		if perr != nil {
			return nil, perr
		}
		if create {
			by.Options = shardsOf(create)
		}
		st, err = sftp.New(ctx, by, create)
	case *gcs.Options:
		st, err = gcs.New(ctx, c, create)
	case *azure.Options:
		st, err = azure.New(ctx, c, create)
	case *b2.Options:
		st, err = b2.New(ctx, c, create)
	default:
		return nil, invalid("a storage of type %s cannot be guarded", o.Storage.Type)
	}
	if err != nil {
		return nil, err
	}
	return &guardedStorage{Storage: explainDenials(st), options: o}, nil
}

// pinned returns the options with the address in place of the host's name: the SSH client
// dials by itself, and would resolve the name again. The known host keys are those of the
// name.
func pinned(ctx context.Context, o sftp.Options) (*sftp.Options, error) {
	if o.ExternalSSH || o.Keyfile != "" || o.KnownHostsFile != "" {
		return nil, invalid("a guarded SFTP storage takes its keys as text, and no other program")
	}
	if err := checkHost(ctx, o.Host); err != nil {
		return nil, err
	}
	named := net.JoinHostPort(o.Host, strconv.Itoa(o.Port))
	conn, err := guardedDialer().DialContext(ctx, "tcp", named)
	if errors.Is(err, ErrForbiddenAddress) {
		return nil, invalid("%s: %v", o.Host, ErrForbiddenAddress)
	}
	if err != nil {
		return nil, err
	}
	remote := conn.RemoteAddr()
	conn.Close()
	at, err := netip.ParseAddrPort(remote.String())
	if err != nil {
		return nil, fmt.Errorf("address of %s: %w", o.Host, err)
	}
	if o.KnownHostsData, err = knownAs(o.KnownHostsData, named, at, remote); err != nil {
		return nil, err
	}
	if o.Host = at.Addr().String(); at.Addr().Is6() {
		o.Host = "[" + o.Host + "]" // Kopia writes host:port
	}
	return &o, nil
}

// knownAs copies the lines of a known_hosts file that are about a name, for an address.
func knownAs(data, named string, at netip.AddrPort, remote net.Addr) (string, error) {
	var out strings.Builder
	out.WriteString(strings.TrimRight(data, "\n") + "\n")
	for line := range strings.Lines(data) {
		marker, _, key, _, _, err := ssh.ParseKnownHosts([]byte(line))
		if err != nil {
			continue // a comment or an empty line; the client reports invalid lines
		}
		about, err := lineKnows(line, marker, named, remote, key)
		if err != nil {
			return "", err
		}
		if !about {
			continue
		}
		if marker != "" {
			marker = "@" + marker + " "
		}
		out.WriteString(marker + knownhosts.Line([]string{at.String()}, key) + "\n")
	}
	return out.String(), nil
}

// lineKnows reports whether a line of a known_hosts file is about a host, hashed names
// and patterns included.
func lineKnows(line, marker, named string, remote net.Addr, key ssh.PublicKey) (bool, error) {
	// A marker changes the meaning of the key, not the hosts of the line.
	line = strings.TrimSpace(strings.TrimPrefix(strings.TrimSpace(line), "@"+marker))
	f, err := os.CreateTemp("", "known-hosts-") // the package reads files only
	if err != nil {
		return false, fmt.Errorf("known hosts: %w", err)
	}
	defer os.Remove(f.Name())
	_, err = f.WriteString(line + "\n")
	if err := errors.Join(err, f.Close()); err != nil {
		return false, fmt.Errorf("known hosts: %w", err)
	}
	check, err := knownhosts.New(f.Name())
	if err != nil {
		return false, invalid("known hosts: %v", err)
	}
	err = check(named, remote, key)
	return err == nil, nil
}

// guardedStorage adds the guard to each request's context.
type guardedStorage struct {
	blob.Storage
	options *guardedOptions
}

var _ blob.Storage = (*guardedStorage)(nil)

func (s *guardedStorage) ConnectionInfo() blob.ConnectionInfo {
	return blob.ConnectionInfo{Type: guardedType, Config: s.options}
}

func (s *guardedStorage) GetCapacity(ctx context.Context) (blob.Capacity, error) {
	return s.Storage.GetCapacity(guard(ctx))
}

func (s *guardedStorage) GetBlob(ctx context.Context, id blob.ID, offset, length int64, out blob.OutputBuffer) error {
	return s.Storage.GetBlob(guard(ctx), id, offset, length, out)
}

func (s *guardedStorage) GetMetadata(ctx context.Context, id blob.ID) (blob.Metadata, error) {
	return s.Storage.GetMetadata(guard(ctx), id)
}

func (s *guardedStorage) ListBlobs(ctx context.Context, prefix blob.ID, each func(blob.Metadata) error) error {
	return s.Storage.ListBlobs(guard(ctx), prefix, each)
}

func (s *guardedStorage) PutBlob(ctx context.Context, id blob.ID, data blob.Bytes, opt blob.PutOptions) error {
	return s.Storage.PutBlob(guard(ctx), id, data, opt)
}

func (s *guardedStorage) DeleteBlob(ctx context.Context, id blob.ID) error {
	return s.Storage.DeleteBlob(guard(ctx), id)
}

func (s *guardedStorage) FlushCaches(ctx context.Context) error {
	return s.Storage.FlushCaches(guard(ctx))
}

func (s *guardedStorage) ExtendBlobRetention(ctx context.Context, id blob.ID, opt blob.ExtendOptions) error {
	return s.Storage.ExtendBlobRetention(guard(ctx), id, opt)
}

func (s *guardedStorage) Close(ctx context.Context) error {
	return s.Storage.Close(guard(ctx))
}
