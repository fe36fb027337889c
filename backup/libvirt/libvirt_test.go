package libvirt

import (
	"errors"
	"strings"
	"testing"
	"time"
)

const shop = `<domain type='qemu' id='1' xmlns:qemu='http://libvirt.org/schemas/domain/qemu/1.0'>
  <name>shop</name>
  <uuid>9b0b1c6e-3a2d-4f0e-8d6e-0123456789ab</uuid>
  <os><type>hvm</type><loader readonly='yes' type='pflash'>/usr/share/OVMF/OVMF_CODE.fd</loader>
    <nvram template='/usr/share/OVMF/OVMF_VARS.fd'>/var/lib/libvirt/qemu/nvram/shop_VARS.fd</nvram></os>
  <devices>
    <disk type='block' device='disk' snapshot='no'>
      <driver name='qemu' type='qcow2' discard='unmap'/>
      <backingStore type='file'><source file='/x'/></backingStore>
      <source dev='/dev/vg/shop'><reservations managed='yes'/></source>
      <target dev='vda' bus='virtio'/>
    </disk>
    <disk type='file' device='cdrom'><source file='/iso'/><target dev='sda'/><readonly/></disk>
    <disk type='file' device='disk'><source file='/img/b &amp; c'/><target dev='vdb'/></disk>
    <disk type='file' device='disk'><source file='/img/d'/><target dev='vdc'/></disk>
    <interface type='user'><mac address='52:54:00:00:00:01'/><model type='virtio'/></interface>
  </devices>
  <seclabel type='dynamic' model='apparmor' relabel='yes'><label>libvirt-9b0b</label></seclabel>
  <seclabel type='dynamic' model='dac' relabel='yes'><label>+64055:+108</label></seclabel>
  <qemu:commandline><qemu:arg value='-S'/></qemu:commandline>
</domain>`

func TestParseDomain(t *testing.T) {
	t.Parallel()
	d, err := ParseDomain(shop)
	if err != nil {
		t.Fatal(err)
	}
	if d.Name != "shop" || len(d.Disks) != 3 || d.UID != 64055 || d.GID != 108 || d.NVRAM != "/var/lib/libvirt/qemu/nvram/shop_VARS.fd" || d.Loader == "" {
		t.Errorf("%+v", d)
	}
	if a, b := d.Disks[0], d.Disks[1]; a != (Disk{"vda", "block", "/dev/vg/shop", "qcow2"}) || b != (Disk{"vdb", "file", "/img/b & c", "raw"}) {
		t.Errorf("%+v", d.Disks)
	}
	for _, bad := range []string{"", "<x/>", "<domain/>", "<domain><name>x</name><devices><disk/></devices></domain>", shop[:500]} {
		if _, err := ParseDomain(bad); err == nil {
			t.Errorf("%.40q was read", bad)
		}
	}
}

func TestRewrite(t *testing.T) {
	t.Parallel()
	got, err := Rewrite(shop, Changes{
		Disks: map[string]string{"vda": "/new/vda's.qcow2", "vdb": "/new/vdb.img"}, Drop: []string{"vdc"},
		Files: map[string]string{"nvram": "/new/nvram"}, Name: "shop2",
	})
	if err != nil {
		t.Fatal(err)
	}
	d, err := ParseDomain(got)
	if err != nil {
		t.Fatal(err)
	}
	if d.Name != "shop2" || d.UUID != "" || d.NVRAM != "/new/nvram" || len(d.Disks) != 2 ||
		d.Disks[0] != (Disk{"vda", "file", "/new/vda's.qcow2", "qcow2"}) || d.Disks[1] != (Disk{"vdb", "file", "/new/vdb.img", "raw"}) {
		t.Errorf("%+v\n%s", d, got)
	}
	for _, kept := range []string{"<qemu:commandline><qemu:arg value='-S'/></qemu:commandline>", "discard='unmap'", "snapshot='no'", "template='/usr", "<source file='/iso'/>"} {
		if !strings.Contains(got, kept) {
			t.Errorf("%s is gone:\n%s", kept, got)
		}
	}
	for _, gone := range []string{"52:54", "reservations", "backingStore", "/img/d", "/dev/vg"} {
		if strings.Contains(got, gone) {
			t.Errorf("%s is there:\n%s", gone, got)
		}
	}
	if same, err := Rewrite(shop, Changes{}); err != nil || same != shop {
		t.Errorf("without changes: %v\n%s", err, same)
	}
	if _, err := Rewrite(shop, Changes{Disks: map[string]string{"vdx": "/x"}}); err == nil {
		t.Error("a disk that is not there was changed")
	}
}

