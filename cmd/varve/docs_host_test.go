package main

import (
	"bytes"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	"github.com/varve-io/varve/internal/mounttest"
)

// hostVM replaces the host of docs/host.md: directories and loop devices instead of its own.
type hostVM struct {
	dir   string
	paths *strings.Replacer
	env   []string
}

// lvm replaces LVM, which needs device-mapper: a snapshot is a copy of the disk at that
// moment, a new volume a loop device.
const lvm = `#!/bin/sh -eu
name= snapshot= size= last=
while [ $# -gt 0 ]; do
	case $1 in
	--name) name=$2; shift ;;
	--snapshot) snapshot=1 ;;
	--size) size=$2; shift ;;
	--extents) shift ;;
	esac
	last=$1
	shift
done
case $0 in
*lvremove) rm "$DEV/$last" ;;
*) if [ -n "$snapshot" ]; then
		cp --sparse=always "$DEV/$last" "$DEV/vg0/$name"
	else
		truncate -s "$size" "$DEV/$name.img"
		ln -s "$(losetup --find --show "$DEV/$name.img")" "$DEV/$last/$name"
	fi ;;
esac
`

// TestHostDocument runs the commands and files of docs/host.md, as printed and in order, up
// to the root file system on a new machine.
func TestHostDocument(t *testing.T) {
	t.Parallel()
	for _, tool := range []string{"mkfs.ext4", "debugfs", "losetup", "fsfreeze", "e2fsck"} {
		if _, err := exec.LookPath(tool); err != nil {
			t.Skipf("%s is not installed: the host has no disks", tool)
		}
	}
	if os.Geteuid() != 0 {
		t.Skip("only root can attach loop devices and freeze file systems")
	}
	text, err := os.ReadFile("../../docs/host.md")
	if err != nil {
		t.Fatal(err)
	}
	vm := newHostVM(t)
	vm.run(t, "sh", `printf web1 > "$DIR/hostname" && truncate -s 48M "$DEV/vg0/root" && mkfs.ext4 -q "$DEV/vg0/root" &&
		printf 'mkdir etc\ncd etc\nwrite %s hostname\n' "$DIR/hostname" | debugfs -w "$DEV/vg0/root" 2>/dev/null >&2`)
	vm.disk(t, "vdb", "srv")

	blocks := regexp.MustCompile("(?s)\n```(sh|ini)( file=\\S+)?\n(.*?)\n```\n").FindAllStringSubmatch(string(text), -1)
	var units []string
	script, commands := "", 0
	for _, b := range blocks {
		path, isFile := strings.CutPrefix(b[2], " file=")
		content := vm.paths.Replace(b[3]) + "\n"
		switch {
		case isFile:
			path = vm.paths.Replace(path)
			if err := os.WriteFile(path, []byte(content), 0o755); err != nil {
				t.Fatal(err)
			}
			if b[1] == "ini" {
				units = append(units, path)
			}
		case strings.Contains(b[3], "lvcreate --yes"):
			script += `mv "$DEV/vg0/root" "$DEV/lost"` + "\n" + content // the old machine is gone
			commands++
		default:
			script += content
			commands++
		}
	}
	if commands != 6 || len(units) != 4 {
		t.Fatalf("docs/host.md has %d blocks of commands and %d units", commands, len(units))
	}
	first, rest, ok := strings.Cut(script, "export VARVE_CONFIG="+filepath.Join(vm.dir, "root"))
	if !ok {
		t.Fatal("docs/host.md connects no new machine")
	}
	vm.run(t, "bash", "set -e\n"+first)
	t.Cleanup(func() {
		if device, err := filepath.EvalSymlinks(filepath.Join(vm.dir, "dev", "vg0", "root")); err == nil && strings.HasPrefix(device, "/dev/loop") {
			_ = exec.Command("losetup", "--detach", device).Run()
		}
	})
	for _, unit := range units {
		vm.runUnit(t, unit)
	}
	vm.run(t, "bash", `set -e; cp "$DIR/etc/varve/password" "$DIR/root/varve/password"
export VARVE_CONFIG=`+filepath.Join(vm.dir, "root")+rest+`
[ "$(debugfs -R 'cat /etc/hostname' "$DEV/vg0/root" 2>/dev/null)" = web1 ]`)
}

