// Package nbdclient is a small NBD client: negotiation with every option the
// server side knows, structured replies, extended headers, metadata contexts
// and many requests in flight on one connection.
//
// It serves as a debugging client (look at an export, map it, read from it)
// and as the peer for parts of the protocol that other clients do not speak
// yet. It trusts nothing a server sends: every length is checked before use.
//
// Connect with [Dial], look around with [Client.List] and [Client.Info], then
// enter an export with [Client.Go], which returns an [Export]. Sources of the
// rules: doc/proto.md and doc/uri.md of NetworkBlockDevice/nbd.
package nbdclient

import (
	"bufio"
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"

	"github.com/varve-io/varve/nbdserver/proto"
)

// Headers is how transmission messages look.
type Headers int

// Header styles, from the oldest.
const (
	Simple Headers = iota
	Structured
	Extended
)

// String names the style.
func (h Headers) String() string { return [...]string{"simple", "structured", "extended"}[h] }

// Client is a connection in negotiation. It is used by one goroutine.
type Client struct {
	conn    net.Conn
	br      *bufio.Reader
	headers Headers
	tls     bool

	contexts map[uint32]string
	setFor   string
}

// RefusedError is a server's refusal of an option.
type RefusedError struct {
	Option proto.Option
	Reply  proto.Reply
	Text   string
}

// Error gives the refusal and the server's reason.
func (e *RefusedError) Error() string {
	if e.Text == "" {
		return fmt.Sprintf("server refused option %d: %s", e.Option, e.Reply)
	}
	return fmt.Sprintf("server refused option %d: %s: %s", e.Option, e.Reply, e.Text)
}

// Listed is an entry of a server's list of exports.
type Listed struct {
	Name        string `json:"name"`
	Description string `json:"description,omitempty"`
}

// Info is what a server reports about an export.
type Info struct {
	Name           string                  `json:"name"` // canonical
	Description    string                  `json:"description,omitempty"`
	Size           uint64                  `json:"size"`
	Flags          proto.TransmissionFlags `json:"flags"`
	MinimumBlock   uint32                  `json:"minimumBlock"`
	PreferredBlock uint32                  `json:"preferredBlock"`
	MaximumPayload uint32                  `json:"maximumPayload"`
}

// Dial connects to the server of a URI, with TLS if the URI asks for it, and
// does the first handshake, until ctx ends. config may be nil: then the URI's certificates, or
// the system's, are used.
func Dial(ctx context.Context, u *URI, config *tls.Config) (*Client, error) {
	nc, err := (&net.Dialer{}).DialContext(ctx, u.Network, u.Address)
	if err != nil {
		return nil, fmt.Errorf("connect to the NBD server: %w", err)
	}
	stop := context.AfterFunc(ctx, func() { _ = nc.Close() })
	c, err := u.greet(ctx, nc, config)
	if !stop() { // what failed then failed by that
		if err == nil {
			_ = c.Close()
		}
		return nil, context.Cause(ctx)
	}
	return c, err
}

// greet does the first handshake on a connection, which it owns, and that of TLS.
func (u *URI) greet(ctx context.Context, nc net.Conn, config *tls.Config) (*Client, error) {
	c, err := New(nc)
	if err != nil || !u.TLS {
		return c, err
	}
	if config == nil {
		if config, err = u.tlsConfig(); err != nil {
			_ = c.Close()
			return nil, err
		}
	}
	if err := c.StartTLS(ctx, config); err != nil {
		_ = c.Close()
		return nil, err
	}
	return c, nil
}

func (u *URI) tlsConfig() (*tls.Config, error) {
	cfg := &tls.Config{ServerName: u.ServerName, InsecureSkipVerify: u.NoVerify, MinVersion: tls.VersionTLS12}
	if u.Certificates == "" {
		return cfg, nil
	}
	pem, err := os.ReadFile(filepath.Join(u.Certificates, "ca-cert.pem"))
	if err != nil {
		return nil, fmt.Errorf("read the CA of the NBD server: %w", err)
	}
	cfg.RootCAs = x509.NewCertPool()
	if !cfg.RootCAs.AppendCertsFromPEM(pem) {
		return nil, errors.New("ca-cert.pem holds no certificate")
	}
	pair, err := tls.LoadX509KeyPair(filepath.Join(u.Certificates, "client-cert.pem"), filepath.Join(u.Certificates, "client-key.pem"))
	switch {
	case err == nil:
		cfg.Certificates = []tls.Certificate{pair}
	case !errors.Is(err, os.ErrNotExist):
		return nil, fmt.Errorf("load the client certificate: %w", err)
	}
	return cfg, nil
}

