package servers

import (
	"bytes"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
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
// its address.
func StartS3(t testing.TB) string {
	t.Helper()
	bin := gateway(t)
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	address := l.Addr().String()
	if err := l.Close(); err != nil {
		t.Fatal(err)
	}
	data, versions := t.TempDir(), t.TempDir()
	cmd := exec.Command(bin, "--access", S3AccessKey, "--secret", S3SecretKey, "--port", address, "--quiet", "posix", "--versioning-dir", versions, data)
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
			if c, err := net.Dial("tcp", address); err == nil {
				_ = c.Close()
				return address
			}
		}
	}
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
