package main

import (
	"bytes"
	"encoding/json"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/varve-io/varve/backup"
	"github.com/varve-io/varve/backup/disk"
	"github.com/varve-io/varve/backup/libvirt"
	"github.com/varve-io/varve/backup/points"
)

// backupParts makes a group of disks, files, and of streams.
func backupParts(t *testing.T, env testEnv, disks, parts map[string]string) {
	t.Helper()
	ctx := t.Context()
	r := openRepo(t, env)
	defer r.Close(ctx)
	var volumes []points.Volume
	volume := func(name string) points.Volume {
		v, err := points.ParseVolume("shop/vm-"+name, r.Cluster())
		if err != nil {
			t.Fatal(err)
		}
		volumes = append(volumes, v)
		return v
	}
	var members []backup.Options
	for name, path := range disks {
		src, err := disk.Open(path, disk.Options{})
		if err != nil {
			t.Fatal(err)
		}
		defer src.Close()
		members = append(members, backup.Options{Volume: volume(name), Disk: src})
	}
	var streams []backup.StreamOptions
	for name, text := range parts {
		streams = append(streams, backup.StreamOptions{Volume: volume(name), Reader: strings.NewReader(text)})
	}
	group, err := points.NewGroup("shop/vm", volumes, time.Now())
	if err != nil {
		t.Fatal(err)
	}
	if made, err := backup.RunGroup(ctx, r, group, members, streams...); err != nil || len(made) != len(volumes) {
		t.Fatalf("%d points, %v", len(made), err)
	}
}

