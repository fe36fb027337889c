package fusefs

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log"
	"log/slog"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"time"

	fusenode "github.com/hanwen/go-fuse/v2/fs"
	"github.com/hanwen/go-fuse/v2/fuse"
	"golang.org/x/sys/unix"
)

// ErrNoFUSE means that FUSE does not work on this machine or in this container.
var ErrNoFUSE = errors.New("FUSE cannot be used here")

const noFUSEAdvice = "files can be read without a mount by 'varve ls', 'varve cat' and 'varve cp', disks over NBD by 'varve serve'"

const (
	fuseDevice = "/dev/fuse"
	fsType     = "fuse.varve" // in /proc/self/mountinfo

	requestSize = 1 << 20 // most bytes of one read or write
	readAhead   = 1 << 20 // of the kernel
	background  = 64      // concurrent read-ahead requests
)

// Mounted is an FS attached to a directory.
type Mounted struct {
	Dir    string // absolute
	device string // of the mount, see mountEntry
	server *fuse.Server
	helper *helper // nil if mounted directly
	served chan struct{}
}

// Mount mounts the tree on an empty directory. What a killed process left there is removed
// first.
func (f *FS) Mount(dir string) (*Mounted, error) {
	dir, err := mountPoint(dir)
	if err != nil {
		return nil, err
	}
	if err := haveFUSE(); err != nil {
		return nil, err
	}
	h, fd, err := attach(dir, f.mountOptions())
	if err != nil {
		return nil, err
	}
	second := catalogueTimeout
	opt := &fusenode.Options{
		EntryTimeout: &second, AttrTimeout: &second,
		NullPermissions: true,
		RootStableAttr:  &fusenode.StableAttr{Ino: 1},
		MountOptions: fuse.MountOptions{
			FsName: "varve", Name: "varve",
			MaxWrite: requestSize, MaxReadAhead: readAhead, MaxBackground: background,
			EnableSymlinkCaching: true,
			EnableAcl:            f.opt.AllowOther, // it implies default_permissions
			Logger:               log.New(logWriter{f.log}, "", 0),
		},
	}
	server, err := fuse.NewServer(fusenode.NewNodeFS(&catalogDir{fs: f}, opt), fmt.Sprintf("/dev/fd/%d", fd), &opt.MountOptions)
	if err != nil {
		return nil, errors.Join(fmt.Errorf("start FUSE on %s: %w", dir, err), unix.Close(fd), unmountAt(dir, true), h.stop())
	}
	m := &Mounted{Dir: dir, server: server, helper: h, served: make(chan struct{})}
	go func() {
		defer close(m.served)
		server.Serve()
	}()
	if err := server.WaitMount(); err != nil {
		return nil, errors.Join(fmt.Errorf("mount %s: %w", dir, err), unmountAt(dir, true))
	}
	at, err := mountAt(dir)
	if err != nil {
		return nil, errors.Join(fmt.Errorf("mount %s: %w", dir, err), unmountAt(dir, true))
	}
	m.device = at.device
	if err := refusePolls(dir); err != nil {
		return nil, errors.Join(fmt.Errorf("mount %s: %w", dir, err), m.Close())
	}
	if f.opt.AllowOther && !checksACLs(server.KernelSettings()) {
		return nil, errors.Join(fmt.Errorf("mount %s: %w", dir, errNoACLs), m.Close())
	}
	return m, nil
}

var errNoACLs = errors.New("this kernel does not check access lists of FUSE mounts (Linux 4.9 and newer do): other users could read what a list forbids them, so they get no access")

// checksACLs reports whether the kernel checks access lists, for which it reads
// system.posix_acl_access. The mode of a file with a list is not enough: its group bits are
// the list's mask, and it does not show that one user is refused.
func checksACLs(kernel *fuse.InitIn) bool { return kernel.Flags64()&fuse.CAP_POSIX_ACL != 0 }

