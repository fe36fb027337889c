package vm

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"syscall"
)

// document is docs/vm.md, whose commands are run unchanged, except for paths and libvirt's
// socket.
type document struct {
	s        *site
	sections map[string][]string // blocks of commands not run yet
	paths    *strings.Replacer
}

func (s *site) document() *document {
	s.t.Helper()
	text, err := os.ReadFile("../../docs/vm.md")
	if err != nil {
		s.t.Fatal(err)
	}
	d := &document{s: s, sections: map[string][]string{}}
	for _, section := range strings.Split(string(text), "\n## ")[1:] {
		name, body, _ := strings.Cut(section, "\n")
		for _, b := range regexp.MustCompile("(?s)\n```sh[^\n]*\n(.*?)\n```\n").FindAllStringSubmatch(body, -1) {
			d.sections[name] = append(d.sections[name], b[1])
		}
	}
	d.paths = strings.NewReplacer("varve ", s.varve+" ", "/var/lib/libvirt/images/", s.dir+"/", "/run/", s.dir+"/",
		"libvirt:///$machine", "libvirt:///$machine?socket="+s.socket, "libvirt:///shop", "libvirt:///shop?socket="+s.socket, " --define", " --define --connect 'libvirt:///?socket="+s.socket+"'")
	return d
}

// run runs the next block of a section, and returns its output. stop ends what the block leaves
// in the background.
func (d *document) run(section string) (out string, stop func()) {
	t := d.s.t
	t.Helper()
	if len(d.sections[section]) == 0 {
		t.Fatalf("docs/vm.md has no further commands in %q", section)
	}
	block := d.sections[section][0]
	d.sections[section] = d.sections[section][1:]
	// A file, since background processes would keep a pipe open.
	said, err := os.CreateTemp(d.s.dir, "said")
	if err != nil {
		t.Fatal(err)
	}
	defer said.Close()
	cmd := exec.CommandContext(t.Context(), "bash", "-ec", d.paths.Replace(block))
	cmd.Dir, cmd.Stdout, cmd.Stderr = d.s.dir, said, said
	cmd.Env = append(d.s.env(), "LIBVIRT_DEFAULT_URI=qemu:///system?socket="+d.s.socket)
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	err = cmd.Run()
	group := cmd.Process.Pid
	stop = func() { _ = syscall.Kill(-group, syscall.SIGTERM) }
	t.Cleanup(stop)
	text, rerr := os.ReadFile(said.Name())
	if err != nil || rerr != nil {
		t.Fatalf("%v, %v\n%s\n--- commands:\n%s", err, rerr, text, block)
	}
	return string(text), stop
}

// libvirtSection is that of docs/vm.md about whole machines.
const libvirtSection = "Machines of libvirt"

// checkDocument runs the sections of docs/vm.md that need a guest. The newest group of shop/vm has
// this many files.
func (s *site) checkDocument(d *document, files int) {
	t := s.t
	t.Helper()
	out, _ := d.run("One file out of a machine")
	name, err := os.ReadFile(s.path("hostname"))
	if err != nil || string(name) != "shop\n" || !strings.Contains(out, "hostname") {
		t.Errorf("a file out of the machine: %q, %v\n%s", name, err, out)
	}

	running := "A machine that runs from its backup"
	_, stop := d.run(running)
	s.until("the guest writes that runs from its backup", func() bool { n, _ := s.written(); return n > files })
	if _, verified := s.written(); verified != fmt.Sprintf("%d of %[1]d", files) {
		t.Errorf("the guest that runs from its backup verified %s files, and the point has %d", verified, files)
	}
	if images, err := filepath.Glob(s.path("now/vd*")); err != nil || len(images) > 0 {
		t.Errorf("disks were written: %v, %v", images, err)
	}
	d.run(running)
	stop() // varve serve
	s.more()
	for _, xml := range []string{s.virsh("dumpxml", "now"), s.virsh("dumpxml", "--inactive", "now")} {
		if strings.Contains(xml, "nbd") || strings.Count(xml, ".qcow2'") != 3 {
			t.Errorf("the machine still uses the server:\n%s", xml)
		}
	}

	d.run("Every hour")
	if show := s.run(s.varve, "list", "machines/now-vda"); !strings.Contains(show, "machines/now-vda@") {
		t.Errorf("no backup was made:\n%s", show)
	}
	for _, section := range []string{libvirtSection, "One file out of a machine", running, "Every hour"} {
		if left := d.sections[section]; len(left) > 0 {
			t.Errorf("commands of %q that were not run: %q", section, left)
		}
	}
}
