package vm

import (
	"bytes"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"
)

// site is a repository, a libvirt and a guest.
type site struct {
	t      *testing.T
	dir    string
	varve  string // the program
	socket string // of libvirt
}

func newSite(t *testing.T) *site {
	t.Helper()
	if os.Getenv("VARVE_TEST_KERNEL") == "" {
		t.Skip("boots a virtual machine: run it with \"make e2e-vm\"")
	}
	dir, err := os.MkdirTemp("/var/tmp", "varve-vm-") // short, for a socket's path, and no tmpfs
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	s := &site{t: t, dir: dir, varve: os.Getenv("VARVE"), socket: filepath.Join(dir, "libvirt-sock")}
	if s.varve == "" {
		s.varve = s.path("varve")
		build := exec.Command("go", "build", "-o", s.varve, "./cmd/varve")
		build.Dir = filepath.Join("..", "..")
		if out, err := build.CombinedOutput(); err != nil {
			t.Fatalf("build varve: %v\n%s", err, out)
		}
	}
	s.startLibvirt()
	return s
}

func (s *site) path(name string) string { return filepath.Join(s.dir, name) }

func (s *site) env() []string {
	return []string{"HOME=" + s.dir, "PATH=/usr/bin:/bin:/usr/sbin:/sbin", "VARVE_PASSWORD=correct horse", "VARVE_CONFIG=" + s.path("config"), "LC_ALL=C"}
}

func (s *site) try(name string, args ...string) (string, error) {
	var out, errs bytes.Buffer
	cmd := exec.CommandContext(s.t.Context(), name, args...)
	cmd.Dir = s.dir
	cmd.Env = s.env()
	cmd.Stdout, cmd.Stderr = &out, &errs
	if err := cmd.Run(); err != nil {
		return out.String(), fmt.Errorf("%s %s: %w\n%s%s", name, strings.Join(args, " "), err, &out, &errs)
	}
	return out.String(), nil
}

func (s *site) run(name string, args ...string) string {
	s.t.Helper()
	from := time.Now()
	out, err := s.try(name, args...)
	if took := time.Since(from); took > time.Second {
		s.t.Logf("%.1f s: %s %s", took.Seconds(), filepath.Base(name), strings.Join(args, " "))
	}
	if err != nil {
		s.t.Fatal(err)
	}
	return out
}

func (s *site) virsh(args ...string) string {
	s.t.Helper()
	return s.run("virsh", append([]string{"-q", "-c", "qemu:///system?socket=" + s.socket}, args...)...)
}

// startLibvirt runs the libvirtd of the tests of backup/source.
func (s *site) startLibvirt() {
	script, err := filepath.Abs("../../backup/source/testdata/libvirtd.sh")
	if err != nil {
		s.t.Fatal(err)
	}
	cmd := exec.Command("unshare", "-m", "--propagation", "slave", script, s.dir)
	var out bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &out
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	if err := cmd.Start(); err != nil {
		s.t.Fatal(err)
	}
	s.t.Cleanup(func() {
		for _, name := range []string{"shop", "shop2", "now"} {
			_ = exec.Command("virsh", "-q", "-c", "qemu:///system?socket="+s.socket, "destroy", name).Run()
		}
		_ = cmd.Process.Signal(syscall.SIGTERM)
		_ = cmd.Wait()
		if s.t.Failed() {
			s.t.Logf("libvirtd: %s", &out)
		}
	})
	s.until("libvirt answers", func() bool {
		_, err := s.try("virsh", "-q", "-c", "qemu:///system?socket="+s.socket, "version")
		return err == nil
	})
}

// until waits for a condition.
func (s *site) until(what string, is func() bool) {
	s.t.Helper()
	from := time.Now()
	defer func() { s.t.Logf("%.1f s: %s", time.Since(from).Seconds(), what) }()
	for from := time.Now(); time.Since(from) < 20*time.Minute; time.Sleep(50 * time.Millisecond) {
		if is() {
			return
		}
	}
	console, _ := os.ReadFile(s.path("console"))
	s.t.Fatalf("%s: it did not come to that within 20 minutes\n%s", what, tail(string(console)))
}

func tail(text string) string { return text[max(0, len(text)-3000):] }

// written is how many files the guest has written, and verified what it reported at boot.
func (s *site) written() (n int, verified string) {
	b, _ := os.ReadFile(s.path("console")) // it does not exist before the guest does
	for line := range strings.Lines(string(b)) {
		if rest, ok := strings.CutPrefix(strings.TrimSpace(line), "WROTE "); ok {
			n, _ = strconv.Atoi(rest)
		}
		if _, rest, ok := strings.Cut(strings.TrimSpace(line), "VERIFIED "); ok { // after what firmware printed
			verified = rest
		}
	}
	return n, verified
}