// refusePolls makes the kernel ask once whether files can be polled, and learn that they
// cannot. Go's runtime adds files that this process opens to epoll without releasing its
// processor: the reply might never come. The FUSE library replies for a file of this name,
// and does this itself only for mounts that it made.
func refusePolls(dir string) error {
	fd, err := unix.Open(filepath.Join(dir, ".go-fuse-epoll-hack"), unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("open the first file: %w", err)
	}
	_, err = unix.Poll([]unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}, 0)
	return errors.Join(err, unix.Close(fd))
}

// mountOptions returns the options in the form of mount(8).
func (f *FS) mountOptions() []string {
	opt := []string{"nosuid", "nodev", fmt.Sprintf("max_read=%d", requestSize)}
	if !f.opt.Writable {
		opt = append(opt, "ro")
	}
	if f.opt.AllowOther {
		opt = append(opt, "allow_other", "default_permissions")
	}
	return opt
}

// Done is closed when the tree is unmounted and all replies are sent.
func (m *Mounted) Done() <-chan struct{} { return m.served }

// closeGrace is how long Close waits for open files.
const closeGrace = 5 * time.Second

// Close unmounts. If programs have files open, the tree still disappears from the directory;
// their reads are served for a few seconds more, then until this process ends. What another
// process has mounted on the directory since this tree was unmounted stays.
func (m *Mounted) Close() error {
	err := m.unmount()
	select {
	case <-m.served:
	case <-time.After(closeGrace):
	}
	return errors.Join(err, m.helper.stop())
}

// unmount unmounts the tree, if it is on the directory still.
func (m *Mounted) unmount() error {
	select {
	case <-m.served: // and the next mount may have the number of its device
		return nil
	default:
	}
	if at, err := mountAt(m.Dir); err != nil || at.device != m.device {
		return err
	}
	err := unmountAt(m.Dir, false)
	if err != nil && !errors.Is(err, ErrNotMounted) {
		err = unmountAt(m.Dir, true)
	}
	if errors.Is(err, ErrNotMounted) {
		return nil
	}
	return err
}

func haveFUSE() error {
	switch f, err := os.OpenFile(fuseDevice, os.O_RDWR, 0); {
	case err == nil:
		return f.Close()
	case errors.Is(err, fs.ErrNotExist):
		return fmt.Errorf("%w: %s does not exist. Load it with 'modprobe fuse', or give it to the container (docker run --device %s --cap-add SYS_ADMIN); %s",
			ErrNoFUSE, fuseDevice, fuseDevice, noFUSEAdvice)
	default:
		return fmt.Errorf("%w: %w; %s", ErrNoFUSE, err, noFUSEAdvice)
	}
}

// helper is the fusermount3 that unmounts when this process dies.
type helper struct {
	conn *os.File
	cmd  *exec.Cmd
	once sync.Once
	err  error
}

// stop ends the helper and waits for it. The helper unmounts if that has not been done.
func (h *helper) stop() error {
	if h == nil {
		return nil
	}
	h.once.Do(func() { h.err = errors.Join(h.conn.Close(), h.cmd.Wait()) })
	return h.err
}

// attach mounts and returns the descriptor for requests: by fusermount3, which needs no root
// and stays to clean up after a crash, else directly as root.
func attach(dir string, options []string) (*helper, int, error) {
	program, err := exec.LookPath("fusermount3")
	if err == nil {
		return attachByHelper(program, dir, options)
	}
	if os.Geteuid() != 0 {
		return nil, -1, fmt.Errorf("%w: there is no fusermount3, which users other than root need to mount. Install the package fuse3; %s", ErrNoFUSE, noFUSEAdvice)
	}
	fd, err := attachDirectly(dir, options)
	return nil, fd, err
}

