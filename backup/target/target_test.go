package target

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"testing"

	"github.com/varve-io/varve/backup/qemu"
	"github.com/varve-io/varve/fusefs/diskfs/diskfstest"
)

const size = 4 << 20

// names are those of a directory, hidden ones too.
func names(t *testing.T, dir string) (list []string) {
	t.Helper()
	entries, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range entries {
		list = append(list, e.Name())
	}
	return list
}

// begin opens a new image and writes to it.
func begin(ctx context.Context, path, format string, replace bool) (Target, error) {
	d, err := OpenImage(ctx, path, format, Options{Size: size, Replace: replace})
	if err != nil {
		return nil, err
	}
	if _, err := d.WriteAt(bytes.Repeat([]byte("restored"), 1<<13), 1<<20); err != nil {
		return nil, errors.Join(err, d.Abort())
	}
	return d, d.Sync()
}

// TestImage makes an image of each format, and leaves nothing else, nor anything of one that is given up.
func TestImage(t *testing.T) {
	t.Parallel()
	diskfstest.NeedTool(t, "qemu-nbd")
	for _, format := range []string{qemu.QCOW2, qemu.VMDK, qemu.VHDX, qemu.VDI, qemu.VPC} {
		t.Run(format, func(t *testing.T) {
			t.Parallel()
			dir := t.TempDir()
			path := filepath.Join(dir, "back."+format)
			for _, end := range []func(Target) error{Target.Abort, Target.Finish} {
				d, err := begin(t.Context(), path, format, false)
				if err != nil {
					t.Fatal(err)
				}
				if _, err := os.Lstat(path); err == nil {
					t.Error("it is there before it is complete")
				}
				if err := end(d); err != nil {
					t.Error(err)
				}
			}
			if got := names(t, dir); len(got) != 1 {
				t.Errorf("files: %q", got)
			}
			// A vmdk names its extent: itself.
			text, err := os.ReadFile(path)
			if named := bytes.Contains(text, []byte(`SPARSE "back.vmdk"`)); err != nil || named != (format == qemu.VMDK) {
				t.Errorf("it names itself: %v, %v", named, err)
			}
			if info, err := os.Stat(path); err != nil || info.Mode() != 0o600 {
				t.Errorf("%v, %v", info, err)
			}
			if _, err := OpenImage(t.Context(), path, format, Options{Size: size}); !errors.Is(err, ErrExists) {
				t.Errorf("a second one: %v", err)
			}
			raw := filepath.Join(t.TempDir(), "raw")
			if out, err := exec.Command("qemu-img", "convert", "-f", format, "-O", "raw", path, raw).CombinedOutput(); err != nil {
				t.Fatalf("%v: %s", err, out)
			}
			if disk, err := os.ReadFile(raw); err != nil || !bytes.HasPrefix(disk[1<<20:], []byte("restored")) {
				t.Errorf("other bytes, %v", err)
			}
		})
	}
}

// killedPath has a test binary write an image until it is killed.
const killedPath = "VARVE_TEST_KILLED_IMAGE"

// TestImageKilled removes what a killed restore left, and nothing of one that runs.
func TestImageKilled(t *testing.T) {
	if path := os.Getenv(killedPath); path != "" {
		if _, err := begin(context.Background(), path, qemu.QCOW2, false); err != nil {
			t.Fatal(err)
		}
		_, _ = os.Stdout.WriteString("ready\n")
		_, _ = os.Stdin.Read(make([]byte, 1))
		return
	}
	t.Parallel()
	diskfstest.NeedTool(t, "qemu-nbd")
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	path := filepath.Join(dir, "back.qcow2")
	other := filepath.Join(dir, ".back.qcow2.backup")
	if err := os.Mkdir(other, 0o700); err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(self, "-test.run=^TestImageKilled$")
	cmd.Env = append(os.Environ(), killedPath+"="+path)
	in, inErr := cmd.StdinPipe() // open until it is killed
	out, outErr := cmd.StdoutPipe()
	if err := errors.Join(inErr, outErr, cmd.Start()); err != nil {
		t.Fatal(err)
	}
	defer in.Close()
	line, err := bufio.NewReader(out).ReadString('\n')
	_ = cmd.Process.Kill()
	_ = cmd.Wait()
	if line != "ready\n" || err != nil {
		t.Fatalf("the restore that is to be killed: %q, %v", line, err)
	}
	if got := names(t, dir); len(got) != 2 {
		t.Fatalf("files after it was killed: %q", got)
	}
	running, err := begin(t.Context(), path, qemu.QCOW2, true)
	if err != nil {
		t.Fatal(err)
	}
	second, err := begin(t.Context(), path, qemu.QCOW2, true)
	if err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(running.Finish(), second.Finish()); err != nil {
		t.Error(err)
	}
	if got := names(t, dir); len(got) != 2 {
		t.Errorf("files: %q", got)
	}
}