// more waits until the guest has written more files.
func (s *site) more() {
	s.t.Helper()
	from, _ := s.written()
	s.until("the guest writes", func() bool { n, _ := s.written(); return n >= from+3 })
}

// define defines the guest "shop"; firmware is what its definition says of UEFI.
func (s *site) define(firmware string) {
	guest, err := filepath.Abs("guest.sh")
	if err != nil {
		s.t.Fatal(err)
	}
	cache, err := filepath.Abs("../../.cache/guest")
	if err != nil {
		s.t.Fatal(err)
	}
	s.run(guest, cache, s.dir)
	s.run("truncate", "-s", "256M", s.path("ext4"))
	s.run("mke2fs", "-q", "-t", "ext4", s.path("ext4"))
	s.run("qemu-img", "convert", "-f", "raw", "-O", "qcow2", s.path("ext4"), s.path("vda.img"))
	s.run("qemu-img", "create", "-q", "-f", "raw", s.path("vdb.img"), "8M")
	s.run("qemu-img", "create", "-q", "-f", "qcow2", s.path("vdc.img"), "8M")
	var disks strings.Builder
	for name, format := range map[string]string{"vda": "qcow2", "vdb": "raw", "vdc": "qcow2"} {
		fmt.Fprintf(&disks, "<disk type='file' device='disk'><driver name='qemu' type='%s'/><source file='%s.img'/><target dev='%s' bus='virtio'/></disk>", format, s.path(name), name)
	}
	features := ""
	if firmware != "" {
		features = "<features><acpi/></features>"
	}
	text := fmt.Sprintf(`<domain type='qemu' xmlns:qemu='http://libvirt.org/schemas/domain/qemu/1.0'>
<name>shop</name><memory unit='MiB'>256</memory><vcpu>1</vcpu><cpu mode='maximum'/>
<os><type arch='x86_64' machine='q35'>hvm</type>%[3]s<kernel>%[1]s/vmlinuz</kernel><initrd>%[1]s/initrd</initrd>
<cmdline>console=ttyS0 quiet panic=-1 random.trust_cpu=on no_timer_check mitigations=off</cmdline></os>%[4]s
<devices><emulator>/usr/bin/qemu-system-x86_64</emulator>%[2]s
<serial type='file'><source path='%[1]s/console'/></serial>
<channel type='unix'><target type='virtio' name='org.qemu.guest_agent.0'/></channel>
<memballoon model='none'/></devices>
<qemu:commandline><qemu:arg value='-qmp'/><qemu:arg value='unix:%[1]s/qmp,server=on,wait=off'/></qemu:commandline>
</domain>`, s.dir, &disks, firmware, features)
	if err := os.WriteFile(s.path("shop.xml"), []byte(text), 0o600); err != nil {
		s.t.Fatal(err)
	}
	s.virsh("define", s.path("shop.xml"))
}

// group is what "varve backup -o json" prints.
type group struct {
	Group  struct{ ID, Name string }
	Points []struct{ Name, Kind, Source string }
}

func (s *site) backup(args ...string) group {
	s.t.Helper()
	var g group
	if err := json.Unmarshal([]byte(s.run(s.varve, append([]string{"backup", "-o", "json", "--scratch", s.dir}, args...)...)), &g); err != nil {
		s.t.Fatal(err)
	}
	return g
}

// by returns what found the changes of each disk.
func (g group) by() string {
	var out []string
	for _, p := range g.Points {
		name, _, _ := strings.Cut(p.Name, "@")
		if p.Source != "stream" && p.Source != "" {
			out = append(out, name+" "+p.Source)
		}
	}
	return strings.Join(out, ", ")
}

// check restores a group and checks it with the tools of the file system: every file has its
// checksum, and the disks are of one moment. It returns the number of files.
func (s *site) check(g group) int {
	s.t.Helper()
	dir := s.path("check")
	defer os.RemoveAll(dir)
	s.run(s.varve, "restore", "--group", g.Group.ID, dir)
	disks := []string{"vm-vda", "vm-vdb", "vm-vdc"}
	if g.Group.Name == "shop/q" { // by the names of QEMU's devices
		disks = []string{"q-virtio-disk0", "q-virtio-disk1", "q-virtio-disk2"}
	}
	for i, name := range disks {
		disks[i] = filepath.Join(dir, name+".img")
	}
	if _, err := s.try("e2fsck", "-fp", disks[0]); err != nil && !strings.Contains(err.Error(), "exit status 1\n") {
		s.t.Errorf("the file system of %s: %v", g.Group.Name, err)
	}
	files := filepath.Join(dir, "files")
	if err := os.Mkdir(files, 0o700); err != nil {
		s.t.Fatal(err)
	}
	s.run("debugfs", "-R", "rdump / "+files, disks[0])
	out := s.run("sh", "-c", "cd "+files+" && sha256sum -c sums")
	n := strings.Count(out, ": OK\n")
	var counters []int
	for _, disk := range disks[1:] {
		b, err := os.ReadFile(disk)
		if err != nil {
			s.t.Fatal(err)
		}
		n, _ := strconv.Atoi(strings.Trim(string(b[:512]), " \n\x00"))
		counters = append(counters, n)
	}
	if b, c := counters[0], counters[1]; b != c && b != c+1 || n < b || n > b+1 {
		s.t.Errorf("%s: %d files, vdb %d, vdc %d: not of one moment", g.Group.Name, n, b, c)
	}
	return n
}

