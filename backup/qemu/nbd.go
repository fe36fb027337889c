package qemu

import (
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/varve-io/varve/internal/process"
	"github.com/varve-io/varve/internal/tempdir"
	"github.com/varve-io/varve/nbdserver/nbdclient"
)

// Serve says how an image file is to be served.
type Serve struct {
	Path, Format string
	// Name is what to open in place of a file, by QEMU's syntax of a protocol, such as
	// "rbd:pool/image@snapshot". The caller answers for it.
	Name string
	// Write opens the image for writing; the range of a write of zeroes is freed then.
	Write bool
	// Bitmaps of the image to be exported.
	Bitmaps []string
	// Connections at most.
	Connections int
	// Exclusive keeps others from writing to a raw file, whose readers take no lock otherwise (QEMU's blkdebug driver,
	// unshare-child-perms).
	Exclusive bool
}

// Server is a qemu-nbd of our own, on a socket that only this user can reach. It is killed
// with this process, however that ends. While it runs, QEMU's locks keep virtual machines
// from writing to the image.
type Server struct {
	uri     *nbdclient.URI
	dir     *tempdir.Dir
	process *os.Process
	ended   chan struct{} // closed when the process has ended
	err     error         // why, if not by Close; after ended
	stderr  *head
	write   bool
	once    sync.Once
}

// patience is how long a reader's server may take to end.
const patience = 10 * time.Second

// termAgain is the time between two signals to a server that is to end.
const termAgain = 100 * time.Millisecond

// StartNBD starts a qemu-nbd. It inherits a listening socket, so clients may connect at
// once; those of one that cannot open its image see the connection end, and Err says why.
func StartNBD(s Serve) (_ *Server, err error) {
	program, err := find("qemu-nbd")
	if err != nil {
		return nil, err
	}
	dir, err := socketDir()
	if err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			_ = dir.Close()
		}
	}()
	socket := filepath.Join(dir.Path(), "nbd")
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: socket, Net: "unix"})
	if err != nil {
		return nil, fmt.Errorf("listen for qemu-nbd: %w", err)
	}
	defer l.Close() // the child's copy stays
	l.SetUnlinkOnClose(false)
	file, err := l.File()
	if err != nil {
		return nil, fmt.Errorf("listen for qemu-nbd: %w", err)
	}
	defer file.Close()

	// LISTEN_PID is the child's own, which a shell knows.
	args := append([]string{"-c", `LISTEN_PID=$$ LISTEN_FDS=1 exec "$0" "$@"`, program}, s.Args()...)
	cmd := exec.Command("/bin/sh", args...)
	cmd.Env = Environment()
	if s.Path != "" {
		cmd.Dir = filepath.Dir(absolute(s.Path)) // see runAt
	}
	cmd.ExtraFiles = []*os.File{file}
	srv := &Server{
		uri: &nbdclient.URI{Network: "unix", Address: socket}, dir: dir,
		ended: make(chan struct{}), stderr: &head{limit: 4 << 10}, write: s.Write,
	}
	cmd.Stderr = srv.stderr
	// A SIGTERM is lost while qemu-nbd starts (QEMU qemu-nbd.c sets its state before its loop), and it would hold the
	// image forever.
	if err := process.StartTied(cmd, syscall.SIGKILL, func(err error) { srv.err = err; close(srv.ended) }); err != nil {
		return nil, fmt.Errorf("start qemu-nbd: %w", err)
	}
	srv.process = cmd.Process
	return srv, nil
}

// Args are the arguments of qemu-nbd, but for its socket.
func (s Serve) Args() []string {
	args := []string{"-t", "-e", strconv.Itoa(max(1, s.Connections))}
	if s.Exclusive {
		return append(args, "-r", "--image-opts", "driver=raw,file.driver=blkdebug,file.unshare-child-perms.0=write,file.unshare-child-perms.1=resize,"+
			"file.image.driver=file,file.image.filename="+strings.ReplaceAll(absolute(s.Path), ",", ",,"))
	}
	args = append(args, "-f", s.Format)
	if s.Write {
		args = append(args, "--discard=unmap", "--detect-zeroes=unmap")
	} else {
		args = append(args, "-r")
	}
	for _, b := range s.Bitmaps {
		args = append(args, "-B", b)
	}
	if s.Name != "" {
		return append(args, "--", s.Name)
	}
	return append(args, "--", absolute(s.Path))
}

// maxSocketPath is the longest path of a unix socket, in bytes (unix(7)).
const maxSocketPath = 107

// socketDir makes a folder for a socket, which only this user can reach.
func socketDir() (*tempdir.Dir, error) {
	for _, parent := range []string{os.Getenv("XDG_RUNTIME_DIR"), os.TempDir(), "/tmp"} {
		if parent == "" || len(parent)+len("/varve-qemu-0123456789/nbd") > maxSocketPath {
			continue
		}
		if dir, err := tempdir.Make(parent, "varve-qemu-"); err == nil {
			return dir, nil
		}
	}
	return nil, errors.New("no folder for a socket: neither $XDG_RUNTIME_DIR nor $TMPDIR nor /tmp can be written to, or their paths are too long")
}

// URI is where clients connect.
func (s *Server) URI() *nbdclient.URI { return s.uri }

// Hide removes the socket from the file system once all clients are connected, so that
// nothing of it stays if this process is killed.
func (s *Server) Hide() error { return s.dir.Close() }

// Running reports whether the server runs, and holds its lock.
func (s *Server) Running() bool {
	select {
	case <-s.ended:
		return false
	default:
		return true
	}
}

// Err says why the server ended by itself; nil while it runs. It waits a moment for one whose
// clients have lost it.
func (s *Server) Err() error {
	select {
	case <-s.ended:
	case <-time.After(2 * time.Second):
		return nil
	}
	return Explain("qemu-nbd", s.stderr.String(), errors.Join(errors.New("it ended"), s.err))
}

// Close ends the server, which writes what it has in memory first, and fails if it could
// not. Clients must have been closed. A second call does nothing.
func (s *Server) Close() (err error) {
	s.once.Do(func() { err = s.close() })
	return err
}

func (s *Server) close() error {
	defer s.dir.Close()
	again := time.NewTicker(termAgain)
	defer again.Stop()
	for begun, running := time.Now(), true; running; {
		_ = s.process.Signal(syscall.SIGTERM)
		if !s.write && time.Since(begun) > patience {
			_ = s.process.Kill()
		}
		select {
		case <-s.ended:
			running = false
		case <-again.C: // it was lost if the server was starting
		}
	}
	if !s.write {
		return nil // how a reader ends says nothing of what was read
	}
	if s.err != nil {
		return Explain("qemu-nbd", s.stderr.String(), s.err)
	}
	return nil
}

// Abort kills the server: for an image that is to be thrown away.
func (s *Server) Abort() {
	s.once.Do(func() {
		_ = s.process.Kill()
		<-s.ended
		_ = s.dir.Close()
	})
}
