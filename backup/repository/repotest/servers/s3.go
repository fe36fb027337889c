package servers

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"github.com/minio/minio-go/v7"
	"github.com/minio/minio-go/v7/pkg/credentials"
)

// Keys of the S3 server.
const (
	S3AccessKey = "varve-test"
	S3SecretKey = "varve-test-secret"
	gatewayName = "versitygw-v1.8.0" // as pinned in e2e/tools/go.mod
)

// gateway returns the path of the S3 server: that of "make test", or one that it builds once in the user's cache.
// It is outside of the checkout, where go's test cache would compare its date.
func gateway(t testing.TB) string {
	t.Helper()
	if bin := os.Getenv("VARVE_TEST_S3"); bin != "" {
		return bin
	}
	root, err := moduleRoot()
	if err != nil {
		t.Fatal(err)
	}
	cache, err := os.UserCacheDir()
	if err != nil {
		t.Fatal(err)
	}
	bin := filepath.Join(cache, "varve-tests", gatewayName)
	if _, err := os.Stat(bin); err == nil {
		return bin
	}
	if err := os.MkdirAll(filepath.Dir(bin), 0o755); err != nil {
		t.Fatal(err)
	}
	temp := filepath.Join(filepath.Dir(bin), "."+gatewayName+"-"+filepath.Base(t.TempDir()))
	build := exec.CommandContext(t.Context(), "go", "build", "-o", temp, "github.com/versity/versitygw/cmd/versitygw")
	build.Dir = filepath.Join(root, "e2e", "tools")
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("build the S3 server: %v\n%s", err, out)
	}
	if err := os.Rename(temp, bin); err != nil {
		t.Fatal(err)
	}
	return bin
}

// StartS3 runs an S3 server over a directory until the test ends and returns
// its address. The server itself listens on a socket file: it would open a port by its number, and one that was free
// a moment ago may be another program's by then.
func StartS3(t testing.TB) string {
	t.Helper()
	bin := gateway(t)
	dir, err := os.MkdirTemp("", "varve-s3-*") // a socket's name has at most 107 bytes
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	socket := filepath.Join(dir, "s3")
	data, versions := t.TempDir(), t.TempDir()
	cmd := exec.Command(bin, "--access", S3AccessKey, "--secret", S3SecretKey, "--port", socket, "--quiet", "posix", "--versioning-dir", versions, data)
	var log bytes.Buffer
	cmd.Stdout, cmd.Stderr = &log, &log
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	exited := make(chan error, 1)
	go func() { exited <- cmd.Wait() }()
	t.Cleanup(func() {
		_ = cmd.Process.Kill()
		<-exited
	})
	tick := time.NewTicker(20 * time.Millisecond)
	defer tick.Stop()
	for {
		select {
		case err := <-exited:
			exited <- err
			t.Fatalf("S3 server: %v\n%s", err, log.String())
		case <-t.Context().Done():
			t.Fatal("S3 server did not start")
		case <-tick.C:
			if c, err := net.Dial("unix", socket); err == nil {
				_ = c.Close()
				return forward(t, socket)
			}
		}
	}
}

// forward listens on a port of this machine until the test ends, and passes its connections on to a socket file.
func forward(t testing.TB, socket string) (address string) {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	ctx, end := context.WithCancel(context.WithoutCancel(t.Context()))
	var running sync.WaitGroup
	running.Go(func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			running.Go(func() { pass(ctx, c, socket) })
		}
	})
	t.Cleanup(func() {
		_ = l.Close()
		end()
		running.Wait()
	})
	return l.Addr().String()
}

// pass passes what arrives on a connection on to a socket file, and back, until both sides or ctx have ended.
func pass(ctx context.Context, c net.Conn, socket string) {
	defer c.Close()
	to, err := net.Dial("unix", socket)
	if err != nil {
		return // the server ended: so does the connection
	}
	defer to.Close()
	defer context.AfterFunc(ctx, func() {
		_ = c.Close()
		_ = to.Close()
	})()
	var both sync.WaitGroup
	for _, way := range [][2]net.Conn{{c, to}, {to, c}} {
		both.Go(func() {
			_, _ = io.Copy(way[1], way[0]) // a side that goes is no failure of the test
			if w, ok := way[1].(interface{ CloseWrite() error }); ok {
				_ = w.CloseWrite()
			}
		})
	}
	both.Wait()
}

// S3Client returns a client of the server at address.
func S3Client(t testing.TB, address string) *minio.Client {
	t.Helper()
	c, err := minio.New(address, &minio.Options{Creds: credentials.NewStaticV4(S3AccessKey, S3SecretKey, "")})
	if err != nil {
		t.Fatal(err)
	}
	return c
}

// moduleRoot is the directory of go.mod above the test's own.
func moduleRoot() (string, error) {
	dir, err := os.Getwd()
	if err != nil {
		return "", err
	}
	for {
		if _, err := os.Stat(filepath.Join(dir, "go.mod")); err == nil {
			return dir, nil
		}
		up := filepath.Dir(dir)
		if up == dir {
			return "", fmt.Errorf("no go.mod above the test")
		}
		dir = up
	}
}