// TestRestoreOfMachine writes a machine's disks in their formats, its NVRAM, and a definition
// that leads to them. A libvirt is not needed.
func TestRestoreOfMachine(t *testing.T) {
	t.Parallel()
	env, dir, _ := newGroupEnv(t)
	root, data := filepath.Join(dir, "root.img"), filepath.Join(dir, "data.img")
	if err := os.Truncate(data, 320_512); err != nil { // whole sectors
		t.Fatal(err)
	}
	xml := `<domain type='kvm'><name>shop</name><uuid>9b0b1c6e-3a2d-4f0e-8d6e-0123456789ab</uuid>
<os><loader>` + root + `</loader><nvram>/gone/VARS.fd</nvram><kernel>/gone/vmlinuz</kernel></os><devices>
<disk type='block' device='disk'><driver type='raw'/><source dev='/dev/gone'/><target dev='vda'/></disk>
<disk type='file' device='disk'><driver type='qcow2'/><source file='/gone/vdb'/><target dev='vdb'/></disk>
<disk type='file' device='disk'><driver type='qcow2'/><source file='/gone/vdc'/><target dev='vdc'/></disk>
</devices></domain>`
	backupParts(t, env, map[string]string{"vda": root, "vdb": data}, map[string]string{"xml": xml, "nvram": "variables", "kernel": "linux", "loader": "firmware"})
	back := filepath.Join(dir, "back")
	out := mustRun(t, env, "restore", "--vm", "shop/vm@latest", back).stdout
	for _, want := range []string{"domain.xml", "virsh define", "no disk vdc any more"} {
		if !strings.Contains(out, want) {
			t.Errorf("%s is missing:\n%s", want, out)
		}
	}
	text, err := os.ReadFile(filepath.Join(back, "domain.xml"))
	if err != nil {
		t.Fatal(err)
	}
	d, err := libvirt.ParseDomain(string(text))
	if err != nil {
		t.Fatal(err)
	}
	want := []libvirt.Disk{{Target: "vda", Type: "file", Path: filepath.Join(back, "vda.img"), Format: "raw"}, {Target: "vdb", Type: "file", Path: filepath.Join(back, "vdb.qcow2"), Format: "qcow2"}}
	if len(d.Disks) != 2 || d.Disks[0] != want[0] || d.Disks[1] != want[1] || d.Name != "shop" || d.UUID == "" ||
		d.NVRAM != filepath.Join(back, "nvram.fd") || d.Kernel != filepath.Join(back, "kernel") || d.Loader != root {
		t.Errorf("%+v", d)
	}
	for name, content := range map[string]string{"nvram.fd": "variables", "kernel": "linux", "original.xml": xml} {
		if b, err := os.ReadFile(filepath.Join(back, name)); err != nil || string(b) != content {
			t.Errorf("%s: %q, %v", name, b, err)
		}
	}
	a, err := os.ReadFile(root)
	if b, berr := os.ReadFile(want[0].Path); err != nil || berr != nil || !bytes.Equal(a, b) {
		t.Errorf("vda differs: %v, %v", err, berr)
	}
	qemuTool(t, "qemu-img", "compare", "-f", "qcow2", "-F", "raw", want[1].Path, data)

	// A format is for disks: what is beside them comes back as it is.
	group := filepath.Join(dir, "group")
	mustRun(t, env, "restore", "--group", "shop/vm@latest", group, "--format", "qcow2")
	qemuTool(t, "qemu-img", "compare", "-f", "qcow2", "-F", "raw", filepath.Join(group, "vm-vdb.qcow2"), data)
	if b, err := os.ReadFile(filepath.Join(group, "vm-xml")); err != nil || string(b) != xml {
		t.Errorf("%q, %v", b, err)
	}
	one := filepath.Join(dir, "xml.qcow2")
	refused(t, env, exitUsage, "holds a stream of bytes", "restore", "shop/vm-xml@latest", one, "--format", "qcow2")
	if _, err := os.Stat(one); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("an image was made of a stream: %v", err)
	}

	// Served disks are not written, and the machine reads them by NBD, as raw bytes.
	now := filepath.Join(dir, "now")
	out = mustRun(t, env, "restore", "--vm", "shop/vm@latest", now, "--served", "/run/it's.sock", "--vm-name", "now").stdout
	if !strings.Contains(out, "varve serve --writable --listen unix:/run/it's.sock shop/vm-vda@") || strings.Contains(out, "vda.img") {
		t.Errorf("it prints:\n%s", out)
	}
	served, err := os.ReadFile(filepath.Join(now, "domain.xml"))
	if err != nil {
		t.Fatal(err)
	}
	var points []struct{ ID string }
	if err := json.Unmarshal([]byte(mustRun(t, env, "list", "shop/vm-vdb", "-o", "json").stdout), &points); err != nil || len(points) != 1 {
		t.Fatalf("%v, %v", points, err)
	}
	id := points[0].ID
	for _, want := range []string{"<disk device='disk' type='network'><driver name='qemu' type='raw'/><source protocol='nbd' name='" + id + "'><host transport='unix' socket='/run/it&#39;s.sock'/></source>",
		"<target dev='vdb'/></disk>", filepath.Join(now, "nvram.fd"), "<name>now</name>"} {
		if !strings.Contains(string(served), want) {
			t.Errorf("%s is missing:\n%s", want, served)
		}
	}
	if strings.Contains(string(served), "qcow2") || strings.Contains(string(served), "vdc") {
		t.Errorf("old images are left:\n%s", served)
	}
	if files, err := filepath.Glob(filepath.Join(now, "vd*")); err != nil || len(files) > 0 {
		t.Errorf("%v were written, %v", files, err)
	}

	refused(t, env, exitRefused, "--overwrite", "restore", "--vm", "shop/vm@latest", back)
	refused(t, env, exitUsage, "one directory", "restore", "--vm", "shop/vm@latest", "vda="+root)
	refused(t, env, exitUsage, "for --vm", "restore", "--group", "shop/vm@latest", dir, "--define")
	refused(t, env, exitUsage, "no --format", "restore", "--vm", "shop/vm@latest", back, "--format", "qcow2")
	refused(t, env, exitUsage, "this machine", "restore", "--vm", "shop/vm@latest", filepath.Join(dir, "b2"), "--define", "--connect", "libvirt+ssh://host/")
	refused(t, env, exitFailure, "connect to libvirt", "restore", "--vm", "shop/vm@latest", filepath.Join(dir, "b2"), "--define", "--connect", "libvirt:///?socket="+dir+"/none")
	mustRun(t, env, "backup", root, "a="+data, "--volume", "shop/plain")
	refused(t, env, exitUsage, "no definition", "restore", "--vm", "shop/plain@latest", back)
}

// TestRestoreOfMachineWithoutNVRAM: a machine of another name does not write to the NVRAM of the
// first, also where that was not backed up.
func TestRestoreOfMachineWithoutNVRAM(t *testing.T) {
	t.Parallel()
	env, dir, _ := newGroupEnv(t)
	xml := `<domain type='kvm'><name>shop</name><os><nvram>/var/lib/VARS.fd</nvram></os><devices>
<disk type='file' device='disk'><driver type='raw'/><source file='/gone/vda'/><target dev='vda'/></disk></devices></domain>`
	backupParts(t, env, map[string]string{"vda": filepath.Join(dir, "root.img")}, map[string]string{"xml": xml})
	for _, name := range []string{"", "second"} {
		back := filepath.Join(dir, "back"+name)
		args, want := []string{"restore", "--vm", "shop/vm@latest", back}, "/var/lib/VARS.fd"
		if name != "" {
			args, want = append(args, "--vm-name", name), filepath.Join(back, "nvram.fd")
		}
		out := mustRun(t, env, args...).stdout
		text, err := os.ReadFile(filepath.Join(back, "domain.xml"))
		if err != nil {
			t.Fatal(err)
		}
		d, err := libvirt.ParseDomain(string(text))
		if err != nil || d.NVRAM != want || strings.Contains(out, "NVRAM was not backed up") != (name != "") {
			t.Errorf("name %q: NVRAM %q, want %q, %v\n%s", name, d.NVRAM, want, err, out)
		}
	}
}
