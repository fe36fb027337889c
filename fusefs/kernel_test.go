package fusefs_test

import (
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/varve-io/varve/backup/points"
	"github.com/varve-io/varve/backup/repository/repotest"
	"github.com/varve-io/varve/fusefs"
	"github.com/varve-io/varve/fusefs/diskfs/diskfstest"
)

// The kernel mounts a point with a dirty journal, shows what a mount of the disk would, and
// leaves neither mounts nor loop devices.
func TestKernelMountOfADirtyJournal(t *testing.T) {
	for name, mkfs := range map[string][]string{"ext4": mkExt4, "xfs": mkXFS} {
		t.Run(name, func(t *testing.T) {
			needFUSE(t)
			image := crash(t, newVolume(t, 320*mib, slices.Clone(mkfs), 20))
			repo := repotest.New(t).Open(t)
			// A separate name: loop devices belong to the whole machine.
			p := save(t, repo, points.Volume{Namespace: "shop", Name: fmt.Sprintf("%s-%d", name, os.Getpid()), Cluster: "test"}, image)
			tree, err := fusefs.New(t.Context(), repo, fusefs.Options{Point: p, Writable: true})
			if err != nil {
				t.Fatal(err)
			}
			defer tree.Close()
			dir := t.TempDir()
			m, err := tree.MountKernel(dir, "", nil)
			if err != nil {
				t.Fatal(err)
			}
			defer m.Close()
			options := "ro"
			if name == "xfs" {
				options = "ro,nouuid"
			}
			want, _ := diskfstest.Mount(t, diskfstest.CopyImage(t, image), options)
			diskfstest.CompareDirs(t, dir, want, diskfstest.Options{IgnoreAtime: true})
			if !fusefs.IsKernelMount(dir) {
				t.Error("the mount does not count as one of the kernel")
			}
			if err := fusefs.UnmountKernel(dir, false, nil); err != nil {
				t.Fatal(err)
			}
			<-m.Done()
			if got := names(t, dir); len(got) != 0 {
				t.Errorf("the directory still shows %q", got)
			}
			wait(t, func() bool { return len(loopsOver(t, p.Volume.String())) == 0 })
		})
	}
}

// loopsOver lists loop devices over the disk of a mount.
func loopsOver(t testing.TB, volume string) []string {
	t.Helper()
	files, err := filepath.Glob("/sys/block/loop*/loop/backing_file")
	if err != nil {
		t.Fatal(err)
	}
	var out []string
	for _, f := range files {
		if b, err := os.ReadFile(f); err == nil && strings.Contains(string(b), "/"+volume+"/") {
			out = append(out, strings.TrimSpace(string(b)))
		}
	}
	return out
}