// New does the first handshake on a connection, which it owns from then on.
func New(nc net.Conn) (*Client, error) {
	c := &Client{conn: nc, br: bufio.NewReaderSize(nc, 64<<10)}
	if err := c.handshake(); err != nil {
		_ = nc.Close()
		return nil, fmt.Errorf("NBD handshake: %w", err)
	}
	return c, nil
}

func (c *Client) handshake() error {
	var b [18]byte
	if _, err := io.ReadFull(c.br, b[:]); err != nil {
		return err
	}
	if binary.BigEndian.Uint64(b[:]) != proto.MagicInit {
		return errors.New("this is no NBD server")
	}
	if binary.BigEndian.Uint64(b[8:]) != proto.MagicOption {
		return errors.New("server speaks the oldstyle protocol")
	}
	server := binary.BigEndian.Uint16(b[16:])
	if server&proto.FlagFixedNewstyle == 0 {
		return errors.New("server does not know fixed newstyle negotiation")
	}
	flags := proto.FlagCFixedNewstyle
	if server&proto.FlagNoZeroes != 0 {
		flags |= proto.FlagCNoZeroes
	}
	_, err := c.conn.Write(binary.BigEndian.AppendUint32(nil, flags))
	return err
}

// Close ends the connection without a word.
func (c *Client) Close() error { return c.conn.Close() }

// Abort ends negotiation politely.
func (c *Client) Abort() error {
	_, err := c.option(proto.OptAbort, nil, nil)
	_ = c.conn.Close() // the server may have been faster
	return err
}

// option sends an option and reads its answers until the last; each of the
// others goes to fn.
func (c *Client) option(o proto.Option, data []byte, fn func(proto.Reply, []byte) error) (proto.Reply, error) {
	b := binary.BigEndian.AppendUint64(nil, proto.MagicOption)
	b = binary.BigEndian.AppendUint32(b, uint32(o))
	b = binary.BigEndian.AppendUint32(b, uint32(len(data)))
	if _, err := c.conn.Write(append(b, data...)); err != nil {
		return 0, err
	}
	for {
		var h [proto.OptionReplyHeaderSize]byte
		if _, err := io.ReadFull(c.br, h[:]); err != nil {
			return 0, fmt.Errorf("read the answer to option %d: %w", o, err)
		}
		r := proto.Reply(binary.BigEndian.Uint32(h[12:]))
		n := binary.BigEndian.Uint32(h[16:])
		if binary.BigEndian.Uint64(h[:]) != proto.MagicOptionReply || proto.Option(binary.BigEndian.Uint32(h[8:])) != o {
			return 0, fmt.Errorf("server answered option %d with something else", o)
		}
		if n > 64<<10 {
			return 0, fmt.Errorf("server answered option %d with %d bytes", o, n)
		}
		body := make([]byte, n)
		if _, err := io.ReadFull(c.br, body); err != nil {
			return 0, err
		}
		switch {
		case r.IsError():
			return r, &RefusedError{Option: o, Reply: r, Text: string(body)}
		case r == proto.RepAck:
			return r, nil
		case fn == nil:
			return r, fmt.Errorf("server answered option %d with %s", o, r)
		}
		if err := fn(r, body); err != nil {
			return r, err
		}
	}
}

// StartTLS upgrades the connection.
func (c *Client) StartTLS(ctx context.Context, config *tls.Config) error {
	if _, err := c.option(proto.OptStartTLS, nil, nil); err != nil {
		return err
	}
	if c.br.Buffered() > 0 {
		return errors.New("server sent data before the TLS handshake")
	}
	t := tls.Client(c.conn, config)
	if err := t.HandshakeContext(ctx); err != nil {
		return fmt.Errorf("TLS handshake with the NBD server: %w", err)
	}
	c.conn, c.tls = t, true
	c.br.Reset(t)
	c.headers, c.contexts, c.setFor = Simple, nil, ""
	return nil
}

// TLS reports whether the connection is encrypted.
func (c *Client) TLS() bool { return c.tls }

// Negotiate asks for the given header style and returns what the server
// agreed to, which may be an older one.
func (c *Client) Negotiate(want Headers) (Headers, error) {
	for ; want > Simple; want-- {
		o := proto.OptStructuredReply
		if want == Extended {
			o = proto.OptExtendedHeaders
		}
		_, err := c.option(o, nil, nil)
		if err == nil {
			c.headers = want
			return want, nil
		}
		if refused := (*RefusedError)(nil); !errors.As(err, &refused) {
			return c.headers, err
		}
	}
	return c.headers, nil
}

// List calls yield for each export until it returns false.
func (c *Client) List(yield func(Listed) bool) error {
	more := true
	_, err := c.option(proto.OptList, nil, func(r proto.Reply, b []byte) error {
		if r != proto.RepServer || len(b) < 4 || uint64(binary.BigEndian.Uint32(b)) > uint64(len(b)-4) {
			return errors.New("server sent a malformed list of exports")
		}
		n := binary.BigEndian.Uint32(b)
		more = more && yield(Listed{Name: string(b[4 : 4+n]), Description: string(b[4+n:])})
		return nil
	})
	return err
}

