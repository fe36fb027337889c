package source_test

import (
	"bytes"
	"context"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/varve-io/varve/backup/qemu"
	"github.com/varve-io/varve/backup/source"
	"github.com/varve-io/varve/fusefs/diskfs/diskfstest"
)

// tool runs one of QEMU's programs.
func tool(t *testing.T, name string, args ...string) {
	t.Helper()
	diskfstest.NeedTool(t, name)
	if out, err := exec.Command(name, args...).CombinedOutput(); err != nil {
		t.Fatalf("%s %s: %v: %s", name, strings.Join(args, " "), err, out)
	}
}

// write writes to a qcow2 as a guest does.
func write(t *testing.T, path string, commands ...string) {
	t.Helper()
	args := []string{"-f", "qcow2"}
	for _, c := range commands {
		args = append(args, "-c", c)
	}
	tool(t, "qemu-io", append(args, path)...)
}

// contents is the disk in an image, read by qemu-img.
func contents(t *testing.T, path string) []byte {
	t.Helper()
	raw := filepath.Join(t.TempDir(), "raw")
	tool(t, "qemu-img", "convert", "-f", "qcow2", "-O", "raw", path, raw)
	b, err := os.ReadFile(raw)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// state is a backup as the engine makes one, in memory.
type state struct {
	bytes []byte
	id    string // the change ID
	by    string // the source that answered
	why   []error
}

// take opens the source and applies its changes to the state before; nil for a full.
func take(t *testing.T, path string, opt source.Options, before *state) *state {
	t.Helper()
	s, err := source.Open(t.Context(), path, opt)
	if err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := s.Close(); err != nil {
			t.Error(err)
		}
	}()
	now := takeSession(t, s, before)
	if err := errors.Join(s.Check(t.Context()), s.Commit(t.Context())); err != nil {
		t.Fatal(err)
	}
	return now
}

func takeSession(t *testing.T, s source.Session, before *state) *state {
	t.Helper()
	now, err := takeDisk(t.Context(), s.Disks()[0], before)
	if err != nil {
		t.Fatal(err)
	}
	return now
}

var track = source.Options{Track: true, Owner: "repo-volume"}

func TestImageTracked(t *testing.T) {
	t.Parallel()
	path := filepath.Join(t.TempDir(), "vm.qcow2")
	tool(t, "qemu-img", "create", "-q", "-f", "qcow2", path, "8M")
	write(t, path, "write -P 1 0 4M")
	first := take(t, path, track, nil)
	if first.by != "allocation" || first.id == "" || !bytes.Equal(first.bytes, contents(t, path)) {
		t.Fatalf("the full is by %s, its change ID %q, or its bytes are others", first.by, first.id)
	}
	write(t, path, "write -P 2 1M 64k", "discard 2M 1M", "write -z 3M 64k", "write -P 3 7M 1k")
	again := source.Options{Owner: track.Owner} // tracking goes on by itself
	second := take(t, path, again, first)
	if second.by != "bitmap" || !bytes.Equal(second.bytes, contents(t, path)) {
		t.Errorf("the increment is by %s (%v), or its bytes are others", second.by, second.why)
	}
	if third := take(t, path, again, second); third.by != "bitmap" || !bytes.Equal(third.bytes, second.bytes) {
		t.Errorf("an increment without changes is by %s (%v), or differs", third.by, third.why)
	}
	info, err := qemu.ReadInfo(t.Context(), path, qemu.QCOW2)
	if err != nil || len(info.Bitmaps) != 1 {
		t.Errorf("bitmaps that are left: %+v, %v", info, err)
	}
}

