package source_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/varve-io/varve/backup/libvirt"
	"github.com/varve-io/varve/backup/libvirt/libvirttest"
	"github.com/varve-io/varve/backup/qemu"
	"github.com/varve-io/varve/backup/source"
	"github.com/varve-io/varve/fusefs/diskfs/diskfstest"
	"github.com/varve-io/varve/internal/porttest"
)

// libvirtRemote backs up a domain over ssh and over TLS, each twice, by this machine's own
// loopback interface.
func libvirtRemote(t *testing.T, d *domain) {
	diskfstest.NeedTool(t, "sshd")
	diskfstest.NeedTool(t, "ssh-keygen")
	d.start(t)
	d.write(t, "vda", 1, 0, 4<<20)
	path := libvirttest.StartSSH(t)
	ssh := func(args ...string) string {
		t.Helper()
		cmd := exec.CommandContext(t.Context(), os.Args[0], args...)
		cmd.Env = append(os.Environ(), "PATH="+path+":"+os.Getenv("PATH"))
		out, err := cmd.CombinedOutput()
		if err != nil {
			t.Fatalf("%q: %v: %s", args, err, out)
		}
		return string(out)
	}
	if room, err := strconv.ParseInt(ssh("libvirt-room", "libvirt+ssh://varve-test/"+d.name+"?socket="+d.socket, t.TempDir()), 10, 64); err != nil || room < 1<<20 {
		t.Errorf("the room over ssh is %d, %v", room, err)
	}
	for _, uri := range []string{
		fmt.Sprintf("libvirt+ssh://varve-test/%s?socket=%s", d.name, d.socket),
		fmt.Sprintf("libvirt+tls://localhost:%d/%s?pkipath=%s/tls&nbd-port=%d", d.port, d.name, d.libvirtd.dir, porttest.Free(t)),
	} {
		parts := fmt.Sprintf("xml\nnvram %x\nloader %x\n", bytes.Repeat([]byte("n"), 64<<10), bytes.Repeat([]byte("l"), 64<<10))
		if got := ssh("libvirt-parts", uri, t.TempDir()); got != parts {
			t.Errorf("%s: the parts are %.60q, want %.60q", uri, got, parts)
		}
		points := t.TempDir()
		for i := range 2 {
			d.write(t, "vda", byte(7+i), 1<<20, 65536)
			ssh("killed-backup", uri, points, "")
		}
		now := machine{}
		for disk := range d.model {
			now[disk] = load(points, disk)
		}
		now.check(t, d.model, "")
		d.mustBeClean(t, 1)
		d.virsh(t, "checkpoint-delete", d.name, now["vda"].id)
	}
	libvirtFolders(t, d, ssh)
	libvirtRemoteStopped(t, d, ssh)
}

// libvirtFolders looks at the storage pools by which files and room are seen over TLS: those of others stay, those that a
// killed process left go, and a full scratch directory ends the backup.
func libvirtFolders(t *testing.T, d *domain, ssh func(...string) string) {
	t.Helper()
	uri := fmt.Sprintf("libvirt+tls://localhost:%d/%s?pkipath=%s/tls&nbd-port=%d", d.port, d.name, d.libvirtd.dir, porttest.Free(t))
	pools := func() string { return strings.Join(strings.Fields(d.virsh(t, "pool-list", "--all", "--name")), " ") }
	if left := pools(); left != "" {
		t.Errorf("pools are left: %s", left)
	}
	want := ssh("libvirt-parts", uri, t.TempDir())
	d.virsh(t, "pool-create-as", "theirs", "dir", "--target", d.dir)
	if got := ssh("libvirt-parts", uri, t.TempDir()); got != want {
		t.Errorf("by another's pool the parts are %.60q", got)
	}
	nvram := filepath.Join(d.dir, "nvram")
	if err := os.WriteFile(nvram, bytes.Repeat([]byte("m"), 80<<10), 0o600); err != nil { // the pool knows another size
		t.Fatal(err)
	}
	if got := ssh("libvirt-parts", uri, t.TempDir()); !strings.Contains(got, fmt.Sprintf("nvram %x\n", bytes.Repeat([]byte("m"), 80<<10))) {
		t.Errorf("a file that has grown is %.60q", got)
	}
	if left := pools(); left != "theirs" {
		t.Errorf("the pools are %q", left)
	}
	d.virsh(t, "pool-destroy", "theirs")
	for _, after := range []func(){
		func() { ssh("libvirt-parts", uri, t.TempDir()) },
		func() {
			if said := ssh("libvirt-forget", uri); !strings.Contains(said, "storage pool varve-folder-dead") {
				t.Errorf("forgot %s", said)
			}
		},
	} {
		d.virsh(t, "pool-create-as", "varve-folder-dead", "dir", "--target", d.dir)
		after()
		if left := pools(); left != "" {
			t.Errorf("pools are left: %s", left)
		}
	}

	pid, err := os.ReadFile(filepath.Join(d.libvirtd.dir, "pid"))
	if err != nil {
		t.Fatal(err)
	}
	small := filepath.Join(d.libvirtd.dir, "small") // which libvirtd has
	_, err = machine{}.backup(t.Context(), uri, machine{}.options(small), func() {
		if err := os.WriteFile(filepath.Join("/proc", strings.TrimSpace(string(pid)), "root", small, "full"), make([]byte, 30<<20), 0o600); err != nil {
			t.Error(err)
		}
		for end := time.Now().Add(patience); !strings.Contains(d.try("domjobinfo", d.name), "None"); time.Sleep(50 * time.Millisecond) {
			if time.Now().After(end) {
				t.Error("the job goes on")
				return
			}
		}
	}, nil)
	if !errors.Is(err, source.ErrScratchFull) {
		t.Errorf("the scratch directory is full: %v", err)
	}
	if left := pools(); left != "" {
		t.Errorf("pools are left: %s", left)
	}
	d.mustBeClean(t, 0)
}

