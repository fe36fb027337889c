package qemu

import (
	"bytes"
	"encoding/binary"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/varve-io/varve/fusefs/diskfs/diskfstest"
)

func create(t *testing.T, path string, args ...string) string {
	t.Helper()
	diskfstest.NeedTool(t, "qemu-img")
	cmd := exec.Command("qemu-img", append(append([]string{"create", "-q"}, args...), path, "4M")...)
	cmd.Dir = filepath.Dir(path)
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	return path
}

// TestReadHead reads what qemu-img makes.
func TestReadHead(t *testing.T) {
	dir := t.TempDir()
	create(t, filepath.Join(dir, "base.raw"), "-f", "raw")
	create(t, filepath.Join(dir, "base.vmdk"), "-f", "vmdk")
	for name, c := range map[string]struct {
		args []string
		want Head
	}{
		"plain.qcow2":   {[]string{"-f", "qcow2"}, Head{Format: QCOW2, Version: 3}},
		"old.qcow2":     {[]string{"-f", "qcow2", "-o", "compat=0.10"}, Head{Format: QCOW2, Version: 2}},
		"over.qcow2":    {[]string{"-f", "qcow2", "-b", "base.raw", "-F", "raw"}, Head{Format: QCOW2, Version: 3, Backing: "base.raw", BackingFormat: "raw"}},
		"oldover.qcow2": {[]string{"-f", "qcow2", "-o", "compat=0.10", "-b", "base.raw", "-F", "raw"}, Head{Format: QCOW2, Version: 2, Backing: "base.raw", BackingFormat: "raw"}},
		"data.qcow2":    {[]string{"-f", "qcow2", "-o", "data_file=data.raw"}, Head{Format: QCOW2, Version: 3, Others: []string{"data.raw"}}},
		"sparse.vmdk":   {[]string{"-f", "vmdk"}, Head{Format: VMDK}},
		"stream.vmdk":   {[]string{"-f", "vmdk", "-o", "subformat=streamOptimized"}, Head{Format: VMDK}},
		"flat.vmdk":     {[]string{"-f", "vmdk", "-o", "subformat=monolithicFlat"}, Head{Format: VMDK, Others: []string{"flat-flat.vmdk"}}},
		"split.vmdk":    {[]string{"-f", "vmdk", "-o", "subformat=twoGbMaxExtentSparse"}, Head{Format: VMDK, Others: []string{"split-s001.vmdk"}}},
		"over.vmdk":     {[]string{"-f", "vmdk", "-b", "base.vmdk", "-F", "vmdk"}, Head{Format: VMDK, Backing: "base.vmdk", BackingFormat: "vmdk"}},
		"disk.vhdx":     {[]string{"-f", "vhdx"}, Head{Format: VHDX}},
		"disk.vdi":      {[]string{"-f", "vdi"}, Head{Format: VDI}},
		"disk.vhd":      {[]string{"-f", "vpc"}, Head{Format: VPC}},
		"fixed.vhd":     {[]string{"-f", "vpc", "-o", "subformat=fixed"}, Head{Format: VPC}},
		"disk.img":      {[]string{"-f", "raw"}, Head{Format: Raw}},
	} {
		h, err := readHeadOf(create(t, filepath.Join(dir, name), c.args...))
		if err != nil {
			t.Errorf("%s: %v", name, err)
			continue
		}
		if h.Format != c.want.Format || h.Version != c.want.Version || h.Backing != c.want.Backing || h.BackingFormat != c.want.BackingFormat ||
			strings.Join(h.Others, "|") != strings.Join(c.want.Others, "|") {
			t.Errorf("%s is %+v, want %+v", name, h, c.want)
		}
		if err := CheckReferences(filepath.Join(dir, name), h.Format, false); err != nil {
			t.Errorf("%s leads out: %v", name, err)
		}
	}
}

