package source_test

import (
	"bytes"
	"errors"
	"fmt"
	"log/slog"
	"os/exec"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/varve-io/varve/backup/qemu"
	"github.com/varve-io/varve/backup/source"
	"github.com/varve-io/varve/internal/porttest"
)

// libvirtPaused backs up a stopped domain over TLS, for which it is started paused. Afterwards it is stopped again,
// whatever ended a backup in between; one that was resumed meanwhile is not.
func libvirtPaused(t *testing.T, d *domain) {
	uri := fmt.Sprintf("libvirt+tls://localhost:%d/%s?pkipath=%s/tls&nbd-port=%d", d.port, d.name, d.libvirtd.dir, porttest.Free(t))
	is := func(want string) {
		t.Helper()
		if got := strings.TrimSpace(d.virsh(t, "domstate", d.name)); got != want {
			t.Errorf("the domain is %q, want %q", got, want)
		}
		if xml := d.virsh(t, "dumpxml", "--inactive", d.name); strings.Contains(xml, "paused-for-backup") {
			t.Errorf("the definition keeps the mark: %s", xml)
		}
	}
	write := func(b byte, off int64) {
		t.Helper()
		d.start(t)
		d.write(t, "vda", b, off, 65536)
		d.write(t, "vdb", b, off, 65536)
		d.stop(t)
	}
	opt := machine{}.options(t.TempDir())
	opt.Inspect = true
	s, err := source.Open(t.Context(), uri, opt)
	if err != nil {
		t.Fatal(err)
	}
	if disk := s.Disks()[0]; disk.Kind != "qcow2 disk of a stopped libvirt domain" || disk.Bytes.Size() != machineSize {
		t.Errorf("%+v", disk)
	}
	if err := s.Close(); err != nil {
		t.Error(err)
	}
	is("shut off")

	// It is killed after each of its steps but those of the moment itself, which others try.
	write(1, 0)
	points := t.TempDir()
	if out, err := runKilled(t, uri, points, ""); err != nil {
		t.Fatal(err)
	} else if want := "marked\nstarted\n"; !strings.HasPrefix(out, want) || !strings.HasSuffix(out, "committed\nstopped\n") {
		t.Errorf("the steps are %q", out)
	}
	is("shut off")
	load := func() machine {
		now := machine{}
		for disk := range d.model {
			now[disk] = load(points, disk)
		}
		return now
	}
	load().check(t, d.model, "")
	for i, kill := range []string{"marked", "started", "open", "committed"} {
		write(byte(2+i), int64(i+1)<<16)
		_, err := runKilled(t, uri, points, kill)
		var exit *exec.ExitError
		if !errors.As(err, &exit) || exit.Sys().(syscall.WaitStatus).Signal() != syscall.SIGKILL {
			t.Fatalf("after %q: it was not killed: %v", kill, err)
		}
		now, err := load().backup(t.Context(), uri, load().options(t.TempDir()), nil, func(disk string, s *state) {
			if err := store(points, disk, s); err != nil {
				t.Error(err)
			}
		})
		if err != nil {
			t.Fatalf("after %q: %v", kill, err)
		}
		d.check(t, now, d.model, "bitmap")
		is("shut off")
		if list := strings.Fields(d.virsh(t, "checkpoint-list", d.name, "--name")); len(list) != 1 || list[0] != now["vda"].id {
			t.Errorf("after %q: checkpoints %q", kill, list)
		}
		if t.Failed() {
			t.Fatalf("after %q", kill)
		}
	}

	// After the mark was written, its owner starts it.
	if _, err := runKilled(t, uri, points, "marked"); err == nil {
		t.Fatal("it was not killed")
	}
	d.start(t)
	now := load()
	if now, err = now.backup(t.Context(), uri, now.options(t.TempDir()), func() { d.virsh(t, "resume", d.name) }, nil); err != nil {
		t.Fatal(err)
	}
	is("running")
	d.stop(t)

	// Its owner resumes it while it is backed up, and suspends it later.
	var log bytes.Buffer
	opt = now.options(t.TempDir())
	opt.Log = slog.New(slog.NewTextHandler(&log, nil))
	now, err = now.backup(t.Context(), uri, opt, func() { d.virsh(t, "resume", d.name) }, nil)
	if err != nil {
		t.Fatal(err)
	}
	d.check(t, now, d.model, "bitmap")
	if is("running"); !strings.Contains(log.String(), "was resumed") {
		t.Errorf("the log is %s", &log)
	}
	if live := d.virsh(t, "dumpxml", d.name); strings.Contains(live, "paused-for-backup") {
		t.Errorf("the domain that was resumed keeps the mark: %s", live)
	}
	d.virsh(t, "suspend", d.name)
	d.virsh(t, "reset", d.name) // QEMU then says what it says of one that never ran
	if now, err = now.backup(t.Context(), uri, now.options(t.TempDir()), nil, nil); err != nil {
		t.Fatal(err)
	}
	is("paused")
	d.check(t, now, d.model, "bitmap")

	// A backup of another host has started it, just now or long ago.
	d.stop(t)
	d.start(t)
	for _, c := range []struct {
		before time.Duration
		state  string
	}{{time.Minute, "paused"}, {48 * time.Hour, "shut off"}} {
		d.virsh(t, "metadata", d.name, "https://varve.io/libvirt/paused/1", "--live", "--key", "varve", "--set",
			fmt.Sprintf("<paused-for-backup by='other/0' at='%s'/>", time.Now().Add(-c.before).UTC().Format(time.RFC3339Nano)))
		if now, err = now.backup(t.Context(), uri, now.options(t.TempDir()), nil, nil); err != nil {
			t.Fatal(err)
		}
		is(c.state)
	}
	d.start(t)

	// A start would use up its saved memory.
	d.virsh(t, "managedsave", d.name)
	if _, err := source.Open(t.Context(), uri, now.options(t.TempDir())); err == nil || !strings.Contains(err.Error(), "its memory was saved") {
		t.Errorf("of a domain with saved memory: %v", err)
	}
	is("shut off")
	d.virsh(t, "managedsave-remove", d.name)

	removed, err := source.Forget(t.Context(), uri, source.Options{Owner: now.options("").Owner})
	if err != nil || len(removed) != 1 {
		t.Errorf("forgot %q, %v", removed, err)
	}
	is("shut off")
	if info, err := qemu.ReadInfo(t.Context(), d.path("vda"), qemu.QCOW2); err != nil || len(info.Bitmaps) != 0 {
		t.Errorf("bitmaps are left: %+v, %v", info, err)
	}
}
