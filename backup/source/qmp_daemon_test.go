package source_test

import (
	"bytes"
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/varve-io/varve/backup/cbt"
	"github.com/varve-io/varve/backup/qemu/qmp"
	"github.com/varve-io/varve/backup/source"
	"github.com/varve-io/varve/fusefs/diskfs/diskfstest"
)

// daemon is a qemu-storage-daemon with the disks of a machine. What a guest would write goes
// through files that it exports by FUSE.
type daemon struct {
	dir     string
	monitor string            // for the source
	other   *qmp.Conn         // for the test
	guest   map[string]string // the disks' files, by name
	cmd     *exec.Cmd
}

// diskOf describes a disk of a daemon.
type diskOf struct {
	name, format string
	path         string // empty to make one
	size         int64  // 0 for machineSize
}

const machineSize int64 = 8 << 20

func threeDisks() []diskOf {
	return []diskOf{{name: "vda", format: "qcow2"}, {name: "vdb", format: "raw"}, {name: "vdc", format: "qcow2"}}
}

func startDaemon(t *testing.T, disks ...diskOf) *daemon {
	t.Helper()
	diskfstest.NeedTool(t, "qemu-storage-daemon")
	if _, err := os.Stat("/dev/fuse"); err != nil {
		t.Skip("no FUSE here: a guest's writes go through it")
	}
	d := &daemon{dir: t.TempDir(), guest: map[string]string{}}
	d.monitor = filepath.Join(d.dir, "q1")
	args := []string{
		"--chardev", "socket,path=" + d.monitor + ",server=on,wait=off,id=c1", "--monitor", "chardev=c1",
		"--chardev", "socket,path=" + filepath.Join(d.dir, "q2") + ",server=on,wait=off,id=c2", "--monitor", "chardev=c2",
	}
	for _, disk := range disks {
		if disk.path == "" {
			disk.path = filepath.Join(d.dir, disk.name+".img")
			size := cmp.Or(disk.size, machineSize)
			if disk.format != "raw" {
				tool(t, "qemu-img", "create", "-q", "-f", disk.format, disk.path, fmt.Sprint(size))
			} else if err := errors.Join(os.WriteFile(disk.path, nil, 0o600), os.Truncate(disk.path, size)); err != nil { // nothing is allocated
				t.Fatal(err)
			}
		}
		mount := filepath.Join(d.dir, disk.name)
		if err := os.WriteFile(mount, nil, 0o600); err != nil {
			t.Fatal(err)
		}
		d.guest[disk.name] = mount
		args = append(args,
			"--blockdev", fmt.Sprintf("driver=file,filename=%s,node-name=%s-file,discard=unmap", disk.path, disk.name),
			"--blockdev", fmt.Sprintf("driver=%s,file=%s-file,node-name=%s,discard=unmap", disk.format, disk.name, disk.name),
			"--export", fmt.Sprintf("type=fuse,id=guest-%s,node-name=%s,mountpoint=%s,writable=on,growable=off", disk.name, disk.name, mount))
	}
	d.cmd = exec.Command("qemu-storage-daemon", args...)
	var stderr bytes.Buffer
	d.cmd.Stderr = &stderr
	if err := d.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	ended := make(chan error, 1)
	go func() { ended <- d.cmd.Wait() }()
	t.Cleanup(func() {
		if d.other != nil {
			_ = d.other.Close()
		}
		_ = d.cmd.Process.Signal(os.Interrupt)
		<-ended
		for _, mount := range d.guest {
			_ = unix.Unmount(mount, unix.MNT_DETACH) // of one that was killed
		}
		if t.Failed() && stderr.Len() > 0 {
			t.Logf("qemu-storage-daemon: %s", &stderr)
		}
	})
	for d.other == nil {
		select {
		case err := <-ended:
			ended <- err
			t.Fatalf("qemu-storage-daemon: %v: %s", err, &stderr)
		case <-time.After(10 * time.Millisecond):
		}
		d.other, _ = qmp.Dial(t.Context(), filepath.Join(d.dir, "q2"))
	}
	return d
}

func (d *daemon) uri() string { return "qemu+qmp://" + d.monitor }

// do runs a command over the other monitor.
func (d *daemon) do(t *testing.T, command string, arguments map[string]any) json.RawMessage {
	t.Helper()
	if arguments == nil {
		arguments = map[string]any{}
	}
	var answer json.RawMessage
	if err := d.other.Do(t.Context(), command, arguments, &answer); err != nil {
		t.Fatal(err)
	}
	return answer
}

