package cluster

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/varve-io/varve/e2e/cluster/supervisor"
)

// Down ends the cluster and frees all it had: processes, loop devices, cgroups and the
// run directory. If none runs it removes what a crash left.
func Down(ctx context.Context) error {
	run, err := RunDir()
	if err != nil {
		return err
	}
	c, err := read()
	if err != nil && !errors.Is(err, ErrNotUp) {
		return err
	}
	// Noted first: once the mount namespaces are gone, the loop devices that the
	// kubelet puts on Block volumes show "/" as their file.
	loops, err := loopDevices(ctx, run+"/")
	if err != nil {
		return err
	}
	if c != nil {
		for _, name := range c.nodeNames() {
			n := c.Nodes[name]
			if n.PID == 0 || !isSupervisor(n) {
				continue
			}
			if err := killAndWait(ctx, n.PID); err != nil {
				return err
			}
		}
	}
	if err := detachLoops(ctx, loops); err != nil {
		return err
	}
	return until(deadline(ctx, 30*time.Second), "the kernel to let go", func(context.Context) error {
		return errors.Join(supervisor.RemoveCgroups(cgroupName(run)), os.RemoveAll(run))
	})
}

// deadline shortens a context for a final step.
func deadline(ctx context.Context, d time.Duration) context.Context {
	ctx, cancel := context.WithTimeout(ctx, d)
	context.AfterFunc(ctx, cancel)
	return ctx
}

// isSupervisor guards against a PID that was reused after a crash or reboot.
func isSupervisor(n *Node) bool {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/cmdline", n.PID))
	return err == nil && strings.Contains(string(b), "node-init") && strings.Contains(string(b), n.Name)
}

// killAndWait kills the first process of a PID namespace, and so the whole namespace.
func killAndWait(ctx context.Context, pid int) error {
	if err := syscall.Kill(pid, syscall.SIGKILL); err != nil && !errors.Is(err, syscall.ESRCH) {
		return err
	}
	return until(deadline(ctx, 30*time.Second), fmt.Sprintf("process %d to end", pid), func(context.Context) error {
		b, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
		if errors.Is(err, fs.ErrNotExist) || errors.Is(err, syscall.ESRCH) {
			return nil
		}
		if err != nil {
			return err
		}
		// The state follows the name in parentheses. A zombie has ended; its parent will
		// reap it.
		if _, rest, ok := strings.Cut(string(b), ") "); ok && strings.HasPrefix(rest, "Z") {
			return nil
		}
		return errors.New("it still runs")
	})
}

// loop is a loop device and the file that it has. As soon as it is free the kernel gives its name to the next, which
// another cluster on the machine may have asked for.
type loop struct {
	name string
	file inode
}

// inode is a file, with the numbers of the device of its file system.
type inode struct{ fs, ino string }

// attached reports whether the device still has that file.
func (l loop) attached(ctx context.Context) bool {
	out, err := run(ctx, "losetup", "-n", "-l", "-O", "BACK-MAJ:MIN,BACK-INO", l.name)
	f := strings.Fields(out)
	return err == nil && len(f) == 2 && l.file == inode{f[0], f[1]}
}

// loopDevices are those whose file is below prefix, and those on top of them: a kubelet
// keeps a block volume's device open by a loop device over it, and while that exists the
// lower one stays.
func loopDevices(ctx context.Context, prefix string) ([]loop, error) {
	// The file comes last, since it may contain spaces. That of a device in a node's own
	// mount namespace reads as "/" once the namespace is gone: then only the inode of the
	// device node identifies it.
	out, err := run(ctx, "losetup", "-n", "-l", "-O", "NAME,BACK-MAJ:MIN,BACK-INO,BACK-FILE")
	if err != nil {
		return nil, err
	}
	var devices []loop
	above := map[inode][]loop{}
	for line := range strings.Lines(out) {
		f := strings.Fields(line)
		if len(f) < 4 {
			continue
		}
		l := loop{f[0], inode{f[1], f[2]}}
		if strings.HasPrefix(strings.Join(f[3:], " "), prefix) {
			devices = append(devices, l)
		} else {
			above[l.file] = append(above[l.file], l)
		}
	}
	for i := 0; i < len(devices); i++ {
		var st unix.Stat_t
		if err := unix.Stat(devices[i].name, &st); err != nil {
			return nil, fmt.Errorf("%s: %w", devices[i].name, err)
		}
		node := inode{fmt.Sprintf("%d:%d", unix.Major(st.Dev), unix.Minor(st.Dev)), strconv.FormatUint(st.Ino, 10)}
		devices = append(devices, above[node]...)
		delete(above, node)
	}
	return devices, nil
}

// detachLoops frees loop devices. Some sit on others, so it takes several passes.
func detachLoops(ctx context.Context, devices []loop) error {
	return until(deadline(ctx, 30*time.Second), "loop devices to be free", func(ctx context.Context) error {
		var errs []error
		for _, d := range devices {
			if !d.attached(ctx) {
				continue // it no longer has the file
			}
			if _, err := run(ctx, "losetup", "-d", d.name); err != nil {
				errs = append(errs, err)
			}
			if d.attached(ctx) {
				errs = append(errs, fmt.Errorf("%s is still attached", d.name))
			}
		}
		return errors.Join(errs...)
	})
}

func run(ctx context.Context, name string, args ...string) (string, error) {
	out, err := exec.CommandContext(ctx, name, args...).CombinedOutput()
	text := strings.TrimSpace(string(out))
	if err != nil {
		return text, fmt.Errorf("%s %s: %w: %s", name, strings.Join(args, " "), err, text)
	}
	return text, nil
}