// libvirtRemoteStopped backs up a stopped domain over ssh, the second time by bitmaps; and is killed in between, which ends
// the servers of the images there.
func libvirtRemoteStopped(t *testing.T, d *domain, ssh func(...string) string) {
	t.Helper()
	d.stop(t)
	points, uri := t.TempDir(), fmt.Sprintf("libvirt+ssh://varve-test/%s?socket=%s", d.name, d.socket)
	ssh("killed-backup", uri, points, "")
	d.start(t)
	d.write(t, "vda", 21, 2<<20, 65536)
	d.stop(t)
	left := func() string {
		servers, _ := exec.Command("pgrep", "-af", "^(env LC_ALL=C )?qemu-nbd .*"+d.dir+"/").CombinedOutput()
		return string(servers)
	}
	if said := ssh("killed-at", uri, points, "recorded vda"); !strings.Contains(said, "vda by bitmap") {
		t.Errorf("the killed one: %s", said)
	}
	for end := time.Now().Add(patience); left() != ""; time.Sleep(50 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("servers are left: %s", left())
		}
	}
	d.waitUnlocked(t)
	said := ssh("killed-backup", uri, points, "")
	if !strings.Contains(said, "vda by bitmap") || !strings.Contains(said, "vdc by bitmap") || !strings.Contains(said, "vdb by allocation") {
		t.Errorf("the second: %s", said)
	}
	now := machine{}
	for disk := range d.model {
		now[disk] = load(points, disk)
	}
	now.check(t, d.model, "")
	if servers := left(); servers != "" {
		t.Errorf("servers are left: %s", servers)
	}
	if info, err := qemu.ReadInfo(t.Context(), d.path("vda"), qemu.QCOW2); err != nil || len(info.Bitmaps) != 1 || info.Bitmaps[0].Name != now["vda"].id {
		t.Errorf("bitmaps: %+v, %v; want one, %s", info, err, now["vda"].id)
	}
	removed := ssh("libvirt-forget", uri)
	if info, err := qemu.ReadInfo(t.Context(), d.path("vda"), qemu.QCOW2); err != nil || len(info.Bitmaps) != 0 || !strings.Contains(removed, now["vda"].id) {
		t.Errorf("forgot %q, and left %+v, %v", removed, info, err)
	}
	// A running machine has the image.
	lock := exec.CommandContext(t.Context(), "qemu-nbd", "-t", "-f", "qcow2", "-k", t.TempDir()+"/s", d.path("vda"))
	if err := lock.Start(); err != nil {
		t.Fatal(err)
	}
	defer func() { _ = lock.Process.Kill(); _ = lock.Wait() }()
	for end := time.Now().Add(patience); ; time.Sleep(50 * time.Millisecond) {
		if said := ssh("libvirt-locked", uri, t.TempDir()); strings.Contains(said, qemu.ErrLocked.Error()) {
			break
		} else if time.Now().After(end) {
			t.Fatalf("an image in use: %s", said)
		}
	}
	if left() == "" {
		t.Error("servers are not found")
	}
}

// waitUnlocked waits until programs that were killed have let go of the images: a process has no command line
// before its last thread has ended, and the locks with that.
func (d *domain) waitUnlocked(t *testing.T) {
	t.Helper()
	for _, disk := range domainDisks {
		for end := time.Now().Add(patience); ; time.Sleep(50 * time.Millisecond) {
			out, err := exec.Command("qemu-io", "-f", disk.format, "-c", "length", d.path(disk.name)).CombinedOutput()
			if err == nil {
				break
			}
			if time.Now().After(end) {
				t.Fatalf("%s is in use: %s", disk.name, out)
			}
		}
	}
}

// printParts prints the parts of a machine, and in hex what they hold, but for its definition.
func printParts(uri, scratch string) (err error) {
	s, err := source.Open(context.Background(), uri, machine{}.options(scratch))
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, s.Close()) }()
	for _, p := range s.(source.Machine).Parts() {
		if p.Name == source.PartXML {
			fmt.Fprintln(os.Stdout, p.Name)
		} else {
			fmt.Fprintf(os.Stdout, "%s %x\n", p.Name, p.Content)
		}
	}
	return nil
}

// printRoom prints the room in a directory of another machine, in bytes.
func printRoom(text, dir string) error {
	uri, err := libvirt.ParseURI(text)
	if err != nil {
		return err
	}
	conn, err := libvirt.Dial(context.Background(), uri, "", dir)
	if err != nil {
		return err
	}
	for end := time.Now().Add(patience); time.Now().Before(end); time.Sleep(10 * time.Millisecond) {
		if n := conn.Free(); n >= 0 {
			fmt.Fprint(os.Stdout, n)
			return conn.Close()
		}
	}
	return errors.New("the room is not known")
}