// Info asks about an export.
func (c *Client) Info(export string) (Info, error) { return c.info(proto.OptInfo, export) }

func (c *Client) info(o proto.Option, export string) (Info, error) {
	data := binary.BigEndian.AppendUint32(nil, uint32(len(export)))
	data = append(data, export...)
	wants := []uint16{proto.InfoExport, proto.InfoName, proto.InfoDescription, proto.InfoBlockSize}
	data = binary.BigEndian.AppendUint16(data, uint16(len(wants)))
	for _, w := range wants {
		data = binary.BigEndian.AppendUint16(data, w)
	}
	in := Info{Name: export, MinimumBlock: 1, PreferredBlock: 4096, MaximumPayload: proto.MaxPayload}
	told := false
	_, err := c.option(o, data, func(r proto.Reply, b []byte) error {
		if r != proto.RepInfo || len(b) < 2 {
			return errors.New("server sent malformed information")
		}
		typ := binary.BigEndian.Uint16(b)
		b = b[2:]
		switch {
		case typ == proto.InfoExport && len(b) == 10:
			in.Size = binary.BigEndian.Uint64(b)
			in.Flags = proto.TransmissionFlags(binary.BigEndian.Uint16(b[8:]))
			told = true
		case typ == proto.InfoName:
			in.Name = string(b)
		case typ == proto.InfoDescription:
			in.Description = string(b)
		case typ == proto.InfoBlockSize && len(b) == 12:
			in.MinimumBlock = binary.BigEndian.Uint32(b)
			in.PreferredBlock = binary.BigEndian.Uint32(b[4:])
			in.MaximumPayload = binary.BigEndian.Uint32(b[8:])
		case typ == proto.InfoExport || typ == proto.InfoBlockSize:
			return errors.New("server sent malformed information")
		}
		return nil
	})
	if err == nil && !told {
		err = errors.New("server did not describe the export")
	}
	if err == nil && in.Size > 1<<63-1 {
		err = fmt.Errorf("server reports %d bytes", in.Size)
	}
	return in, err
}

// ListContexts asks which metadata contexts match the queries: all without.
func (c *Client) ListContexts(export string, queries ...string) ([]string, error) {
	var names []string
	err := c.metaContext(proto.OptListMetaContext, export, queries, func(_ uint32, name string) {
		names = append(names, name)
	})
	return names, err
}

// SetContexts selects metadata contexts for an export and returns the names
// the server agreed to.
func (c *Client) SetContexts(export string, names ...string) ([]string, error) {
	c.contexts, c.setFor = map[uint32]string{}, export
	var got []string
	err := c.metaContext(proto.OptSetMetaContext, export, names, func(id uint32, name string) {
		c.contexts[id] = name
		got = append(got, name)
	})
	if err != nil {
		c.contexts = nil
	}
	return got, err
}

func (c *Client) metaContext(o proto.Option, export string, queries []string, fn func(uint32, string)) error {
	data := binary.BigEndian.AppendUint32(nil, uint32(len(export)))
	data = append(data, export...)
	data = binary.BigEndian.AppendUint32(data, uint32(len(queries)))
	for _, q := range queries {
		data = binary.BigEndian.AppendUint32(data, uint32(len(q)))
		data = append(data, q...)
	}
	_, err := c.option(o, data, func(r proto.Reply, b []byte) error {
		if r != proto.RepMetaContext || len(b) < 4 {
			return errors.New("server sent a malformed metadata context")
		}
		fn(binary.BigEndian.Uint32(b), string(b[4:]))
		return nil
	})
	return err
}

// Go enters an export. The Client must not be used any more, whether it
// succeeds or, but for a RefusedError, fails.
func (c *Client) Go(export string) (*Export, error) {
	in, err := c.info(proto.OptGo, export)
	if err != nil {
		return nil, err
	}
	if c.setFor != export {
		c.contexts = nil
	}
	return newExport(c, in), nil
}

// HandOver enters an export and gives up the connection, for a kernel to continue
// with: it stands at the first request. Headers must be simple, as the
// kernel knows no others, and a connection with TLS cannot be handed over.
func (c *Client) HandOver(export string) (Info, net.Conn, error) {
	if c.tls || c.headers != Simple {
		return Info{}, nil, errors.New("only a plain connection with simple replies can be handed over")
	}
	in, err := c.info(proto.OptGo, export)
	if err == nil && c.br.Buffered() > 0 {
		err = errors.New("the server sent data that was not requested")
	}
	if err != nil {
		return Info{}, nil, err
	}
	return in, c.conn, nil
}
