package main

import (
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"sync"
	"testing"

	"github.com/varve-io/varve/backup/imageio/imageiotest"
	"github.com/varve-io/varve/backup/libvirt/libvirttest"
	"github.com/varve-io/varve/backup/source/cephtest"
	"github.com/varve-io/varve/fusefs/diskfs/diskfstest"
	"github.com/varve-io/varve/internal/porttest"
)

// newVMDocument reads docs/vm.md.
func newVMDocument(t *testing.T) *vmDocument {
	t.Helper()
	text, err := os.ReadFile("../../docs/vm.md")
	if err != nil {
		t.Fatal(err)
	}
	env, _ := newBackupEnv(t)
	d := &vmDocument{dir: env["HOME"], env: append(env.list(), "PATH="+os.Getenv("PATH")), sections: map[string][]string{}}
	for _, section := range strings.Split(string(text), "\n## ")[1:] {
		name, body, _ := strings.Cut(section, "\n")
		for _, b := range regexp.MustCompile("(?s)\n```sh\n(.*?)\n```\n").FindAllStringSubmatch(body, -1) {
			d.sections[name] = append(d.sections[name], b[1])
		}
	}
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	for _, dir := range []string{"images", "run/backup", "run/restore", "pki"} {
		if err := os.MkdirAll(filepath.Join(d.dir, dir), 0o700); err != nil {
			t.Fatal(err)
		}
	}
	d.port = strconv.Itoa(porttest.Free(t))
	d.paths = strings.NewReplacer(
		"varve ", "VARVE_TEST_AS_MAIN=1 '"+self+"' ",
		"/var/lib/libvirt/images/", d.dir+"/images/", "/etc/pki/ovirt/", d.dir+"/pki/", "/run/", d.dir+"/run/",
		"nbd://host/", "nbd://127.0.0.1:"+d.port+"/")
	return d
}

// TestVMDocument runs the commands of docs/vm.md about image files, NBD exports, oVirt and
// restoring, as they are printed, while guests write in between.
func TestVMDocument(t *testing.T) {
	t.Parallel()
	diskfstest.NeedTool(t, "qemu-nbd")
	d := newVMDocument(t)
	d.imageFiles(t)
	d.nbdExports(t)
	d.oVirt(t)
	d.restoring(t)
	for _, name := range []string{"Image files", "NBD exports", "oVirt", "Restoring"} {
		if len(d.sections[name]) > 0 {
			t.Errorf("commands of %q that were not run: %q", name, d.sections[name])
		}
	}
}