// TestImageShrunkAndGrown is the first rule: zeroes are changes whatever the bitmap says.
func TestImageShrunkAndGrown(t *testing.T) {
	t.Parallel()
	for options, by := range map[string]string{
		"compat=1.1": "bitmap",
		// QEMU reserves room in the data file, and calls none of it zero.
		"data_file=d,data_file_raw=on": "allocation",
	} {
		t.Run(options, func(t *testing.T) {
			t.Parallel()
			dir := t.TempDir()
			path := filepath.Join(dir, "vm.qcow2")
			inside := func(name string, args ...string) { // the data file is of the working directory
				t.Helper()
				diskfstest.NeedTool(t, name)
				cmd := exec.Command(name, args...)
				cmd.Dir = dir
				if out, err := cmd.CombinedOutput(); err != nil {
					t.Fatalf("%s %q: %v: %s", name, args, err, out)
				}
			}
			inside("qemu-img", "create", "-q", "-f", "qcow2", "-o", options, path, "64M")
			inside("qemu-io", "-f", "qcow2", "-c", "write -P 1 0 64M", path)
			first := take(t, path, track, nil)
			inside("qemu-img", "resize", "-q", "--shrink", path, "32M")
			inside("qemu-img", "resize", "-q", path, "64M")
			// In a file without holes QEMU looks for no zeroes behind its tables.
			whole, err := os.ReadFile(path)
			if err == nil && by == "allocation" {
				err = errors.Join(os.Remove(path), os.WriteFile(path, whole, 0o600))
			}
			if err != nil {
				t.Fatal(err)
			}
			second := take(t, path, track, first)
			inside("qemu-img", "convert", "-f", "qcow2", "-O", "raw", path, "raw")
			want, err := os.ReadFile(filepath.Join(dir, "raw"))
			if err != nil || second.by != by || !bytes.Equal(second.bytes, want) {
				t.Errorf("by %s (%v), %v: the disk shrank and grew, and the increment has its old bytes", second.by, second.why, err)
			}
		})
	}
}

// TestImageOverlay is the second rule: a bitmap of the backing file does not count.
func TestImageOverlay(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	base, top := filepath.Join(dir, "base.qcow2"), filepath.Join(dir, "top.qcow2")
	tool(t, "qemu-img", "create", "-q", "-f", "qcow2", base, "8M")
	write(t, base, "write -P 1 0 8M")
	first := take(t, base, track, nil)
	tool(t, "qemu-img", "create", "-q", "-f", "qcow2", "-b", "base.qcow2", "-F", "qcow2", top)
	write(t, top, "write -P 2 1M 1M")
	second := take(t, top, source.Options{Owner: track.Owner}, first)
	if second.by != "allocation" || len(second.why) != 1 || !strings.Contains(second.why[0].Error(), "no bitmap") || !bytes.Equal(second.bytes, contents(t, top)) {
		t.Errorf("by %s (%v), or the increment misses what was written to the overlay", second.by, second.why)
	}
}

// TestImageBitmapsLost has bitmaps that must not be used, each for its reason.
func TestImageBitmapsLost(t *testing.T) {
	t.Parallel()
	for name, c := range map[string]struct {
		spoil func(t *testing.T, path, bitmap string)
		want  string
	}{
		"inconsistent": {func(t *testing.T, path, _ string) {
			// The writer is killed before it stores the bitmap.
			cmd := exec.Command("qemu-io", "-f", "qcow2", "-c", "write -P 9 1M 64k", "-c", "abort", path)
			if err := cmd.Run(); err == nil {
				t.Error("the writer was not killed")
			}
		}, "inconsistent"},
		"disabled": {func(t *testing.T, path, bitmap string) {
			tool(t, "qemu-img", "bitmap", "--disable", path, bitmap)
			write(t, path, "write -P 9 1M 64k")
		}, "disabled"},
		"removed": {func(t *testing.T, path, bitmap string) {
			tool(t, "qemu-img", "bitmap", "--remove", path, bitmap)
			write(t, path, "write -P 9 1M 64k")
		}, "has no bitmap"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			path := filepath.Join(t.TempDir(), "vm.qcow2")
			tool(t, "qemu-img", "create", "-q", "-f", "qcow2", path, "8M")
			write(t, path, "write -P 1 0 4M")
			first := take(t, path, track, nil)
			c.spoil(t, path, first.id)
			second := take(t, path, track, first)
			if second.by != "allocation" || len(second.why) != 1 || !strings.Contains(second.why[0].Error(), c.want) || !bytes.Equal(second.bytes, contents(t, path)) {
				t.Errorf("by %s (%v), or other bytes", second.by, second.why)
			}
			write(t, path, "write -P 8 2M 64k")
			if third := take(t, path, track, second); third.by != "bitmap" || !bytes.Equal(third.bytes, contents(t, path)) {
				t.Errorf("the next increment is by %s (%v), or has other bytes", third.by, third.why)
			}
		})
	}
}

