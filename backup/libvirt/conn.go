// Package libvirt connects to libvirt, on this machine or another, and reads and writes what
// libvirt says in XML. The calls are those of github.com/digitalocean/go-libvirt.
package libvirt

import (
	"cmp"
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"net"
	"net/url"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync/atomic"
	"time"

	"github.com/digitalocean/go-libvirt"
	"github.com/digitalocean/go-libvirt/socket/dialers"
)

// Errors that callers decide by.
var (
	// ErrURI means that a URI is malformed.
	ErrURI = errors.New("malformed name of a libvirt domain")
	// ErrNoDomain means that there is no domain of this name.
	ErrNoDomain = errors.New("libvirt has no such domain")
)

// URI names a domain: libvirt:///DOMAIN, libvirt+ssh://[user@]host[:port]/DOMAIN or
// libvirt+tls://host[:port]/DOMAIN.
type URI struct {
	Transport string // "", "ssh" or "tls"
	User      string
	Host      string
	Port      string
	Domain    string // its name or UUID; empty for none in particular
	Connect   string // libvirt's own name of the connection, such as qemu:///system
	Socket    string // of libvirt on its machine; empty for the usual one
	PKI       string // directory with cacert.pem, clientcert.pem and clientkey.pem; empty for libvirt's
	NBDPort   int    // of the NBD server that libvirt starts for a backup over TLS

	// Timeout is how long libvirt may take to answer a call; 0 for DefaultTimeout.
	Timeout time.Duration
}

// DefaultNBDPort is NBD's (IANA).
const DefaultNBDPort = 10809

// ParseURI reads a URI. The error is ErrURI.
func ParseURI(text string) (*URI, error) {
	u, err := url.Parse(text)
	if err != nil {
		return nil, fmt.Errorf("%w: %w", ErrURI, err)
	}
	wrong := func(format string, args ...any) (*URI, error) {
		return nil, fmt.Errorf("%w: %s: %s", ErrURI, text, fmt.Sprintf(format, args...))
	}
	out := &URI{Host: u.Hostname(), Port: u.Port(), Domain: strings.TrimPrefix(u.Path, "/"), Connect: string(libvirt.QEMUSystem), NBDPort: DefaultNBDPort}
	scheme, transport, _ := strings.Cut(u.Scheme, "+")
	out.Transport = transport
	if u.User != nil {
		out.User = u.User.Username()
		if _, has := u.User.Password(); has {
			return wrong("a password does not belong in it")
		}
	}
	switch {
	case scheme != "libvirt":
		return wrong("want libvirt:///DOMAIN")
	case transport == "" && (u.Host != "" || out.User != ""):
		return wrong("for another machine it is libvirt+ssh://%s/… or libvirt+tls://%[1]s/…", u.Host)
	case transport != "" && transport != "ssh" && transport != "tls":
		return wrong("%s is no transport: want libvirt+ssh or libvirt+tls", transport)
	case transport != "" && (out.Host == "" || strings.HasPrefix(out.Host, "-") || strings.HasPrefix(out.User, "-")):
		return wrong("it names no host")
	case transport == "tls" && out.User != "":
		return wrong("TLS has no users: its certificate says who connects")
	case u.Fragment != "" || strings.Contains(out.Domain, "/"):
		return wrong("want one domain after the host")
	}
	for key, values := range u.Query() {
		v := values[0]
		switch {
		case len(values) > 1:
			return wrong("%s is given twice", key)
		case key == "connect" && v != "":
			out.Connect = v
		case key == "socket" && filepath.IsAbs(v) && transport != "tls" && !strings.Contains(v, ":"):
			out.Socket = v
		case key == "pkipath" && filepath.IsAbs(v) && transport == "tls":
			out.PKI = v
		case key == "nbd-port" && transport == "tls":
			if out.NBDPort, err = strconv.Atoi(v); err != nil || out.NBDPort < 1 || out.NBDPort > 65535 {
				return wrong("nbd-port=%s is no port", v)
			}
		case key == "timeout":
			n, err := strconv.Atoi(v)
			if err != nil || n < 1 || n > 3600 {
				return wrong("timeout=%s: want a number of seconds, 1 to 3600", v)
			}
			out.Timeout = time.Duration(n) * time.Second
		default:
			return wrong("%s=%s: want connect=, socket=/path, pkipath=/path, nbd-port= or timeout=", key, v)
		}
	}
	return out, nil
}

// Remote reports whether the domain is on another machine.
func (u *URI) Remote() bool { return u.Transport != "" }

// Conn is a connection. Its calls (calls.go) are safe for concurrent use, and each of them ends.
type Conn struct {
	lv      *libvirt.Libvirt
	conn    net.Conn
	timeout time.Duration         // of a call
	silent  atomic.Pointer[error] // why libvirt is not asked any more
	tunnel  *tunnel
}