// write has the guest write n bytes of value b.
func (d *daemon) write(t *testing.T, disk string, b byte, off, n int64) {
	t.Helper()
	f, err := os.OpenFile(d.guest[disk], os.O_WRONLY, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if _, err := f.WriteAt(bytes.Repeat([]byte{b}, int(n)), off); err != nil {
		t.Fatal(err)
	}
}

// read is what the guest sees.
func (d *daemon) read(t *testing.T) map[string][]byte {
	t.Helper()
	out := map[string][]byte{}
	for name, path := range d.guest {
		b, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		out[name] = b
	}
	return out
}

// mustBeClean fails if there is anything of ours in the daemon but one bitmap a disk.
func (d *daemon) mustBeClean(t *testing.T, bitmaps int) {
	t.Helper()
	var nodes []struct {
		Name    string            `json:"node-name"`
		Bitmaps []json.RawMessage `json:"dirty-bitmaps"`
	}
	if err := json.Unmarshal(d.do(t, "query-named-block-nodes", map[string]any{"flat": true}), &nodes); err != nil {
		t.Fatal(err)
	}
	for _, n := range nodes {
		want := 0
		if d.guest[n.Name] != "" {
			want = bitmaps
		}
		if len(n.Bitmaps) != want {
			t.Errorf("node %s has %d bitmaps: %s", n.Name, len(n.Bitmaps), n.Bitmaps)
		}
		if len(n.Name) > 6 && n.Name[:6] == "varve-" {
			t.Errorf("node %s is left", n.Name)
		}
	}
	if jobs := d.do(t, "query-jobs", nil); string(jobs) != "[]" {
		t.Errorf("jobs are left: %s", jobs)
	}
	var exports []json.RawMessage
	if err := json.Unmarshal(d.do(t, "query-block-exports", nil), &exports); err != nil || len(exports) != len(d.guest) {
		t.Errorf("exports are left: %s, %v", exports, err)
	}
	if err := d.other.Do(t.Context(), "nbd-server-stop", nil, nil); err == nil {
		t.Error("the NBD server was left running")
	}
}

// machine is what is recorded of the disks of a machine, by name.
type machine map[string]*state

// options of a backup after before.
func (before machine) options(scratch string) source.Options {
	opt := source.Options{Owner: "repo1234-volume12"}
	opt.Scratch = scratch
	opt.Base = func(disk string) string {
		if s := before[disk]; s != nil {
			return s.id
		}
		return ""
	}
	return opt
}

// backup makes points of all disks after before; during is called once they are open.
func (before machine) backup(ctx context.Context, uri string, opt source.Options, during func(), record func(name string, s *state)) (_ machine, err error) {
	s, err := source.Open(ctx, uri, opt)
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, s.Close()) }()
	if during != nil {
		during()
	}
	now := machine{}
	for _, d := range s.Disks() {
		one, err := takeDisk(ctx, d, before[d.Name])
		if err != nil {
			return nil, fmt.Errorf("%s: %w", d.Name, err)
		}
		if err := s.Check(ctx); err != nil {
			return nil, err
		}
		if now[d.Name] = one; record != nil {
			record(d.Name, one)
		}
	}
	return now, s.Commit(ctx)
}

func (before machine) mustBackup(t *testing.T, d *daemon, during func()) machine {
	t.Helper()
	now, err := before.backup(t.Context(), d.uri(), before.options(t.TempDir()), during, nil)
	if err != nil {
		t.Fatal(err)
	}
	return now
}

// check compares the points with what the guest saw, and says by what each was to be made.
func (before machine) check(t *testing.T, want map[string][]byte, by string) {
	t.Helper()
	for _, name := range slices.Sorted(maps.Keys(want)) {
		s := before[name]
		if s == nil {
			t.Errorf("%s was not backed up", name)
			continue
		}
		if !bytes.Equal(s.bytes, want[name]) {
			t.Errorf("%s has other bytes than the guest had, by %s", name, s.by)
		}
		if by != "" && s.by != by {
			t.Errorf("%s is by %s, not by %s: %v", name, s.by, by, s.why)
		}
	}
}

// takeDisk makes a point of one disk as the engine does, in memory.
func takeDisk(ctx context.Context, d source.Disk, before *state) (*state, error) {
	now := &state{bytes: make([]byte, d.Bytes.Size())}
	req := cbt.Request{Size: d.Bytes.Size()}
	if before != nil {
		req.Base = &cbt.Base{ChangeID: before.id, Size: int64(len(before.bytes))}
	}
	for _, src := range append(slices.Clone(d.Changes), cbt.Compare{}) {
		var list []cbt.Extent
		rep, err := src.Changes(ctx, req, func(e cbt.Extent) error {
			list = append(list, e)
			return nil
		})
		if _, ok := cbt.FallbackReason(err); ok || errors.Is(err, cbt.ErrNoBase) {
			now.why = append(now.why, err)
			continue
		}
		if err != nil {
			return nil, err
		}
		if before != nil && !rep.Allocated {
			if n := copy(now.bytes, before.bytes); n < len(now.bytes) { // the engine adds what grew
				list = append(list, cbt.Extent{Offset: int64(n), Length: int64(len(now.bytes) - n)})
			}
		}
		for _, e := range list {
			if e.Zero {
				clear(now.bytes[e.Offset:e.End()])
			} else if _, err := d.Bytes.ReadAt(now.bytes[e.Offset:e.End()], e.Offset); err != nil {
				return nil, err
			}
		}
		now.id, now.by = rep.TargetChangeID, rep.Source
		return now, nil
	}
	return nil, fmt.Errorf("no source answered: %w", errors.Join(now.why...))
}
