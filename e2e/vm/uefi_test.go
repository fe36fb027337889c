package vm

import (
	"bytes"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"testing"
)

// firmware gives UEFI's code and the template of its variables, of Debian's package ovmf.
func (s *site) firmware() (code, vars string) {
	s.t.Helper()
	cache, err := filepath.Abs("../../.cache/guest/ovmf")
	if err != nil {
		s.t.Fatal(err)
	}
	if _, err := os.Stat(filepath.Join(cache, "ready")); err != nil {
		s.run("sh", "-ec", "rm -rf '"+cache+"'; mkdir -p '"+cache+"/dl'; cd '"+cache+"/dl'; apt-get -qq download ovmf; dpkg -x ovmf*.deb ..; touch ../ready")
	}
	return filepath.Join(cache, "usr/share/OVMF/OVMF_CODE_4M.fd"), filepath.Join(cache, "usr/share/OVMF/OVMF_VARS_4M.fd")
}

// TestGuestOfUEFI backs up a guest that UEFI boots, and boots it from a restore on a host that has
// neither its NVRAM nor its firmware.
func TestGuestOfUEFI(t *testing.T) {
	s := newSite(t)
	s.run(s.varve, "repo", "create", "filesystem", "--path", s.path("repo"))
	code, vars := s.firmware()
	loader, nvram := s.path("code.fd"), s.path("nvram.fd")
	s.run("cp", "--sparse=always", code, loader)
	s.define(fmt.Sprintf("<loader readonly='yes' type='pflash'>%s</loader><nvram template='%s'>%s</nvram>", loader, vars, nvram))
	s.virsh("start", "shop")
	s.more()
	g := s.backup("libvirt:///shop?socket="+s.socket, "--volume", "shop/vm")
	n := s.check(g)
	s.virsh("destroy", "shop")
	kept, err := os.ReadFile(nvram)
	if err != nil {
		t.Fatal(err)
	}
	if template, err := os.ReadFile(vars); err != nil || bytes.Equal(template, kept) {
		t.Errorf("the firmware has kept nothing: %v", err)
	}
	s.virsh("undefine", "shop", "--checkpoints-metadata", "--nvram")
	for _, path := range []string{loader, s.path("console"), s.path("vmlinuz"), s.path("initrd")} {
		if err := os.Remove(path); err != nil {
			t.Error(err)
		}
	}
	s.run(s.varve, "restore", "--vm", "shop/vm@latest", s.path("back"), "--define", "--vm-name", "shop2", "--connect", "libvirt:///?socket="+s.socket)
	xml, err := os.ReadFile(s.path("back/domain.xml"))
	if err != nil {
		t.Fatal(err)
	}
	m := regexp.MustCompile(`<nvram[^>]*>([^<]*)</nvram>`).FindSubmatch(xml)
	if m == nil {
		t.Fatalf("the definition names no NVRAM:\n%s", xml)
	}
	if got, err := os.ReadFile(string(m[1])); err != nil || !bytes.Equal(got, kept) {
		t.Errorf("the NVRAM at %s differs, or cannot be read: %v", m[1], err)
	}
	s.virsh("start", "shop2")
	s.until("the restored guest writes", func() bool { now, _ := s.written(); return now > n })
	if _, verified := s.written(); verified != fmt.Sprintf("%d of %[1]d", n) {
		t.Errorf("the restored guest verified %s files, and the point has %d", verified, n)
	}
}