// TestCheckReferences is the hole: an image leads to a file of the host.
func TestCheckReferences(t *testing.T) {
	dir := t.TempDir()
	secret := create(t, filepath.Join(t.TempDir(), "secret.raw"), "-f", "raw")
	if err := os.Symlink(secret, filepath.Join(dir, "link.raw")); err != nil {
		t.Fatal(err)
	}
	create(t, filepath.Join(dir, "near.raw"), "-f", "raw")
	mid := create(t, filepath.Join(dir, "mid.qcow2"), "-f", "qcow2", "-u", "-b", secret, "-F", "raw")
	for name, args := range map[string][]string{
		"absolute": {"-f", "qcow2", "-u", "-b", secret, "-F", "raw"},
		"relative": {"-f", "qcow2", "-u", "-b", "../" + filepath.Base(filepath.Dir(secret)) + "/secret.raw", "-F", "raw"},
		"json":     {"-f", "qcow2", "-u", "-b", `json:{"driver":"raw","file":{"driver":"file","filename":"/etc/passwd"}}`, "-F", "raw"},
		"protocol": {"-f", "qcow2", "-u", "-b", "nbd://127.0.0.1:1/x", "-F", "raw"},
		"symlink":  {"-f", "qcow2", "-u", "-b", "link.raw", "-F", "raw"},
		"guess":    {"-f", "qcow2", "-u", "-b", "near.raw"},
		"chain":    {"-f", "qcow2", "-b", mid, "-F", "qcow2"},
	} {
		path := filepath.Join(dir, name+".qcow2")
		if name == "guess" { // newer versions of qemu-img refuse to make one
			create(t, path, "-f", "qcow2", "-u", "-b", "near.raw", "-F", "raw")
			eraseBackingFormat(t, path)
		} else {
			create(t, path, args...)
		}
		if name == "chain" {
			rebase(t, path, "mid.qcow2")
		}
		if err := CheckReferences(path, QCOW2, false); !errors.Is(err, ErrLeadsOut) || !strings.Contains(err.Error(), "--follow-chain") {
			t.Errorf("%s: %v", name, err)
		}
		if err := CheckReferences(path, QCOW2, true); err != nil {
			t.Errorf("%s, followed: %v", name, err)
		}
	}
	data := create(t, filepath.Join(dir, "data.qcow2"), "-f", "qcow2", "-o", "data_file="+filepath.Join(filepath.Dir(secret), "new.raw"))
	if err := CheckReferences(data, QCOW2, false); !errors.Is(err, ErrLeadsOut) {
		t.Errorf("a data file elsewhere: %v", err)
	}
	vmdk := filepath.Join(dir, "flat.vmdk")
	text := "# Disk DescriptorFile\nversion=1\nCID=1\nparentCID=ffffffff\ncreateType=\"monolithicFlat\"\nRW 8192 FLAT \"/etc/passwd\" 0\n"
	if err := os.WriteFile(vmdk, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := CheckReferences(vmdk, VMDK, false); !errors.Is(err, ErrLeadsOut) {
		t.Errorf("an extent elsewhere: %v", err)
	}
	if err := CheckReferences(vmdk, QCOW2, false); !errors.Is(err, ErrImage) {
		t.Errorf("another format than it is: %v", err)
	}
}

// TestCheckReferencesOfVMDK: what QEMU opens is what is checked, whatever the header says of where
// the descriptor is, and which of several hints comes first.
func TestCheckReferencesOfVMDK(t *testing.T) {
	dir, out := t.TempDir(), filepath.Join(t.TempDir(), "secret.vmdk")
	create(t, out, "-f", "vmdk")
	create(t, filepath.Join(dir, "near.vmdk"), "-f", "vmdk")
	over := func(name, backing string) (path string, b []byte) {
		path = create(t, filepath.Join(dir, name), "-f", "vmdk", "-b", backing, "-F", "vmdk")
		b, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		return path, b
	}
	for name, change := range map[string]func(b []byte){
		"as it is":                   func([]byte) {},
		"a header without an offset": func(b []byte) { binary.LittleEndian.PutUint64(b[28:], 0) },
		"an offset elsewhere": func(b []byte) { // at the end of the descriptor's sectors there are zeroes
			binary.LittleEndian.PutUint64(b[28:], 20)
		},
		"two hints": func(b []byte) {
			i := bytes.Index(b[:10<<10], []byte("# Extent description"))
			copy(b[i:], "parentFileNameHint=\"near.vmdk\"\n#")
		},
		"an extent of ESX": func(b []byte) { copy(b, "COWD") },
	} {
		path, b := over("over.vmdk", out)
		if name == "two hints" { // the nearer one comes later
			i, j := bytes.Index(b, []byte("# Extent description")), bytes.Index(b, []byte("parentFileNameHint"))
			if i < j {
				t.Fatal("the extents come first")
			}
		}
		change(b)
		if err := os.WriteFile(path, b, 0o600); err != nil {
			t.Fatal(err)
		}
		if err := CheckReferences(path, VMDK, false); !errors.Is(err, ErrLeadsOut) {
			t.Errorf("%s: %v", name, err)
		}
	}
	path, b := over("inner.vmdk", "near.vmdk")
	if err := CheckReferences(path, VMDK, false); err != nil {
		t.Errorf("a parent of the same folder: %v", err)
	}
	// An extent without a capacity has a descriptor of its own.
	binary.LittleEndian.PutUint64(b[12:], 0)
	copy(b[512:], "# Disk DescriptorFile\nversion=1\nCID=1\nparentCID=ffffffff\ncreateType=\"monolithicFlat\"\nRW 8192 FLAT \"/etc/passwd\" 0\n\x00")
	if err := os.WriteFile(path, b, 0o600); err != nil {
		t.Fatal(err)
	}
	outer := filepath.Join(dir, "outer.vmdk")
	text := "# Disk DescriptorFile\nversion=1\nCID=1\nparentCID=ffffffff\ncreateType=\"twoGbMaxExtentSparse\"\nRW 8192 SPARSE \"inner.vmdk\"\n"
	if err := os.WriteFile(outer, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	for _, p := range []string{path, outer} {
		if err := CheckReferences(p, VMDK, false); !errors.Is(err, ErrLeadsOut) {
			t.Errorf("%s, which leads to a file of the host: %v", p, err)
		}
	}
}

func rebase(t *testing.T, path, backing string) {
	t.Helper()
	if out, err := exec.Command("qemu-img", "rebase", "-u", "-b", backing, "-F", "qcow2", path).CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
}

// eraseBackingFormat makes the header extension one that QEMU ignores.
func eraseBackingFormat(t *testing.T, path string) {
	t.Helper()
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	i := bytes.Index(b[:512], binary.BigEndian.AppendUint32(nil, extBackingFormat))
	if i < 0 {
		t.Fatal("there is no backing format to erase")
	}
	copy(b[i:], "none")
	if err := os.WriteFile(path, b, 0o600); err != nil {
		t.Fatal(err)
	}
}

func TestReadHeadRefuses(t *testing.T) {
	vhd := append([]byte("conectix"), make([]byte, 504)...)
	vhd[63] = 4
	for name, b := range map[string][]byte{
		"a differencing vhd":     vhd,
		"a short qcow2":          []byte("QFI\xfb\x00\x00\x00\x03"),
		"a qcow of version 1":    append([]byte("QFI\xfb\x00\x00\x00\x01"), make([]byte, 200)...),
		"a short vmdk":           []byte("KDMV"),
		"an unreachable cluster": append([]byte("QFI\xfb\x00\x00\x00\x03\xff\xff\xff\xff"), make([]byte, 200)...),
	} {
		if h, err := ReadHead(bytes.NewReader(b), int64(len(b))); !errors.Is(err, ErrImage) {
			t.Errorf("%s: %+v, %v", name, h, err)
		}
	}
}

func FuzzReadHead(f *testing.F) {
	f.Add([]byte("QFI\xfb\x00\x00\x00\x03" + strings.Repeat("\x00", 200)))
	f.Add([]byte("# Disk DescriptorFile\nRW 1 FLAT \"x\" 0\nparentFileNameHint=\"y\"\n"))
	f.Add(append([]byte("KDMV"), make([]byte, 508)...))
	f.Add(append([]byte("conectix"), make([]byte, 504)...))
	f.Fuzz(func(t *testing.T, b []byte) {
		h, err := ReadHead(bytes.NewReader(b), int64(len(b)))
		if err != nil {
			return
		}
		if len(h.Backing) > maxDescriptor {
			t.Errorf("a name of %d bytes", len(h.Backing))
		}
		for _, name := range append(h.Others, h.Backing) {
			if path, err := resolve("/image/disk", name); err == nil && filepath.Dir(path) != "/image" {
				t.Errorf("%q leads to %s", name, path)
			}
		}
	})
}

func FuzzParseInfo(f *testing.F) {
	f.Add([]byte(`{"virtual-size":4,"format":"qcow2","format-specific":{"type":"qcow2","data":{"bitmaps":[{"name":"b","granularity":65536,"flags":["auto"]}]}}}`))
	f.Add([]byte(`{"virtual-size":-1,"format":"raw"}`))
	f.Fuzz(func(t *testing.T, b []byte) {
		if info, err := parseInfo(b); err == nil && (info.Size < 0 || info.Format == "") {
			t.Errorf("accepted %+v", info)
		}
	})
}
