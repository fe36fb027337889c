package source_test

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/varve-io/varve/backup/libvirt"
	"github.com/varve-io/varve/backup/libvirt/libvirttest"
	"github.com/varve-io/varve/backup/qemu"
	"github.com/varve-io/varve/backup/source"
	"github.com/varve-io/varve/fusefs/diskfs/diskfstest"
	"github.com/varve-io/varve/internal/porttest"
)

// libvirtd is a real one of our own, in a mount namespace: it finds and leaves nothing of this
// machine's.
type libvirtd struct {
	dir, socket string
	port        int // for TLS
}

func startLibvirt(t *testing.T) *libvirtd {
	t.Helper()
	diskfstest.NeedTool(t, "libvirtd")
	diskfstest.NeedTool(t, "virsh")
	diskfstest.NeedTool(t, "qemu-system-x86_64")
	if os.Getuid() != 0 {
		t.Skip("a libvirt that runs machines as root is started as root")
	}
	dir, err := os.MkdirTemp("/tmp", "libvirt-") // short, as a socket's path must be
	if err != nil {
		t.Fatal(err)
	}
	l := &libvirtd{dir, filepath.Join(dir, "libvirt-sock"), porttest.Free(t)}
	libvirttest.WriteCertificates(t, filepath.Join(dir, "tls"), l.port)
	cmd := exec.Command("unshare", "-m", "--propagation", "slave", filepath.Join("testdata", "libvirtd.sh"), dir)
	var out bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &out
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	ended := make(chan error, 1)
	go func() { ended <- cmd.Wait() }()
	t.Cleanup(func() {
		var all sync.WaitGroup
		for _, name := range strings.Fields(l.try("list", "--name")) {
			all.Go(func() { l.try("destroy", name) }) // libvirt takes two seconds for each
		}
		all.Wait()
		_ = cmd.Process.Signal(syscall.SIGTERM)
		<-ended
		if t.Failed() {
			t.Logf("libvirtd: %s", out.Bytes()[max(0, out.Len()-3000):])
		}
		_ = os.RemoveAll(dir)
	})
	for !strings.Contains(l.try("version"), "libvirt") {
		select {
		case err := <-ended:
			ended <- err
			t.Fatalf("libvirtd: %v: %s", err, &out)
		case <-time.After(50 * time.Millisecond):
		}
	}
	return l
}

func (l *libvirtd) try(args ...string) string {
	out, err := exec.Command("virsh", append([]string{"-q", "-c", "qemu:///system?socket=" + l.socket}, args...)...).CombinedOutput()
	if err != nil {
		return ""
	}
	return string(out)
}

func (l *libvirtd) virsh(t *testing.T, args ...string) string {
	t.Helper()
	out, err := exec.Command("virsh", append([]string{"-q", "-c", "qemu:///system?socket=" + l.socket}, args...)...).CombinedOutput()
	if err != nil {
		t.Fatalf("virsh %s: %v: %s", strings.Join(args, " "), err, out)
	}
	return string(out)
}

// domain is a machine that does not run a system: what a guest would write is written through
// its devices by QEMU's monitor. It is paused, and so costs no time.
type domain struct {
	*libvirtd

	name, dir string
	model     map[string][]byte // what the disks hold
	mu        sync.Mutex        // of what a proxy sees
}

var domainDisks = []struct{ name, format string }{{"vda", "qcow2"}, {"vdb", "raw"}, {"vdc", "qcow2"}}

