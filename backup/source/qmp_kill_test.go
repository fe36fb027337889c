package source_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"github.com/varve-io/varve/backup/source"
)

// TestMain lets a test run this binary as a backup that is killed, and as the process that
// thaws a guest.
func TestMain(m *testing.M) {
	if len(os.Args) > 1 && os.Args[1] == "killed-backup" {
		if err := killedBackup(os.Args[2], os.Args[3], os.Args[4]); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		os.Exit(0)
	}
	if len(os.Args) > 3 && os.Args[1] == "killed-frozen" {
		opt := machine{}.options(os.Args[3])
		opt.Freeze, opt.Self = true, []string{os.Args[0], "guest-freeze"}
		opt.Step = func(name string) {
			if name == "moment" {
				_ = syscall.Kill(os.Getpid(), syscall.SIGKILL)
			}
		}
		_, _ = machine{}.backup(context.Background(), os.Args[2], opt, nil, nil)
		os.Exit(0)
	}
	if len(os.Args) > 4 && os.Args[1] == "killed-at" { // in a process of its own, so that this one ends well
		cmd := exec.Command(os.Args[0], "killed-backup", os.Args[2], os.Args[3], os.Args[4])
		cmd.Stdout, cmd.Stderr = os.Stdout, os.Stderr
		fmt.Fprintln(os.Stderr, cmd.Run())
		os.Exit(0)
	}
	if len(os.Args) > 3 && os.Args[1] == "libvirt-locked" {
		_, err := source.Open(context.Background(), os.Args[2], machine{}.options(os.Args[3]))
		fmt.Fprintln(os.Stderr, err)
		os.Exit(0)
	}
	if len(os.Args) > 2 && os.Args[1] == "libvirt-forget" {
		removed, err := source.Forget(context.Background(), os.Args[2], source.Options{})
		fmt.Fprintln(os.Stdout, removed, err)
		if err != nil {
			os.Exit(1)
		}
		os.Exit(0)
	}
	if len(os.Args) > 3 && os.Args[1] == "libvirt-room" {
		if err := printRoom(os.Args[2], os.Args[3]); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		os.Exit(0)
	}
	if len(os.Args) > 3 && os.Args[1] == "libvirt-parts" {
		if err := printParts(os.Args[2], os.Args[3]); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		os.Exit(0)
	}
	if len(os.Args) > 2 && os.Args[1] == "guest-freeze" {
		thaw := os.Args[2] == "--thaw"
		if err := source.GuardFreeze(context.Background(), os.Args[len(os.Args)-1], thaw, os.Stdin, os.Stdout); err != nil {
			os.Exit(1)
		}
		os.Exit(0)
	}
	// TestRBDOfCeph makes this file: t.Setenv would keep it from running beside others.
	if err := os.Setenv("CEPH_CONF", filepath.Join(os.TempDir(), fmt.Sprintf("varve-ceph-%d.conf", os.Getpid()))); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	os.Exit(m.Run())
}

// load reads a state from its file: its change ID on a line, then its bytes.
func load(dir, name string) *state {
	b, err := os.ReadFile(filepath.Join(dir, name+".point"))
	if err != nil {
		return nil
	}
	id, data, _ := bytes.Cut(b, []byte("\n"))
	return &state{bytes: data, id: string(id)}
}

// store is atomic, as the recording of a point is.
func store(dir, name string, s *state) error {
	part := filepath.Join(dir, name+".part")
	if err := os.WriteFile(part, append([]byte(s.id+"\n"), s.bytes...), 0o600); err != nil {
		return err
	}
	return os.Rename(part, filepath.Join(dir, name+".point"))
}

// killedBackup backs up a machine on the points in a directory, and is killed after a step.
// Without one it prints the steps.
func killedBackup(uri, points, kill string) error {
	step := func(name string) {
		if kill == "" {
			fmt.Fprintln(os.Stdout, name)
		} else if name == kill {
			_ = syscall.Kill(os.Getpid(), syscall.SIGKILL)
			select {}
		}
	}
	before := machine{}
	for _, name := range []string{"vda", "vdb", "vdc"} {
		if s := load(points, name); s != nil {
			before[name] = s
		}
	}
	opt := before.options(points)
	opt.Step = step
	_, err := before.backup(context.Background(), uri, opt, nil, func(name string, s *state) {
		if err := store(points, name, s); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		fmt.Fprintf(os.Stderr, "%s by %s\n", name, s.by)
		step("recorded " + name)
	})
	return err
}

func runKilled(t *testing.T, uri, points, kill string) (out string, err error) {
	t.Helper()
	cmd := exec.CommandContext(t.Context(), os.Args[0], "killed-backup", uri, points, kill)
	var stdout, stderr bytes.Buffer
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	if err = cmd.Run(); err != nil {
		err = fmt.Errorf("%w: %s", err, &stderr)
	}
	return stdout.String(), err
}

// TestQMPKilled kills a backup after each of its steps, while the machine writes. The next one
// is right, and by bitmaps.
func TestQMPKilled(t *testing.T) {
	t.Parallel()
	disks := threeDisks()
	for i := range disks {
		disks[i].size = 2 << 20
	}
	d := startDaemon(t, disks...)
	for name := range d.guest {
		d.write(t, name, 1, 0, 1<<20)
	}
	points := t.TempDir()
	out, err := runKilled(t, d.uri(), points, "")
	if err != nil {
		t.Fatal(err)
	}
	steps := strings.Split(strings.TrimSpace(out), "\n")
	if len(steps) < 17 {
		t.Fatalf("%d steps: %q", len(steps), steps)
	}
	for i, kill := range steps {
		d.write(t, "vda", byte(i), int64(i)<<16, 3000)
		d.write(t, "vdb", byte(i), int64(i)<<15, 70_000)
		d.write(t, "vdc", 0, int64(i)<<14, 20_000)
		_, err := runKilled(t, d.uri(), points, kill)
		var exit *exec.ExitError
		if !errors.As(err, &exit) || exit.Sys().(syscall.WaitStatus).Signal() != syscall.SIGKILL {
			t.Fatalf("after %q: it was not killed: %v", kill, err)
		}
		for name := range d.guest {
			d.write(t, name, byte(100+i), 1<<20+int64(i)*5000, 5000)
		}
		want := d.read(t)
		before := machine{}
		for name := range d.guest {
			before[name] = load(points, name)
		}
		now := before.mustBackup(t, d, nil)
		now.check(t, want, "bitmap")
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