func newHostVM(t *testing.T) *hostVM {
	t.Helper()
	env := newTestEnv(t)
	vm := &hostVM{dir: env["HOME"]}
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	var pairs []string
	for _, path := range []string{"/etc/varve", "/etc/systemd/system", "/usr/local/sbin", "/usr/local/bin", "/mnt/backups", "/dev/vg0", "/root/varve", "/srv", "/tmp"} {
		if err := os.MkdirAll(filepath.Join(vm.dir, path), 0o700); err != nil {
			t.Fatal(err)
		}
		pairs = append(pairs, path+"/", filepath.Join(vm.dir, path)+"/", path+" ", filepath.Join(vm.dir, path)+" ", path+"\n", filepath.Join(vm.dir, path)+"\n", path+"'", filepath.Join(vm.dir, path)+"'")
	}
	pairs = append(pairs, "/dev/vdb", filepath.Join(vm.dir, "dev", "vdb"), "/usr/local/sbin/varve-backup", filepath.Join(vm.dir, "usr/local/sbin/varve-backup"))
	vm.paths = strings.NewReplacer(pairs...)
	bin := filepath.Join(vm.dir, "usr", "local", "bin")
	for name, content := range map[string]string{
		"varve": "#!/bin/sh\nVARVE_TEST_AS_MAIN=1 exec '" + self + "' \"$@\"\n", "lvcreate": lvm, "lvremove": lvm,
	} {
		if err := os.WriteFile(filepath.Join(bin, name), []byte(content), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	vm.env = []string{
		"HOME=" + vm.dir, "DIR=" + vm.dir, "DEV=" + filepath.Join(vm.dir, "dev"),
		"PATH=" + bin + ":" + os.Getenv("PATH") + ":/usr/sbin:/sbin",
	}
	return vm
}

// disk makes and mounts a disk.
func (vm *hostVM) disk(t *testing.T, name, mount string) {
	t.Helper()
	image, device, dir := filepath.Join(vm.dir, name+".img"), filepath.Join(vm.dir, "dev", name), filepath.Join(vm.dir, mount)
	vm.run(t, "sh", fmt.Sprintf(`truncate -s 16M %s && mkfs.ext4 -q %s && ln -s "$(losetup --find --show %s)" %s`, image, image, image, device))
	loop, err := filepath.EvalSymlinks(device)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = exec.Command("losetup", "--detach", loop).Run() })
	vm.run(t, "sh", fmt.Sprintf("mount %s %s && cp /etc/passwd %s", loop, dir, dir))
	t.Cleanup(func() { mounttest.Unmount(t, dir) })
}

func (vm *hostVM) run(t *testing.T, shell, script string, env ...string) {
	t.Helper()
	cmd := exec.CommandContext(t.Context(), shell, "-c", script)
	cmd.Env, cmd.Dir = append(vm.env[:len(vm.env):len(vm.env)], env...), vm.dir
	var out bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &out
	if err := cmd.Run(); err != nil {
		t.Fatalf("%v\n%s\n--- script:\n%s", err, &out, script)
	}
}

// runUnit checks a unit by systemd, if installed, and does what systemd does for a service:
// credentials in a directory, environment, command.
func (vm *hostVM) runUnit(t *testing.T, path string) {
	t.Helper()
	if _, err := exec.LookPath("systemd-analyze"); err == nil {
		vm.run(t, "sh", "systemd-analyze verify --man=no '"+path+"'")
	}
	if filepath.Ext(path) != ".service" {
		return
	}
	text, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	credentials := t.TempDir()
	var env []string
	command := ""
	for _, line := range strings.Split(string(text), "\n") {
		key, value, _ := strings.Cut(line, "=")
		value = strings.NewReplacer("%d", credentials, "%%", "%").Replace(value)
		switch key {
		case "LoadCredential":
			name, from, _ := strings.Cut(value, ":")
			secret, err := os.ReadFile(from)
			if err != nil {
				t.Fatal(err)
			}
			if err := os.WriteFile(filepath.Join(credentials, name), secret, 0o400); err != nil {
				t.Fatal(err)
			}
		case "Environment":
			env = append(env, value)
		case "ExecStart":
			command = value
		}
	}
	if command == "" || len(env) != 2 {
		t.Fatalf("%s runs %q with %v", path, command, env)
	}
	vm.run(t, "sh", command, env...)
}