func attachByHelper(program, dir string, options []string) (h *helper, fd int, err error) {
	pair, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, -1, fmt.Errorf("mount %s: %w", dir, err)
	}
	ours, theirs := os.NewFile(uintptr(pair[0]), "fusermount3"), os.NewFile(uintptr(pair[1]), "fusermount3")
	options = append(options, "auto_unmount", "fsname=varve", "subtype=varve")
	var stderr bytes.Buffer
	// A child's extra descriptors begin at 3.
	cmd := exec.Command(program, "-o", strings.Join(options, ","), "--", dir)
	cmd.Env = append(os.Environ(), "_FUSE_COMMFD=3")
	cmd.ExtraFiles = []*os.File{theirs}
	cmd.Stderr = &stderr
	err = cmd.Start()
	err = errors.Join(err, theirs.Close())
	if err != nil {
		return nil, -1, errors.Join(fmt.Errorf("run fusermount3: %w", err), ours.Close())
	}
	h = &helper{conn: ours, cmd: cmd}
	fd, err = receive(ours)
	if err != nil {
		stopped := h.stop()
		if text := strings.TrimSpace(stderr.String()); text != "" {
			return nil, -1, fmt.Errorf("%w: cannot mount %s: %s", ErrNoFUSE, dir, text)
		}
		return nil, -1, fmt.Errorf("mount %s by fusermount3: %w", dir, errors.Join(err, stopped))
	}
	return h, fd, nil
}

// receive receives the descriptor that fusermount3 sends.
func receive(f *os.File) (int, error) {
	conn, err := net.FileConn(f)
	if err != nil {
		return -1, fmt.Errorf("talk to fusermount3: %w", err)
	}
	defer conn.Close()
	unixConn, ok := conn.(*net.UnixConn)
	if !ok {
		return -1, fmt.Errorf("talk to fusermount3: it is %T", conn)
	}
	var data [4]byte
	control := make([]byte, unix.CmsgSpace(4))
	_, n, _, _, err := unixConn.ReadMsgUnix(data[:], control)
	if err != nil {
		return -1, fmt.Errorf("receive descriptor: %w", err)
	}
	messages, err := unix.ParseSocketControlMessage(control[:n])
	if err != nil || len(messages) != 1 {
		return -1, errors.Join(errors.New("fusermount3 sent no descriptor"), err)
	}
	fds, err := unix.ParseUnixRights(&messages[0])
	if err != nil || len(fds) != 1 {
		return -1, errors.Join(errors.New("fusermount3 sent no descriptor"), err)
	}
	unix.CloseOnExec(fds[0])
	return fds[0], nil
}

// attachDirectly mounts as root, by mount(2).
func attachDirectly(dir string, options []string) (int, error) {
	fd, err := unix.Open(fuseDevice, unix.O_RDWR|unix.O_CLOEXEC, 0)
	if err != nil {
		return -1, fmt.Errorf("%w: open %s: %w; %s", ErrNoFUSE, fuseDevice, err, noFUSEAdvice)
	}
	data := []string{fmt.Sprintf("fd=%d,rootmode=40000,user_id=%d,group_id=%d", fd, os.Geteuid(), os.Getegid())}
	flags := uintptr(unix.MS_NOSUID | unix.MS_NODEV)
	for _, o := range options {
		switch o {
		case "nosuid", "nodev":
		case "ro":
			flags |= unix.MS_RDONLY
		default:
			data = append(data, o)
		}
	}
	if err := unix.Mount("varve", dir, fsType, flags, strings.Join(data, ",")); err != nil {
		return -1, errors.Join(fmt.Errorf("%w: mount %s: %w (a container needs the capability SYS_ADMIN); %s", ErrNoFUSE, dir, err, noFUSEAdvice), unix.Close(fd))
	}
	return fd, nil
}

// logWriter logs the FUSE library's messages.
type logWriter struct{ log *slog.Logger }

func (w logWriter) Write(b []byte) (int, error) {
	w.log.Log(context.Background(), slog.LevelDebug, "FUSE library", "message", strings.TrimSpace(string(b)))
	return len(b), nil
}
