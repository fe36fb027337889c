package fusefs_test

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"testing"

	"github.com/varve-io/varve/backup"
	"github.com/varve-io/varve/backup/disk"
	"github.com/varve-io/varve/backup/points"
	"github.com/varve-io/varve/backup/repository"
	"github.com/varve-io/varve/backup/repository/repotest"
	"github.com/varve-io/varve/fusefs"
	"github.com/varve-io/varve/fusefs/diskfs/diskfstest"
	"github.com/varve-io/varve/internal/mounttest"
)

// needFUSE skips a test if nothing can be mounted.
func needFUSE(t testing.TB) {
	t.Helper()
	f, err := os.OpenFile("/dev/fuse", os.O_RDWR, 0)
	if err != nil {
		t.Skipf("needs FUSE: %v", err)
	}
	f.Close()
	diskfstest.NeedTool(t, "fusermount3")
}

var shopDB = points.Volume{Namespace: "shop", Name: "db", Cluster: "test"}

// save makes a recovery point of an image file.
func save(t testing.TB, repo *repository.Repository, v points.Volume, image string) *points.Point {
	t.Helper()
	d, err := disk.Open(image, disk.Options{Live: true})
	if err != nil {
		t.Fatal(err)
	}
	defer d.Close()
	p, _, err := backup.Run(t.Context(), repo, backup.Options{Volume: v, Disk: d})
	if err != nil {
		t.Fatal(err)
	}
	return p
}

// mounted is a mounted tree.
type mounted struct {
	*fusefs.Mounted
	tree *fusefs.FS
}

// mount mounts a repository at a directory until the test ends.
func mount(t testing.TB, repo *repository.Repository, opt fusefs.Options) *mounted {
	t.Helper()
	needFUSE(t)
	if opt.Cluster == "" {
		opt.Cluster = shopDB.Cluster
	}
	if opt.Log == nil {
		opt.Log = slog.New(slog.DiscardHandler)
	}
	tree, err := fusefs.New(t.Context(), repo, opt)
	if err != nil {
		t.Fatal(err)
	}
	m, err := tree.Mount(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := m.Close(); err != nil {
			t.Errorf("unmount: %v", err)
		}
		if err := tree.Close(); err != nil {
			t.Errorf("close: %v", err)
		}
	})
	return &mounted{m, tree}
}

// latest returns a path in the newest point of a volume.
func (m *mounted) latest(v points.Volume, name string) string {
	return filepath.Join(m.Dir, v.Namespace, v.Name, "latest", name)
}

func (m *mounted) info(t testing.TB, v points.Volume) fusefs.Info {
	t.Helper()
	b, err := os.ReadFile(m.latest(v, "info.json"))
	if err != nil {
		t.Fatal(err)
	}
	var i fusefs.Info
	if err := json.Unmarshal(b, &i); err != nil {
		t.Fatalf("%v\n%s", err, b)
	}
	return i
}

// child runs this test program again as a process that mounts and serves until it
// is killed: see TestMain.
const (
	childVariable   = "FUSEFS_TEST_SERVE"
	overlayVariable = "FUSEFS_TEST_OVERLAYS" // directory of overlays; disks can be written then
)

func TestMain(m *testing.M) {
	if dir := os.Getenv(childVariable); dir != "" {
		if err := serveUntilKilled(dir, os.Getenv("FUSEFS_TEST_CONFIG")); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		os.Exit(0)
	}
	os.Exit(m.Run())
}

func serveUntilKilled(dir, config string) error {
	ctx := context.Background()
	repo, err := repository.Open(ctx, repository.OpenOptions{ConfigFile: config, Password: repotest.Password})
	if err != nil {
		return err
	}
	overlays := os.Getenv(overlayVariable)
	tree, err := fusefs.New(ctx, repo, fusefs.Options{Cluster: shopDB.Cluster, Writable: overlays != "", OverlayDir: overlays})
	if err != nil {
		return err
	}
	m, err := tree.Mount(dir)
	if err != nil {
		return err
	}
	if _, err := os.Stdout.WriteString("ready\n"); err != nil {
		return err
	}
	<-m.Done()
	return nil
}

// startChild serves a repository at dir from another process.
func startChild(t testing.TB, r *repotest.Repo, dir string, env ...string) *exec.Cmd {
	t.Helper()
	cmd := exec.Command(os.Args[0])
	cmd.Env = append(append(os.Environ(), childVariable+"="+dir, "FUSEFS_TEST_CONFIG="+r.ConfigFile), env...)
	cmd.Stderr = os.Stderr
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = cmd.Process.Kill()
		_ = cmd.Wait() // until it writes to no directory of the test any more
	})
	if b := make([]byte, 6); func() bool { _, err = io.ReadFull(out, b); return err != nil }() {
		t.Fatalf("the serving process did not get ready: %v", err)
	}
	return cmd
}

// A tree that another process unmounted is closed without unmounting what is mounted there by now, also while a program
// has a file of it open.
func TestCloseLeavesAnotherMount(t *testing.T) {
	needFUSE(t)
	image := newVolume(t, 64*mib, slices.Clone(mkExt4), 3)
	repo := repotest.New(t).Open(t)
	save(t, repo, shopDB, image)
	mountOn := func(t *testing.T, dir string) *mounted {
		tree, err := fusefs.New(t.Context(), repo, fusefs.Options{Cluster: shopDB.Cluster, Log: slog.New(slog.DiscardHandler)})
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = tree.Close() })
		m, err := tree.Mount(dir)
		if err != nil {
			t.Fatal(err)
		}
		return &mounted{m, tree}
	}
	for _, open := range []bool{false, true} {
		t.Run(fmt.Sprintf("open=%v", open), func(t *testing.T) {
			dir := t.TempDir()
			old := mountOn(t, dir)
			if open {
				f, err := os.Open(old.latest(shopDB, "disk.img"))
				if err != nil {
					t.Fatal(err)
				}
				defer f.Close()
				if err := fusefs.Unmount(dir, true); err != nil {
					t.Fatal(err)
				}
			} else {
				mounttest.Unmount(t, dir)
				<-old.Done()
			}
			fresh := mountOn(t, dir)
			if err := old.Close(); err != nil {
				t.Error(err)
			}
			if _, err := os.ReadDir(filepath.Join(dir, "shop")); err != nil {
				t.Errorf("the mount that followed is gone: %v", err)
			}
			if err := fresh.Close(); err != nil {
				t.Error(err)
			}
		})
	}
}