// TestImageOfAnotherVolume leaves the bitmaps of others alone.
func TestImageOfAnotherVolume(t *testing.T) {
	t.Parallel()
	path := filepath.Join(t.TempDir(), "vm.qcow2")
	tool(t, "qemu-img", "create", "-q", "-f", "qcow2", path, "8M")
	tool(t, "qemu-img", "bitmap", "--add", path, "mine")
	first := take(t, path, track, nil)
	other := take(t, path, source.Options{Track: true, Owner: "repo-other"}, nil)
	write(t, path, "write -P 2 1M 64k")
	for _, s := range []*state{first, other} {
		opt := track
		if s == other {
			opt.Owner = "repo-other"
		}
		if next := take(t, path, opt, s); next.by != "bitmap" || !bytes.Equal(next.bytes, contents(t, path)) {
			t.Errorf("by %s (%v), or other bytes", next.by, next.why)
		}
	}
	if info, err := qemu.ReadInfo(t.Context(), path, qemu.QCOW2); err != nil || len(info.Bitmaps) != 3 {
		t.Errorf("bitmaps: %+v, %v", info, err)
	}
}

// TestImageAborted leaves nothing where a backup fails, and the base stays usable.
func TestImageAborted(t *testing.T) {
	t.Parallel()
	path := filepath.Join(t.TempDir(), "vm.qcow2")
	tool(t, "qemu-img", "create", "-q", "-f", "qcow2", path, "8M")
	first := take(t, path, track, nil)
	s, err := source.Open(t.Context(), path, track)
	if err != nil {
		t.Fatal(err)
	}
	if err := exec.Command("qemu-io", "-f", "qcow2", "-c", "write 0 4k", path).Run(); err == nil {
		t.Error("the image can be written to while it is read")
	}
	if err := s.Close(); err != nil {
		t.Error(err)
	}
	info, err := qemu.ReadInfo(t.Context(), path, qemu.QCOW2)
	if err != nil || len(info.Bitmaps) != 1 || info.Bitmaps[0].Name != first.id {
		t.Errorf("bitmaps: %+v, %v", info, err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := source.Open(ctx, path, track); !errors.Is(err, context.Canceled) {
		t.Errorf("a cancelled opening: %v", err)
	}
}

func TestImageFormats(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	raw := filepath.Join(dir, "raw.img")
	content := bytes.Repeat([]byte("a disk of 512 bytes units       "), 3<<15)
	if err := os.WriteFile(raw, content, 0o600); err != nil {
		t.Fatal(err)
	}
	for name, format := range map[string]string{"a.qcow2": "qcow2", "a.vmdk": "vmdk", "a.vhdx": "vhdx", "a.vdi": "vdi", "odd:a.qcow2": "qcow2"} {
		path := filepath.Join(dir, name)
		tool(t, "qemu-img", "convert", "-f", "raw", "-O", format, raw, "file:"+path)
		s := take(t, path, source.Options{}, nil)
		if !bytes.Equal(s.bytes[:len(content)], content) || len(bytes.Trim(s.bytes[len(content):], "\x00")) > 0 {
			t.Errorf("%s reads as another disk", name)
		}
		if _, err := source.Open(t.Context(), path, source.Options{Track: true}); format != "qcow2" && !errors.Is(err, source.ErrNoTracking) {
			t.Errorf("%s is tracked: %v", name, err)
		}
	}
	// What a guest may have written is taken for nothing but bytes.
	disguised := filepath.Join(dir, "guest.img")
	tool(t, "qemu-img", "create", "-q", "-f", "qcow2", "-u", "-b", "/etc/passwd", "-F", "raw", disguised, "8M")
	if _, err := source.Open(t.Context(), disguised, source.Options{}); !errors.Is(err, source.ErrFormat) || !strings.Contains(err.Error(), "--raw") {
		t.Errorf("a raw disk that looks like a qcow2: %v", err)
	}
	if _, err := source.Open(t.Context(), disguised, source.Options{Format: "qcow2"}); !errors.Is(err, qemu.ErrLeadsOut) {
		t.Errorf("one that leads to a file of the host: %v", err)
	}
	if s, err := source.Open(t.Context(), disguised, source.Options{Raw: true}); err != nil || s.Disks()[0].Kind != "image file" {
		t.Errorf("its bytes: %v", err)
	} else {
		_ = s.Close()
	}
	if err := os.Rename(raw, filepath.Join(dir, "not.qcow2")); err != nil {
		t.Fatal(err)
	}
	if _, err := source.Open(t.Context(), filepath.Join(dir, "not.qcow2"), source.Options{}); !errors.Is(err, source.ErrFormat) {
		t.Errorf("a raw disk with another name: %v", err)
	}
}