func (l *libvirtd) define(t *testing.T, name string) *domain {
	t.Helper()
	d := &domain{libvirtd: l, name: name, dir: t.TempDir(), model: map[string][]byte{}}
	for _, disk := range domainDisks {
		tool(t, "qemu-img", "create", "-q", "-f", disk.format, d.path(disk.name), "8M")
		d.model[disk.name] = make([]byte, machineSize)
	}
	// Firmware of a machine that never runs an instruction.
	for _, name := range []string{"loader", "nvram"} {
		if err := os.WriteFile(filepath.Join(d.dir, name), bytes.Repeat([]byte(name[:1]), 64<<10), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	d.virsh(t, "define", d.xml(t))
	return d
}

func (d *domain) path(disk string) string { return filepath.Join(d.dir, disk+".img") }

func (d *domain) xml(t *testing.T) string {
	t.Helper()
	var disks strings.Builder
	for _, disk := range domainDisks {
		fmt.Fprintf(&disks, `<disk type='file' device='disk'><driver name='qemu' type='%s' discard='unmap'/><source file='%s'/><target dev='%s' bus='virtio'/></disk>`,
			disk.format, d.path(disk.name), disk.name)
	}
	path := filepath.Join(d.dir, "domain.xml")
	text := fmt.Sprintf(`<domain type='qemu'><name>%s</name><uuid>00000000-0000-4000-8000-%012s</uuid><memory unit='MiB'>32</memory><vcpu>1</vcpu>
<os><type arch='x86_64' machine='pc'>hvm</type><loader readonly='yes' type='pflash'>%[4]s/loader</loader><nvram>%[4]s/nvram</nvram></os><features><acpi/></features>
<devices><emulator>/usr/bin/qemu-system-x86_64</emulator>%[3]s<controller type='usb' model='none'/><memballoon model='none'/></devices></domain>`,
		d.name, d.name[2:], &disks, d.dir)
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

func (d *domain) start(t *testing.T) { t.Helper(); d.virsh(t, "start", "--paused", d.name) }

func (d *domain) stop(t *testing.T) { t.Helper(); d.virsh(t, "destroy", d.name, "--graceful") }

// alias is libvirt's name of a disk's device.
func alias(disk string) string {
	return map[string]string{"vda": "virtio-disk0", "vdb": "virtio-disk1", "vdc": "virtio-disk2"}[disk]
}

// hmp has QEMU run a command of qemu-io through a disk's device.
func (d *domain) hmp(t *testing.T, disk, command string) {
	t.Helper()
	out := d.virsh(t, "qemu-monitor-command", d.name, "--hmp", fmt.Sprintf("qemu-io -d /machine/peripheral/%s/virtio-backend \"%s\"", alias(disk), command))
	if strings.TrimSpace(out) != "" { // what it wrote goes to QEMU's own output
		t.Fatalf("%s: %s: %s", disk, command, out)
	}
}

// write has the guest write n bytes of value b; both are whole sectors.
func (d *domain) write(t *testing.T, disk string, b byte, off, n int64) {
	t.Helper()
	d.hmp(t, disk, fmt.Sprintf("write -P %d %d %d", b, off, n))
	copy(d.model[disk][off:off+n], bytes.Repeat([]byte{b}, int(n)))
}

func (d *domain) read() map[string][]byte {
	out := map[string][]byte{}
	for name, b := range d.model {
		out[name] = bytes.Clone(b)
	}
	return out
}

func (d *domain) uri() string { return "libvirt:///" + d.name + "?socket=" + d.socket }

func (d *domain) mustBackup(t *testing.T, before machine, during func()) machine {
	t.Helper()
	now, err := before.backup(t.Context(), d.uri(), before.options(t.TempDir()), during, nil)
	if err != nil {
		t.Fatal(err)
	}
	return now
}

// mustBeClean fails if libvirt has a job, or another number of checkpoints.
func (d *domain) mustBeClean(t *testing.T, checkpoints int) {
	t.Helper()
	if job := d.virsh(t, "domjobinfo", d.name); !strings.Contains(job, "None") {
		t.Errorf("a job is left: %s", job)
	}
	if list := strings.Fields(d.virsh(t, "checkpoint-list", d.name, "--name")); len(list) != checkpoints {
		t.Errorf("checkpoints: %q", list)
	}
}

// check compares points of the disks; by is of those that are tracked, which vdb is not: it is raw.
func (d *domain) check(t *testing.T, now machine, want map[string][]byte, by string) {
	t.Helper()
	now.check(t, map[string][]byte{"vda": want["vda"], "vdc": want["vdc"]}, by)
	now.check(t, map[string][]byte{"vdb": want["vdb"]}, "")
}

func TestLibvirt(t *testing.T) {
	t.Parallel()
	l := startLibvirt(t)
	for name, test := range map[string]func(*testing.T, *domain){
		"1-RunningAndStopped": runningAndStopped, "2-Killed": libvirtKilled, "3-Checkpoints": libvirtCheckpoints, "4-Jobs": libvirtJobs, "5-Remote": libvirtRemote,
		"6-Conforms": libvirtConforms, "7-Overlay": libvirtOverlay, "8-Hangs": libvirtHangs, "9-Forget": libvirtForget,
		"0-Paused": libvirtPaused,
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			l := l
			if name == "0-Paused" { // over TLS it has storage pools, which are all of a libvirt's, and 5-Remote counts them
				l = startLibvirt(t)
			}
			test(t, l.define(t, "vm"+name[:1])) // a number would be an ID to virsh
		})
	}
}

// runningAndStopped goes from a running machine to a stopped one and back, by bitmaps.
func runningAndStopped(t *testing.T, d *domain) {
	d.start(t)
	for name := range d.model {
		d.write(t, name, 1, 0, 4<<20)
	}
	want := d.read()
	first := d.mustBackup(t, machine{}, func() {
		for name := range d.model {
			d.write(t, name, 2, 1<<20, 1<<20)
		}
	})
	d.check(t, first, want, "allocation")
	d.mustBeClean(t, 1)
	d.write(t, "vdc", 3, 6<<20, 512)
	want = d.read()
	second := d.mustBackup(t, first, func() { d.write(t, "vda", 4, 0, 8<<20) })
	d.check(t, second, want, "bitmap")
	d.mustBeClean(t, 1)

	opt := second.options("")
	opt.Inspect = true
	s, err := source.Open(t.Context(), d.uri(), opt)
	if err != nil {
		t.Fatal(err)
	}
	if a := s.Disks()[0]; a.Estimate.By != "bitmap" || a.Estimate.Bytes != 8<<20 || a.Bytes.Size() != machineSize || a.Kind != "qcow2 disk of a running libvirt domain" {
		t.Errorf("%+v, %+v", a, a.Estimate)
	}
	if err := s.Close(); err != nil {
		t.Error(err)
	}

	d.stop(t)
	third := d.mustBackup(t, second, nil)
	d.check(t, third, d.read(), "bitmap")
	d.start(t)
	d.write(t, "vda", 5, 5<<20, 65536)
	want = d.read()
	fourth := d.mustBackup(t, third, nil)
	d.check(t, fourth, want, "bitmap")
	d.mustBeClean(t, 1)

	removed, err := source.Forget(t.Context(), d.uri(), source.Options{Owner: first.options("").Owner})
	if err != nil || len(removed) != 1 {
		t.Errorf("forgot %q, %v", removed, err)
	}
	d.mustBeClean(t, 0)
	fifth := d.mustBackup(t, fourth, nil)
	d.check(t, fifth, d.read(), "allocation")
	if why := fifth["vda"].why; len(why) != 1 || !strings.Contains(why[0].Error(), "cannot be used") {
		t.Errorf("why not by the bitmap: %v", why)
	}
	d.stop(t)
	removed, err = source.Forget(t.Context(), d.uri(), source.Options{})
	if err != nil || len(removed) == 0 {
		t.Errorf("forgot of the stopped domain: %q, %v", removed, err)
	}
	if list := d.virsh(t, "checkpoint-list", d.name, "--name"); strings.TrimSpace(list) != "" {
		t.Errorf("checkpoints are left: %s", list)
	}
	for _, disk := range []string{"vda", "vdc"} {
		if info, err := qemu.ReadInfo(t.Context(), d.path(disk), qemu.QCOW2); err != nil || len(info.Bitmaps) != 0 {
			t.Errorf("bitmaps are left in %s: %+v, %v", disk, info, err)
		}
	}
}

// libvirtKilled kills a backup after each of its steps; the next one is right, and by bitmaps.
func libvirtKilled(t *testing.T, d *domain) {
	d.start(t)
	points := t.TempDir()
	d.write(t, "vda", 1, 0, 4<<20)
	out, err := runKilled(t, d.uri(), points, "")
	if err != nil {
		t.Fatal(err)
	}
	steps := strings.Split(strings.TrimSpace(out), "\n")
	if len(steps) < 8 {
		t.Fatalf("%d steps: %q", len(steps), steps)
	}
	for i, kill := range steps {
		d.write(t, "vda", byte(i), int64(i)<<16, 4096)
		d.write(t, "vdb", byte(i), int64(i)<<16, 4096)
		_, err := runKilled(t, d.uri(), points, kill)
		var exit *exec.ExitError
		if !errors.As(err, &exit) || exit.Sys().(syscall.WaitStatus).Signal() != syscall.SIGKILL {
			t.Fatalf("after %q: it was not killed: %v", kill, err)
		}
		d.write(t, "vdc", byte(i), 4<<20+int64(i)<<16, 4096)
		want := d.read()
		before := machine{}
		for name := range d.model {
			before[name] = load(points, name)
		}
		now := d.mustBackup(t, before, nil)
		d.check(t, now, want, "bitmap")
		if t.Failed() {
			t.Fatalf("after %q", kill)
		}
		for name, s := range now {
			if err := store(points, name, s); err != nil {
				t.Fatal(err)
			}
		}
	}
	d.mustBeClean(t, 1)
}

// libvirtCheckpoints has checkpoints that libvirt lost, and bitmaps that are gone.
func libvirtCheckpoints(t *testing.T, d *domain) {
	d.start(t)
	d.write(t, "vda", 1, 0, 4<<20)
	now := d.mustBackup(t, machine{}, nil)

	// What libvirt knows of it is gone, the bitmaps are there: as after a migration.
	d.virsh(t, "checkpoint-delete", d.name, now["vda"].id, "--metadata")
	d.write(t, "vda", 2, 1<<20, 4096)
	now = d.mustBackup(t, now, nil)
	d.check(t, now, d.read(), "bitmap")
	d.mustBeClean(t, 1)

	// A bitmap is gone, and libvirt knows of the checkpoint.
	alias := d.node("vda")
	d.virsh(t, "qemu-monitor-command", d.name, "--pretty", fmt.Sprintf(`{"execute":"block-dirty-bitmap-remove","arguments":{"node":"%s","name":"%s"}}`, alias, now["vda"].id))
	d.write(t, "vda", 3, 2<<20, 4096)
	want := d.read()
	now = d.mustBackup(t, now, nil)
	now.check(t, want, "allocation")
	if why := now["vda"].why; len(why) != 1 || !strings.Contains(why[0].Error(), "libvirt cannot use") {
		t.Errorf("why not by the bitmap: %v", why)
	}
	d.mustBeClean(t, 1)

	// Rule 1: the disk shrank and grew, no bit is set, and half of it is lost.
	d.write(t, "vdc", 7, 0, 8<<20)
	now = d.mustBackup(t, now, nil)
	for _, size := range []int64{machineSize / 2, machineSize} {
		d.virsh(t, "qemu-monitor-command", d.name, fmt.Sprintf(`{"execute":"block_resize","arguments":{"node-name":"%s","size":%d}}`, d.node("vdc"), size))
	}
	clear(d.model["vdc"][machineSize/2:])
	now = d.mustBackup(t, now, nil)
	d.check(t, now, d.read(), "bitmap")

	// An external snapshot: the new top image continues the bitmap.
	d.write(t, "vda", 4, 3<<20, 4096)
	d.virsh(t, "snapshot-create-as", d.name, "--disk-only", "--no-metadata", "--diskspec", "vda,file="+filepath.Join(d.dir, "top.qcow2"),
		"--diskspec", "vdb,snapshot=no", "--diskspec", "vdc,snapshot=no")
	d.write(t, "vda", 5, 5<<20, 4096)
	want = d.read()
	now = d.mustBackup(t, now, nil)
	d.check(t, now, want, "")
}

// node is the root node of a disk.
func (d *domain) node(disk string) string {
	index := map[string]int{"vda": 3, "vdb": 2, "vdc": 1}[disk] // libvirt numbers them from the last
	return fmt.Sprintf("libvirt-%d-format", index)
}

// abortJob ends a job, which goes on for a moment after the command.
func (d *domain) abortJob(t *testing.T) {
	t.Helper()
	d.virsh(t, "domjobabort", d.name)
	for !strings.Contains(d.try("domjobinfo", d.name), "None") { // virsh fails while libvirt ends the job
		time.Sleep(10 * time.Millisecond)
	}
}

// askAboutJobs asks all the time whether a job runs while some begin and end: there is always an answer.
func (d *domain) askAboutJobs(t *testing.T) {
	t.Helper()
	u, err := libvirt.ParseURI(d.uri())
	if err != nil {
		t.Fatal(err)
	}
	conn, err := libvirt.Dial(t.Context(), u, "", "")
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	dom, err := conn.Lookup(d.name)
	if err != nil {
		t.Fatal(err)
	}
	var over atomic.Bool
	answered := make(chan error, 1)
	go func() {
		var err error
		for err == nil && !over.Load() {
			_, err = conn.JobRuns(dom)
		}
		answered <- err
	}()
	for range 10 {
		d.virsh(t, "backup-begin", d.name, filepath.Join(d.dir, "job.xml"))
		d.abortJob(t)
	}
	over.Store(true)
	if err := <-answered; err != nil {
		t.Error(err)
	}
}

// libvirtJobs has jobs of others, and one that is ended while the backup reads.
func libvirtJobs(t *testing.T, d *domain) {
	d.start(t)
	d.write(t, "vda", 1, 0, 4<<20)
	other := source.Options{Owner: "repo1234-another1"}
	other.Scratch = t.TempDir()
	if err := os.WriteFile(filepath.Join(d.dir, "job.xml"), []byte(fmt.Sprintf(
		`<domainbackup mode='pull'><server transport='unix' socket='%s/nbd'/><disks><disk name='vda' type='file'><scratch file='%[1]s/theirs'/></disk></disks></domainbackup>`, d.dir)), 0o600); err != nil {
		t.Fatal(err)
	}
	d.virsh(t, "backup-begin", d.name, filepath.Join(d.dir, "job.xml"))
	if _, err := source.Open(t.Context(), d.uri(), other); !errors.Is(err, source.ErrMachineBusy) {
		t.Errorf("another tool's job: %v", err)
	}
	d.abortJob(t)
	d.askAboutJobs(t)
	s, err := source.Open(t.Context(), d.uri(), other)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := source.Open(t.Context(), d.uri(), other); !errors.Is(err, source.ErrMachineBusy) {
		t.Errorf("a second backup: %v", err)
	}
	var parts []string
	for _, p := range s.(source.Machine).Parts() {
		parts = append(parts, p.Name)
		if b, err := os.ReadFile(filepath.Join(d.dir, p.Name)); p.Name != "xml" && (err != nil || !bytes.Equal(b, p.Content)) {
			t.Errorf("the %s is another, or cannot be read: %v", p.Name, err)
		}
	}
	if strings.Join(parts, " ") != "xml nvram loader" {
		t.Errorf("parts: %q", parts)
	}
	d.abortJob(t)
	if err := s.Check(t.Context()); !errors.Is(err, source.ErrMoment) {
		t.Errorf("the job is gone: %v", err)
	}
	if _, err := takeDisk(t.Context(), s.Disks()[0], nil); err == nil {
		t.Error("a disk was read after the job's end")
	}
	if err := s.Close(); err != nil {
		t.Error(err)
	}
	d.mustBeClean(t, 0)
	for uri, want := range map[string]error{
		"libvirt:///none?socket=" + d.socket: nil, d.uri() + "&x=y": source.ErrURI, "libvirt:///?socket=" + d.socket: source.ErrURI,
	} {
		if _, err := source.Open(t.Context(), uri, source.Options{}); err == nil || want != nil && !errors.Is(err, want) {
			t.Errorf("%s: %v", uri, err)
		}
	}
}
