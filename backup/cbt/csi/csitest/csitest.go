// Package csitest is a SnapshotMetadata service for tests: it speaks pkg/api over TLS on a
// loopback socket, and answers and misbehaves by a script.
package csitest

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"math/big"
	"net"
	"sync"
	"testing"
	"time"

	"github.com/kubernetes-csi/external-snapshot-metadata/pkg/api"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"

	"github.com/varve-io/varve/backup/cbt"
	"github.com/varve-io/varve/backup/cbt/csi"
)

// Token is the token that a new Server accepts: like a service account's, with text that
// cannot occur by chance.
const Token = "eyJhbGciOiJSUzI1NiJ9.c2VjcmV0LWNsYWltcy1vZi1hLXRlc3Q.c2lnbmF0dXJlLW9mLWEtdGVzdA"

// Audience is the Server's audience for tokens.
const Audience = "csitest"

// Script is what a Server answers.
type Script struct {
	// Capacity of the volume in bytes.
	Capacity int64
	// Delta and Allocated are the ranges it lists. With Fixed, the blocks of that length that
	// touch them are listed in order; else the ranges themselves, right or wrong.
	Delta, Allocated []cbt.Extent
	Fixed            int64
	// PerMessage is the most ranges in a message; 0 for 100.
	PerMessage int
	// Calls say how each call behaves, in order; later calls behave as Then says.
	Calls []Behaviour
	Then  Behaviour
}

// End is how a call ends.
type End int

// Ends of a call.
const (
	Clean  End = iota // after the last range, without an error
	Early             // the same, but before
	Status            // with Code and Message
	Drop              // the connection is cut
	Stall             // not until the caller gives up
)

// Behaviour of a call. The zero value is a good one.
type Behaviour struct {
	End End
	// After is how many ranges of the list are sent, in this call and before; for all Ends
	// but Clean.
	After   int
	Code    codes.Code
	Message string
	// DeltaOnly does not apply to calls for allocated blocks.
	DeltaOnly bool

	// Before begins the first range this many bytes before the requested offset, if any;
	// Repeat sends all ranges again from the start.
	Before int64
	Repeat bool
	// Capacity and Type, if not 0, are sent from the second message on.
	Capacity int64
	Type     api.BlockMetadataType
}

// Call is a received request.
type Call struct {
	Method          string // "delta" or "allocated"
	Token           string
	Namespace, Name string
	Base            string
	Offset          int64
	MaxResults      int32
}

// Server is such a service. It is safe for concurrent use.
type Server struct {
	api.UnimplementedSnapshotMetadataServer

	endpoint csi.Endpoint
	stalled  chan struct{}

	mu     sync.Mutex
	script Script
	token  string
	calls  []Call
	conns  map[net.Conn]struct{}
}

// New runs a Server until the test ends.
func New(t testing.TB, script Script) *Server {
	t.Helper()

	s := &Server{script: script, token: Token, conns: map[net.Conn]struct{}{}, stalled: make(chan struct{}, 1000)}

	authority, certificate, err := certificates()
	if err != nil {
		t.Fatal(err)
	}

	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}

	s.endpoint = csi.Endpoint{Address: l.Addr().String(), CABundle: authority, Audience: Audience}
	server := grpc.NewServer(grpc.Creds(credentials.NewTLS(&tls.Config{
		Certificates: []tls.Certificate{certificate}, MinVersion: tls.VersionTLS12,
	})))
	api.RegisterSnapshotMetadataServer(server, s)

	done := make(chan error, 1)
	go func() { done <- server.Serve(&listener{l, s}) }()

	t.Cleanup(func() {
		server.Stop()

		if err := <-done; err != nil && !errors.Is(err, grpc.ErrServerStopped) {
			t.Errorf("serve: %v", err)
		}
	})
	return s
}

// Endpoint says how to reach it.
func (s *Server) Endpoint() csi.Endpoint { return s.endpoint }

// Stalled receives a value for each call that stalls.
func (s *Server) Stalled() <-chan struct{} { return s.stalled }

// Calls returns the calls received so far.
func (s *Server) Calls() []Call {
	s.mu.Lock()
	defer s.mu.Unlock()
	return append([]Call(nil), s.calls...)
}

// SetToken makes it accept only another token.
func (s *Server) SetToken(token string) {
	s.mu.Lock()
	defer s.mu.Unlock()

	s.token = token
}

// dropAll cuts every connection.
func (s *Server) dropAll() {
	s.mu.Lock()
	defer s.mu.Unlock()

	for c := range s.conns {
		_ = c.Close()
		delete(s.conns, c)
	}
}

type listener struct {
	net.Listener
	s *Server
}

func (l *listener) Accept() (net.Conn, error) {
	c, err := l.Listener.Accept()
	if err == nil {
		l.s.mu.Lock()
		l.s.conns[c] = struct{}{}
		l.s.mu.Unlock()
	}
	return c, err
}

// certificates makes an authority and a certificate of it for 127.0.0.1.
func certificates() (authority []byte, certificate tls.Certificate, err error) {
	caKey, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, certificate, err
	}

	now := time.Now()
	ca := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "csitest authority"},
		NotBefore: now.Add(-time.Hour), NotAfter: now.Add(time.Hour),
		IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign,
	}

	caDER, err := x509.CreateCertificate(rand.Reader, ca, ca, caKey.Public(), caKey)
	if err != nil {
		return nil, certificate, err
	}

	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, certificate, err
	}

	leaf := &x509.Certificate{
		SerialNumber: big.NewInt(2), Subject: pkix.Name{CommonName: "csitest"}, IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)},
		NotBefore: ca.NotBefore, NotAfter: ca.NotAfter, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth},
	}

	der, err := x509.CreateCertificate(rand.Reader, leaf, ca, key.Public(), caKey)
	if err != nil {
		return nil, certificate, err
	}
	return pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: caDER}), tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key}, nil
}
