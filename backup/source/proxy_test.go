package source_test

import (
	"bufio"
	"encoding/binary"
	"encoding/json"
	"io"
	"net"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"testing"
)

// proxy stands between a client and a server, and sees whole messages.
type proxy struct {
	socket string
	target string
	read   func(r *bufio.Reader) ([]byte, error)
	// ask is given each message of a client before it goes on. It returns what goes on to the
	// server, and what the client is answered in its place; with neither the message is kept for
	// ever, and so is every later one of its connection.
	ask func(message []byte) (on, answer []byte)
	// tell is given each message of the server, and returns what the client gets.
	tell func(message []byte) []byte
}

// startProxy serves until the test ends.
func startProxy(t *testing.T, p proxy) *proxy {
	t.Helper()
	dir, err := os.MkdirTemp("/tmp", "proxy-") // short, as a socket's path must be
	if err != nil {
		t.Fatal(err)
	}
	p.socket = filepath.Join(dir, "s")
	l, err := net.Listen("unix", p.socket)
	if err != nil {
		t.Fatal(err)
	}
	var mu sync.Mutex
	var conns []net.Conn
	var all sync.WaitGroup
	t.Cleanup(func() {
		_ = l.Close()
		mu.Lock()
		for _, c := range conns {
			_ = c.Close()
		}
		mu.Unlock()
		all.Wait()
		_ = os.RemoveAll(dir)
	})
	all.Go(func() {
		for {
			client, err := l.Accept()
			if err != nil {
				return
			}
			server, err := net.Dial("unix", p.target)
			if err != nil {
				_ = client.Close()
				continue
			}
			mu.Lock()
			conns = append(conns, client, server)
			mu.Unlock()
			var out sync.Mutex // of the client
			all.Go(func() { defer server.Close(); p.requests(client, server, &out) })
			all.Go(func() { defer client.Close(); p.answers(client, server, &out) })
		}
	})
	return &p
}

func (p *proxy) requests(client, server net.Conn, out *sync.Mutex) {
	r := bufio.NewReader(client)
	for {
		m, err := p.read(r)
		if err != nil {
			return
		}
		on, answer := m, []byte(nil)
		if p.ask != nil {
			on, answer = p.ask(m)
		}
		if on == nil && answer == nil {
			_, _ = io.Copy(io.Discard, r)
			return
		}
		if on != nil {
			_, _ = server.Write(on)
		}
		if answer != nil {
			out.Lock()
			_, _ = client.Write(answer)
			out.Unlock()
		}
	}
}

func (p *proxy) answers(client, server net.Conn, out *sync.Mutex) {
	r := bufio.NewReader(server)
	for {
		m, err := p.read(r)
		if err != nil {
			return
		}
		if p.tell != nil {
			m = p.tell(m)
		}
		out.Lock()
		_, err = client.Write(m)
		out.Unlock()
		if err != nil {
			return
		}
	}
}

// readLine reads a message of QMP.
func readLine(r *bufio.Reader) ([]byte, error) { return r.ReadBytes('\n') }

// readPacket reads a message of libvirt: its length, this included, then program, version,
// procedure, type, serial and status, and what belongs to them.
func readPacket(r *bufio.Reader) ([]byte, error) {
	head, err := r.Peek(4)
	if err != nil {
		return nil, err
	}
	m := make([]byte, binary.BigEndian.Uint32(head))
	_, err = io.ReadFull(r, m)
	return m, err
}

// procedureOf is the number of a call to libvirt (src/remote/remote_protocol.x).
func procedureOf(packet []byte) uint32 { return binary.BigEndian.Uint32(packet[12:]) }

const (
	procFsfreeze    = 335
	procFsthaw      = 336
	procBackupBegin = 421
	procBackupXML   = 422
)

// answerTo is a reply to a call: success, with a number.
func answerTo(call []byte, n uint32) []byte {
	m := slices.Clone(call[:28])
	binary.BigEndian.PutUint32(m[16:], 1) // reply
	binary.BigEndian.PutUint32(m[24:], 0) // success
	m = binary.BigEndian.AppendUint32(m, n)
	binary.BigEndian.PutUint32(m, uint32(len(m)))
	return m
}

// rewrite has a JSON object changed.
func rewrite(message []byte, change func(map[string]any)) []byte {
	var m map[string]any
	if json.Unmarshal(message, &m) != nil {
		return message
	}
	change(m)
	b, _ := json.Marshal(m)
	return append(b, '\n')
}