// TestGuest backs up a guest that writes, over libvirt and over QMP, and boots it from a restore.
func TestGuest(t *testing.T) {
	s := newSite(t)
	s.run(s.varve, "repo", "create", "filesystem", "--path", s.path("repo"))
	s.define("")
	s.virsh("start", "shop")
	libvirt, qmp := "libvirt:///shop?socket="+s.socket, "qemu+qmp://"+s.path("qmp")
	s.more()
	s.until("the guest's agent answers", func() bool {
		_, err := s.try("virsh", "-q", "-c", "qemu:///system?socket="+s.socket, "domfsinfo", "shop")
		return err == nil
	})
	var groups []group
	take := func(want string, args ...string) {
		t.Helper()
		g := s.backup(args...)
		if by := g.by(); by != want {
			t.Errorf("backup %q: by %s; want %s", args, by, want)
		}
		groups = append(groups, g)
		s.more()
	}
	take("shop/vm-vda allocation, shop/vm-vdb allocation, shop/vm-vdc allocation", libvirt, "--volume", "shop/vm", "--freeze")
	if show := s.run(s.varve, "show", "shop/vm-vda@latest"); !strings.Contains(show, "guest-agent") {
		t.Errorf("the freeze is not recorded:\n%s", show)
	}
	take("shop/vm-vda bitmap, shop/vm-vdb allocation, shop/vm-vdc bitmap", libvirt, "--volume", "shop/vm")
	take("shop/q-virtio-disk0 allocation, shop/q-virtio-disk1 allocation, shop/q-virtio-disk2 allocation", qmp, "--volume", "shop/q")
	take("shop/q-virtio-disk0 bitmap, shop/q-virtio-disk1 bitmap, shop/q-virtio-disk2 bitmap", qmp, "--volume", "shop/q")
	d := s.document()
	if out, _ := d.run(libvirtSection); strings.Count(out, "incremental backup shop/vm-vda@") != 2 || !strings.Contains(out, "changes by bitmap") {
		t.Errorf("the commands of %q:\n%s", libvirtSection, out)
	}
	var documented group
	documented.Group.ID, documented.Group.Name = "shop/vm@latest", "shop/vm"
	groups = append(groups, documented)
	last, kept := 0, 0 // files of the previous point, and of the domain's last
	for i, g := range groups {
		n := s.check(g)
		if i > 0 && n <= last {
			t.Errorf("point %d has %d files, and the one before %d", i, n, last)
		}
		if last = n; strings.HasSuffix(g.Group.Name, "/vm") {
			kept = n
		}
	}

	// Its host has ended, with its kernel.
	s.virsh("destroy", "shop")
	for _, name := range []string{"console", "vmlinuz", "initrd"} {
		if err := os.Remove(s.path(name)); err != nil {
			t.Error(err)
		}
	}
	out, _ := d.run(libvirtSection)
	if !strings.Contains(out, "defined in libvirt") {
		t.Errorf("the restore:\n%s", out)
	}
	s.virsh("start", "shop2")
	s.until("the restored guest writes", func() bool { n, _ := s.written(); return n > kept })
	if _, verified := s.written(); verified != fmt.Sprintf("%d of %[1]d", kept) {
		t.Errorf("the restored guest verified %s files, and the point has %d", verified, kept)
	}
	if _, err := s.try(s.varve, "restore", "--vm", "shop/vm@latest", s.path("back2"), "--define", "--connect", "libvirt:///?socket="+s.socket); err == nil {
		t.Error("a domain that is there was defined")
	}
	s.virsh("destroy", "shop2")
	s.virsh("undefine", "shop2")
	d.run(libvirtSection) // the disks alone
	for _, disk := range []string{"vda", "vdb", "vdc"} {
		if _, err := os.Stat(s.path("disks/vm-" + disk + ".img")); err != nil {
			t.Error(err)
		}
	}
	if out, _ := d.run(libvirtSection); !strings.Contains(out, "removed checkpoint varve-") {
		t.Errorf("what was forgotten:\n%s", out)
	}
	s.virsh("undefine", "shop") // refused with checkpoints
	if err := os.Remove(s.path("console")); err != nil {
		t.Error(err)
	}
	s.checkDocument(d, kept)
}