// Dial connects. Over ssh the remote socket nbd, if it is not empty, is forwarded too, NBD says to
// where; and the room in the remote directory dir is watched, if that is not empty.
func Dial(ctx context.Context, u *URI, nbd, dir string) (_ *Conn, err error) {
	c := &Conn{timeout: cmp.Or(u.Timeout, DefaultTimeout)}
	defer func() {
		if err != nil {
			err = errors.Join(fmt.Errorf("connect to libvirt: %w", err), c.tunnel.close())
		}
	}()
	var conn net.Conn
	switch u.Transport {
	case "ssh":
		if c.tunnel, err = openTunnel(ctx, u, nbd, dir); err != nil {
			return nil, err
		}
		conn, err = c.tunnel.dial(ctx)
	case "tls":
		opts := []dialers.TLSOption{}
		if u.Port != "" {
			opts = append(opts, dialers.UseTLSPort(u.Port))
		}
		if u.PKI != "" {
			opts = append(opts, dialers.UsePKIPath(u.PKI))
		}
		conn, err = dialers.NewTLS(u.Host, opts...).Dial()
	default:
		conn, err = dialLocal(ctx, u)
	}
	if err != nil {
		return nil, err
	}
	stop := context.AfterFunc(ctx, func() { _ = conn.Close() })
	defer stop()
	c.conn = conn
	c.lv = libvirt.NewWithDialer(dialers.NewAlreadyConnected(conn))
	err = run(c, "ConnectOpen", func(l *libvirt.Libvirt) error { return l.ConnectToURI(libvirt.ConnectURI(u.Connect)) })
	if err != nil {
		_ = conn.Close()
		return nil, err
	}
	return c, nil
}

// sockets are where libvirt listens: libvirtd, or the daemon that is for QEMU only.
func (u *URI) sockets() []string {
	if u.Socket != "" {
		return []string{u.Socket}
	}
	dir := "/run/libvirt"
	if strings.HasSuffix(u.Connect, "/session") && !u.Remote() {
		dir = filepath.Join(os.Getenv("XDG_RUNTIME_DIR"), "libvirt")
	}
	return []string{filepath.Join(dir, "libvirt-sock"), filepath.Join(dir, "virtqemud-sock")}
}

func dialLocal(ctx context.Context, u *URI) (net.Conn, error) {
	var errs []error
	for _, socket := range u.sockets() {
		var d net.Dialer
		conn, err := d.DialContext(ctx, "unix", socket)
		if err == nil {
			return conn, nil
		}
		errs = append(errs, err)
	}
	return nil, errors.Join(errs...)
}

// NBD is where the forwarded socket of Dial is on this machine.
func (c *Conn) NBD() string { return c.tunnel.nbd() }

// Free is the room in the directory of Dial, in bytes; below 0 if it is not known.
func (c *Conn) Free() int64 {
	if c.tunnel == nil {
		return -1
	}
	return c.tunnel.free.Load()
}

// Close ends the connection.
func (c *Conn) Close() error {
	var err error
	if c.silent.Load() == nil {
		_, err = callWithin(c, "ConnectClose", leaving, func(l *libvirt.Libvirt) (struct{}, error) { return struct{}{}, l.Disconnect() })
	}
	return errors.Join(err, c.tunnel.close())
}

// Domain finds the domain that the URI names.
func (c *Conn) Domain(u *URI) (libvirt.Domain, error) {
	dom, err := c.Lookup(u.Domain)
	if err == nil {
		return dom, nil
	}
	if id, ok := parseUUID(u.Domain); ok {
		if dom, err := c.LookupUUID(id); err == nil {
			return dom, nil
		}
	}
	if Is(err, libvirt.ErrNoDomain) {
		return dom, fmt.Errorf("%w: %s", ErrNoDomain, u.Domain)
	}
	return dom, err
}

// Is reports whether err is libvirt's own of a number.
func Is(err error, number libvirt.ErrorNumber) bool {
	var e libvirt.Error
	return errors.As(err, &e) && e.Code == uint32(number)
}

// Refused reports whether err is libvirt's own: the connection is still good.
func Refused(err error) bool {
	var e libvirt.Error
	return errors.As(err, &e)
}

func parseUUID(s string) (id libvirt.UUID, ok bool) {
	hex := strings.ReplaceAll(s, "-", "")
	if len(hex) != 2*len(id) {
		return id, false
	}
	for i := range id {
		b, err := strconv.ParseUint(hex[2*i:2*i+2], 16, 8)
		if err != nil {
			return id, false
		}
		id[i] = byte(b)
	}
	return id, true
}

// FormatUUID is the usual form.
func FormatUUID(id libvirt.UUID) string {
	return fmt.Sprintf("%x-%x-%x-%x-%x", id[0:4], id[4:6], id[6:8], id[8:10], id[10:16])
}

// TLS are the certificates of the URI, for the NBD server that libvirt starts; nil without TLS.
func (u *URI) TLS() (*tls.Config, error) {
	if u.Transport != "tls" {
		return nil, nil
	}
	ca, cert, key := "/etc/pki/CA/cacert.pem", "/etc/pki/libvirt/clientcert.pem", "/etc/pki/libvirt/private/clientkey.pem"
	if u.PKI != "" {
		ca, cert, key = filepath.Join(u.PKI, "cacert.pem"), filepath.Join(u.PKI, "clientcert.pem"), filepath.Join(u.PKI, "clientkey.pem")
	}
	pem, err := os.ReadFile(ca)
	if err != nil {
		return nil, fmt.Errorf("the certificate authority of libvirt: %w", err)
	}
	pool := x509.NewCertPool()
	if !pool.AppendCertsFromPEM(pem) {
		return nil, fmt.Errorf("%s holds no certificate", ca)
	}
	pair, err := tls.LoadX509KeyPair(cert, key)
	if err != nil {
		return nil, fmt.Errorf("the certificate for libvirt: %w", err)
	}
	return &tls.Config{RootCAs: pool, Certificates: []tls.Certificate{pair}, ServerName: u.Host, MinVersion: tls.VersionTLS12}, nil
}