// TestVMDocumentOfQEMU runs those about a running QEMU.
func TestVMDocumentOfQEMU(t *testing.T) {
	d := newVMDocument(t)
	dir := filepath.Join(d.dir, "run", "vm")
	if err := os.Mkdir(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	if err := os.Rename(startMachine(t, dir), filepath.Join(dir, "qmp.sock")); err != nil {
		t.Fatal(err)
	}
	overwrite(t, filepath.Join(dir, "vda"), []byte("written"), 0)
	const section = "A running QEMU"
	d.prints(t, section, "full backup shop/vm-vda@", "full backup shop/vm-vdb@", "group shop/vm@")
	overwrite(t, filepath.Join(dir, "vda"), []byte("written"), 1<<20)
	d.prints(t, section, "vda: qcow2 disk of a running QEMU", "reads 64 KiB, changes by bitmap", "removed vda: varve-", "removed vdb: varve-")
	frozen := startAgent(t, filepath.Join(dir, "agent.sock"))
	d.prints(t, section, "backup shop/vm-vda@", "group shop/vm@")
	if n := frozen(); n != 1 {
		t.Errorf("the guest was frozen %d times, or is yet", n)
	}
	if left := d.sections[section]; len(left) > 0 {
		t.Errorf("commands of %q that were not run: %q", section, left)
	}
}

// TestVMDocumentOfOtherHosts runs those about libvirt on another host, which is this one, over ssh and over TLS.
func TestVMDocumentOfOtherHosts(t *testing.T) {
	t.Parallel()
	diskfstest.NeedTool(t, "sshd")
	diskfstest.NeedTool(t, "ssh-keygen")
	d := newVMDocument(t)
	port := porttest.Free(t)
	m := startLibvirtMachine(t, func(dir string) { libvirttest.WriteCertificates(t, filepath.Join(dir, "tls"), port) })
	d.env = append(d.env, "PATH="+libvirttest.StartSSH(t)+":"+os.Getenv("PATH"))
	const section = "Machines of other hosts"
	lines := strings.Split(strings.NewReplacer(
		"libvirt+ssh://root@host/shop", "'libvirt+ssh://varve-test/killed?socket="+m.socket+"'",
		"libvirt+tls://host/shop", fmt.Sprintf("'libvirt+tls://localhost:%d/killed?pkipath=%s/tls&nbd-port=%d'", port, m.dir, porttest.Free(t)),
	).Replace(d.sections[section][0]), "\n")
	if len(lines) != 2 {
		t.Fatalf("the commands are %q", lines)
	}
	d.sections[section] = lines
	m.write(t, 1)
	d.prints(t, section, "full backup shop/vm-vda@", "full backup shop/vm-vdb@", "group shop/vm@")
	m.write(t, 2)
	d.prints(t, section, "incremental backup shop/vm-vda@", "changes by bitmap", "group shop/vm@")
}

// TestVMDocumentOfCeph runs those about an image in Ceph.
func TestVMDocumentOfCeph(t *testing.T) {
	t.Parallel()
	ceph := cephtest.Start(t)
	d := newVMDocument(t)
	d.env = append(d.env, "CEPH_CONF="+ceph.Conf)
	write := func(command string) {
		t.Helper()
		ceph.Run(t, "qemu-io", "-f", "raw", "-c", command, "rbd:pool/image")
	}
	ceph.Run(t, "rbd", "create", "pool/image", "--size", "16M", "--object-size", "1M")
	write("write -P 1 0 4M")
	ceph.Run(t, "rbd", "snap", "create", "--no-progress", "pool/image@monday")
	if out := d.shell(t, "varve backup rbd://pool/image@monday --volume shop/db"); !strings.Contains(out, "RBD snapshot, changes by rbd-diff") {
		t.Errorf("the first backup prints:\n%s", out)
	}
	write("write -P 2 1M 64k")
	d.prints(t, "Ceph RBD", "incremental backup shop/db@", "RBD snapshot, changes by rbd-diff")
	if left := d.sections["Ceph RBD"]; len(left) > 0 {
		t.Errorf("commands that were not run: %q", left)
	}
	d.shell(t, "varve restore shop/db@latest back.img")
	back, err := os.ReadFile(filepath.Join(d.dir, "back.img"))
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(back, ceph.Run(t, "rbd", "export", "--no-progress", "pool/image@tuesday", "-")) {
		t.Error("what was restored has other bytes than the snapshot")
	}
}

// startAgent answers as the agent in a guest does. frozen is how often it froze the guest's file
// systems; -1 if they are frozen now.
func startAgent(t *testing.T, socket string) (frozen func() int) {
	t.Helper()
	l, err := net.Listen("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	var mu sync.Mutex
	times, status := 0, "thawed"
	var all sync.WaitGroup
	t.Cleanup(func() { _ = l.Close(); all.Wait() })
	serve := func(conn net.Conn) {
		defer conn.Close()
		for in := json.NewDecoder(&withoutMarks{conn}); ; {
			var m struct {
				Execute   string `json:"execute"`
				ID        any    `json:"id"`
				Arguments struct {
					ID any `json:"id"`
				} `json:"arguments"`
			}
			if in.Decode(&m) != nil {
				return
			}
			mu.Lock()
			answer, mark := map[string]any{"return": 1}, ""
			switch m.Execute {
			case "guest-sync-delimited":
				answer["return"], mark = m.Arguments.ID, "\xff"
			case "guest-fsfreeze-status":
				answer["return"] = status
			case "guest-fsfreeze-freeze":
				times, status = times+1, "frozen"
			case "guest-fsfreeze-thaw":
				status = "thawed"
			}
			mu.Unlock()
			if m.ID != nil {
				answer["id"] = m.ID
			}
			b, _ := json.Marshal(answer)
			if _, err := conn.Write([]byte(mark + string(b) + "\n")); err != nil {
				return
			}
		}
	}
	all.Go(func() {
		for {
			conn, err := l.Accept()
			if err != nil {
				return
			}
			all.Go(func() { serve(conn) })
		}
	})
	return func() int {
		mu.Lock()
		defer mu.Unlock()
		if status == "frozen" {
			return -1
		}
		return times
	}
}

// withoutMarks leaves out the bytes by which a client has the agent forget what it read before.
type withoutMarks struct{ r io.Reader }

func (w *withoutMarks) Read(p []byte) (int, error) {
	n, err := w.r.Read(p)
	return copy(p, bytes.ReplaceAll(p[:n], []byte{0xff}, nil)), err
}

type vmDocument struct {
	dir, port string
	env       []string
	paths     *strings.Replacer
	sections  map[string][]string // the blocks of commands that were not run yet
}

// run runs the next block of a section and returns what it printed.
func (d *vmDocument) run(t *testing.T, section string) string {
	t.Helper()
	if len(d.sections[section]) == 0 {
		t.Fatalf("docs/vm.md has no further commands in %q", section)
	}
	block := d.sections[section][0]
	d.sections[section] = d.sections[section][1:]
	return d.shell(t, block)
}

func (d *vmDocument) shell(t *testing.T, block string) string {
	t.Helper()
	cmd := exec.CommandContext(t.Context(), "bash", "-ec", d.paths.Replace(block))
	cmd.Env, cmd.Dir = d.env, d.dir
	var out, errs bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &errs
	if err := cmd.Run(); err != nil {
		t.Fatalf("%v\n%s\n--- commands:\n%s", err, &errs, block)
	}
	return out.String()
}

func (d *vmDocument) prints(t *testing.T, section string, want ...string) {
	t.Helper()
	out := d.run(t, section)
	for _, w := range want {
		if !strings.Contains(out, w) {
			t.Errorf("%s: it does not print %q:\n%s", section, w, out)
		}
	}
}

func (d *vmDocument) image() string { return filepath.Join(d.dir, "images", "vm.qcow2") }

func (d *vmDocument) guestWrites(t *testing.T, commands ...string) {
	t.Helper()
	args := []string{"-f", "qcow2"}
	for _, c := range commands {
		args = append(args, "-c", c)
	}
	qemuTool(t, "qemu-io", append(args, d.image())...)
}

func (d *vmDocument) imageFiles(t *testing.T) {
	qemuTool(t, "qemu-img", "create", "-q", "-f", "qcow2", d.image(), "8M")
	d.guestWrites(t, "write -P 1 0 2M")
	d.prints(t, "Image files", "full backup shop/vm@", "qcow2 image, changes by allocation")
	d.guestWrites(t, "write -P 2 1M 64k")
	d.prints(t, "Image files", "reads 64 KiB, changes by bitmap", "incremental backup shop/vm@", "qcow2 image, changes by bitmap")
	d.prints(t, "Image files", "removed varve-")
}

func (d *vmDocument) nbdExports(t *testing.T) {
	socket := filepath.Join(d.dir, "run", "vm.sock")
	serve := func() (stop func()) {
		_, first := startNBD(t, "qemu-nbd", "-t", "-r", "-e", "8", "-f", "qcow2", "-x", "vm", "-b", "127.0.0.1", "-p", d.port, "-B", "monday", d.image())
		_, second := startNBD(t, "qemu-nbd", "-t", "-r", "-e", "8", "-f", "qcow2", "-x", "vm", "-k", socket, "-B", "monday", d.image())
		return func() { first(); second() }
	}
	qemuTool(t, "qemu-img", "bitmap", "--add", d.image(), "monday")
	lines := strings.Split(d.sections["NBD exports"][0], "\n")
	if len(lines) != 2 {
		t.Fatalf("the exports' commands are %q", lines)
	}
	d.sections["NBD exports"] = lines
	stop := serve()
	d.prints(t, "NBD exports", "full backup shop/web@", "NBD export, changes by allocation")
	stop()
	d.guestWrites(t, "write -P 3 3M 64k")
	stop = serve()
	d.prints(t, "NBD exports", "incremental backup shop/web@", "NBD export, changes by bitmap")
	stop()
}

// offer writes the URL of a transfer to the file that the commands name.
func (d *vmDocument) offer(t *testing.T, file string, cfg imageiotest.Config) *imageiotest.Server {
	t.Helper()
	s := imageiotest.Start(t, cfg)
	ca, err := os.ReadFile(s.CA)
	if err != nil {
		t.Fatal(err)
	}
	for path, content := range map[string][]byte{file: []byte(s.URL + "\n"), "pki/ca.pem": ca} {
		if err := os.WriteFile(filepath.Join(d.dir, path), content, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	return s
}

func (d *vmDocument) oVirt(t *testing.T) {
	disk := d.contents(t, d.image())
	d.offer(t, "run/backup/root.url", imageiotest.Config{Disk: disk, ReadOnly: true})
	d.env = append(d.env, "CHECKPOINT=first")
	d.prints(t, "oVirt", "full backup shop/db@", "oVirt transfer, changes by allocation")
	copy(disk[5<<20:], "written")
	d.offer(t, "run/backup/root.url", imageiotest.Config{Disk: disk, ReadOnly: true, Dirty: []imageiotest.Range{{Offset: 5 << 20, Length: 4096}}})
	d.env = append(d.env, "FROM_CHECKPOINT=first", "CHECKPOINT=second")
	d.prints(t, "oVirt", "incremental backup shop/db@", "oVirt transfer, changes by imageio")
}

// contents is the disk in a qcow2.
func (d *vmDocument) contents(t *testing.T, image string) []byte {
	t.Helper()
	raw := filepath.Join(t.TempDir(), "raw")
	qemuTool(t, "qemu-img", "convert", "-f", "qcow2", "-O", "raw", image, raw)
	b, err := os.ReadFile(raw)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

func (d *vmDocument) restoring(t *testing.T) {
	before := filepath.Join(d.dir, "before.qcow2")
	qemuTool(t, "qemu-img", "create", "-q", "-f", "qcow2", before, "8M")
	up := d.offer(t, "run/restore/root.url", imageiotest.Config{Disk: bytes.Repeat([]byte{5}, 8<<20)})
	_, stop := startNBD(t, "qemu-nbd", "-t", "-e", "8", "-f", "qcow2", "-x", "new", "-b", "127.0.0.1", "-p", d.port, before)
	d.prints(t, "Restoring", "to new.qcow2", "vm.qcow2", "to nbd://", "to imageio://")
	stop()
	qemuTool(t, "qemu-img", "compare", "-f", "qcow2", "-F", "qcow2", filepath.Join(d.dir, "new.qcow2"), d.image())
	d.guestWrites(t, "write -P 3 3M 64k") // of the backup of the export
	qemuTool(t, "qemu-img", "compare", "-f", "qcow2", "-F", "qcow2", before, d.image())
	if up.Lose(); string(up.Disk()[5<<20:5<<20+7]) != "written" {
		t.Error("the upload does not hold the disk")
	}
}
