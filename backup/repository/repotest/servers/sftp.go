// Package servers runs storage servers inside a test: SFTP, WebDAV and S3. It
// knows nothing of repositories. Tests only.
package servers

import (
	"crypto/ed25519"
	"crypto/rand"
	"errors"
	"fmt"
	"net"
	"sync"
	"sync/atomic"
	"testing"

	"github.com/pkg/sftp"
	"golang.org/x/crypto/ssh"
	"golang.org/x/crypto/ssh/knownhosts"
)

// SFTP is an SSH server that serves files and nothing else.
type SFTP struct {
	Host           string
	Port           int
	User, Password string
	KnownHosts     string // line of a known_hosts file
	readOnly       atomic.Bool
}

// StartSFTP serves the machine's files until the test ends; paths are absolute.
func StartSFTP(t testing.TB) *SFTP {
	t.Helper()
	_, key, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	signer, err := ssh.NewSignerFromKey(key)
	if err != nil {
		t.Fatal(err)
	}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	address, _ := l.Addr().(*net.TCPAddr)
	s := &SFTP{
		Host: "127.0.0.1", Port: address.Port, User: "varve", Password: "sftp-secret",
		KnownHosts: knownhosts.Line([]string{address.String()}, signer.PublicKey()),
	}
	config := &ssh.ServerConfig{PasswordCallback: func(c ssh.ConnMetadata, password []byte) (*ssh.Permissions, error) {
		if c.User() != s.User || string(password) != s.Password {
			return nil, errors.New("who are you?")
		}
		return nil, nil
	}}
	config.AddHostKey(signer)

	var mu sync.Mutex
	open := map[net.Conn]bool{}
	var running sync.WaitGroup
	running.Go(func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			mu.Lock()
			open[c] = true
			mu.Unlock()
			running.Go(func() {
				_ = s.serveSSH(c, config) // a client that goes is no failure of the test
				_ = c.Close()
			})
		}
	})
	t.Cleanup(func() {
		_ = l.Close()
		mu.Lock()
		for c := range open {
			_ = c.Close()
		}
		mu.Unlock()
		running.Wait()
	})
	return s
}

// ReadOnly has sessions that begin from now on write nothing.
func (s *SFTP) ReadOnly() { s.readOnly.Store(true) }

func (s *SFTP) serveSSH(c net.Conn, config *ssh.ServerConfig) error {
	conn, channels, requests, err := ssh.NewServerConn(c, config)
	if err != nil {
		return fmt.Errorf("handshake: %w", err)
	}
	defer conn.Close()
	var running sync.WaitGroup
	defer running.Wait()
	running.Go(func() { ssh.DiscardRequests(requests) })
	for ask := range channels {
		if ask.ChannelType() != "session" {
			_ = ask.Reject(ssh.UnknownChannelType, "only sessions")
			continue
		}
		channel, in, err := ask.Accept()
		if err != nil {
			return fmt.Errorf("accept channel: %w", err)
		}
		running.Go(func() { s.serveSession(channel, in) })
	}
	return nil
}

// serveSession answers the one request for the subsystem sftp.
func (s *SFTP) serveSession(channel ssh.Channel, in <-chan *ssh.Request) {
	defer channel.Close()
	for req := range in {
		ok := req.Type == "subsystem" && len(req.Payload) > 4 && string(req.Payload[4:]) == "sftp"
		_ = req.Reply(ok, nil)
		if !ok {
			continue
		}
		var options []sftp.ServerOption
		if s.readOnly.Load() {
			options = append(options, sftp.ReadOnly())
		}
		server, err := sftp.NewServer(channel, options...)
		if err != nil {
			return
		}
		_ = server.Serve() // until the client goes
		return
	}
}