func TestParseURI(t *testing.T) {
	t.Parallel()
	for text, want := range map[string]URI{
		"libvirt:///shop": {Domain: "shop", Connect: "qemu:///system", NBDPort: 10809},
		"libvirt:///shop?connect=qemu:///session&socket=/run/x": {Domain: "shop", Connect: "qemu:///session", Socket: "/run/x", NBDPort: 10809},
		"libvirt+ssh://root@host:2222/shop":                     {Transport: "ssh", User: "root", Host: "host", Port: "2222", Domain: "shop", Connect: "qemu:///system", NBDPort: 10809},
		"libvirt+tls://host/shop?pkipath=/pki&nbd-port=1":       {Transport: "tls", Host: "host", Domain: "shop", Connect: "qemu:///system", PKI: "/pki", NBDPort: 1},
		"libvirt:///shop?timeout=90":                            {Domain: "shop", Connect: "qemu:///system", NBDPort: 10809, Timeout: 90 * time.Second},
	} {
		if got, err := ParseURI(text); err != nil || *got != want {
			t.Errorf("%s: %+v, %v", text, got, err)
		}
	}
	for _, text := range []string{
		"libvirt://host/shop", "libvirt+tcp://host/shop", "libvirt+ssh:///shop", "libvirt+ssh://-oProxyCommand=x/shop", "libvirt+ssh://-x@host/shop",
		"libvirt+ssh://a:b@host/shop", "libvirt:///a/b", "libvirt:///a?x=y", "libvirt+ssh://h/a?socket=/a:b", "libvirt+tls://h/a?nbd-port=0", "libvirt:///a?socket=x",
		"libvirt:///a?timeout=0", "libvirt:///a?timeout=1h", "libvirt:///a?timeout=3601",
	} {
		if got, err := ParseURI(text); !errors.Is(err, ErrURI) {
			t.Errorf("%s: %+v, %v", text, got, err)
		}
	}
}

func TestBackupXML(t *testing.T) {
	t.Parallel()
	b := Backup{Socket: "/run/a&b", Disks: []BackupDisk{
		{Target: "vda", Incremental: "varve-1", Scratch: "/s/vda"}, {Target: "vdb", Scratch: "/s/vdb"}, {Target: "vdc", Leave: true},
	}}
	text, err := b.XML()
	if err != nil {
		t.Fatal(err)
	}
	got, err := ParseBackup(text)
	if err != nil || got.Socket != b.Socket || len(got.Disks) != 3 || got.Disks[1].Scratch != "/s/vdb" || !got.Disks[2].Leave || !strings.Contains(text, "incremental='varve-1'") && !strings.Contains(text, `incremental="varve-1"`) {
		t.Errorf("%+v, %v\n%s", got, err, text)
	}
}

func TestRoomFeed(t *testing.T) {
	t.Parallel()
	f := &roomFeed{t: &tunnel{}}
	for _, c := range []struct {
		text string
		want int64
	}{{"7 40", 0}, {"96\n", 28672}, {"Welcome\n-1 5\n9223372036854775807 4096\n", 28672}, {strings.Repeat("x", 1000) + "\n2 512\n", 1024}} {
		if n, err := f.Write([]byte(c.text)); n != len(c.text) || err != nil || f.t.free.Load() != c.want {
			t.Errorf("after %.20q: %d, %v, %d bytes", c.text, n, err, f.t.free.Load())
		}
	}
	if c := watchCommand("/a'b"); !strings.Contains(c, `-- '/a'\''b'`) {
		t.Error(c)
	}
}

func FuzzXML(f *testing.F) {
	f.Add(shop)
	f.Add("<domaincheckpoint><disks><disk name='a' size='1'/></disks></domaincheckpoint>")
	f.Add("<domainbackup><server socket='x'/></domainbackup>")
	f.Fuzz(func(_ *testing.T, text string) {
		_, _ = ParseBackup(text)
		_, _ = CheckpointSizes(text)
		d, err := ParseDomain(text)
		if err != nil {
			return
		}
		c := Changes{Disks: map[string]string{}, Name: "x", Files: map[string]string{"nvram": "/n"}}
		for _, disk := range d.Disks {
			c.Disks[disk.Target] = "/d"
		}
		_, _ = Rewrite(text, c)
	})
}
