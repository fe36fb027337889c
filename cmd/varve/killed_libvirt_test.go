package main

import (
	"bufio"
	"bytes"
	"crypto/sha256"
	"encoding/binary"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"

	"github.com/varve-io/varve/fusefs/diskfs/diskfstest"
	"github.com/varve-io/varve/internal/process"
)

// libvirtMachine is a paused domain of a libvirtd of our own, with the disks vda (qcow2) and vdb (raw)
// of 4 MiB.
type libvirtMachine struct {
	dir, socket string
	uuid        string // no other test's, in any process: a backup locks its machine by it
	model       map[string][]byte
}

// startLibvirtMachine starts both. prepare are called with its directory before.
func startLibvirtMachine(t *testing.T, prepare ...func(dir string)) *libvirtMachine {
	t.Helper()
	for _, name := range []string{"libvirtd", "virsh", "qemu-system-x86_64"} {
		diskfstest.NeedTool(t, name)
	}
	if os.Getuid() != 0 {
		t.Skip("a libvirt that runs machines as root is started as root")
	}
	dir, err := os.MkdirTemp("/tmp", "libvirt-") // short, as a socket's path must be
	if err != nil {
		t.Fatal(err)
	}
	id := sha256.Sum256([]byte(dir))
	m := &libvirtMachine{
		dir, filepath.Join(dir, "libvirt-sock"), fmt.Sprintf("%x-%x-4000-8000-%x", id[:4], id[4:6], id[6:12]),
		map[string][]byte{"vda": make([]byte, 4<<20), "vdb": make([]byte, 4<<20)},
	}
	for _, f := range prepare {
		f(dir)
	}
	cmd := exec.Command("unshare", "-m", "--propagation", "slave", "../../backup/source/testdata/libvirtd.sh", dir)
	var out bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &out
	// Its end is tied to a thread of its own: those of hydration, which other tests start, end with their work.
	ended := make(chan struct{})
	if err := process.StartTied(cmd, syscall.SIGKILL, func(error) { close(ended) }); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_, _ = m.virsh("destroy", "killed")
		_ = cmd.Process.Signal(syscall.SIGTERM)
		<-ended
		if t.Failed() {
			t.Logf("libvirtd: %s", out.Bytes()[max(0, out.Len()-3000):])
		}
		_ = os.RemoveAll(dir)
	})
	waitUntil(t, "libvirt answers", func() bool { _, err := m.virsh("version"); return err == nil })
	for name, format := range map[string]string{"vda": "qcow2", "vdb": "raw"} {
		qemuTool(t, "qemu-img", "create", "-q", "-f", format, filepath.Join(dir, name), "4M")
	}
	xml := filepath.Join(dir, "domain.xml")
	text := fmt.Sprintf(`<domain type='qemu'><name>killed</name><uuid>%s</uuid><memory unit='MiB'>32</memory><vcpu>1</vcpu>
<os><type arch='x86_64' machine='pc'>hvm</type></os><devices><emulator>/usr/bin/qemu-system-x86_64</emulator>
<disk type='file' device='disk'><driver name='qemu' type='qcow2'/><source file='%[2]s/vda'/><target dev='vda' bus='virtio'/></disk>
<disk type='file' device='disk'><driver name='qemu' type='raw'/><source file='%[2]s/vdb'/><target dev='vdb' bus='virtio'/></disk>
<controller type='usb' model='none'/><memballoon model='none'/></devices></domain>`, m.uuid, dir)
	if err := os.WriteFile(xml, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	for _, args := range [][]string{{"define", xml}, {"start", "--paused", "killed"}} {
		if out, err := m.virsh(args...); err != nil {
			t.Fatalf("virsh %q: %v: %s", args, err, out)
		}
	}
	return m
}

func (m *libvirtMachine) virsh(args ...string) (string, error) {
	out, err := exec.Command("virsh", append([]string{"-q", "-c", "qemu:///system?socket=" + m.socket}, args...)...).CombinedOutput()
	return string(out), err
}

// idle reports whether libvirt runs no job on the domain.
func (m *libvirtMachine) idle() bool {
	job, err := m.virsh("domjobinfo", "killed")
	return err == nil && strings.Contains(job, "None")
}

// write has the guest write 4 KiB to each disk.
func (m *libvirtMachine) write(t *testing.T, n int) {
	t.Helper()
	for i, disk := range []string{"vda", "vdb"} {
		off, b := int64(n*37%900+i)<<12, byte(n%250+1)
		out, err := m.virsh("qemu-monitor-command", "killed", "--hmp",
			fmt.Sprintf("qemu-io -d /machine/peripheral/virtio-disk%d/virtio-backend \"write -P %d %d 4096\"", i, b, off))
		if err != nil || strings.TrimSpace(out) != "" {
			t.Fatalf("write to %s: %v: %s", disk, err, out)
		}
		copy(m.model[disk][off:], bytes.Repeat([]byte{b}, 4096))
	}
}

// TestKilledBackupOfLibvirt kills the program at each call to libvirt, from where it looks for what
// an earlier backup left.
func TestKilledBackupOfLibvirt(t *testing.T) {
	t.Parallel() // it mostly waits
	env, _ := newBackupEnv(t)
	m, scratch := startLibvirtMachine(t), t.TempDir()
	var calls libvirtCalls
	g := build(t, m.socket, readPacket, func(packet []byte) bool { return calls.count(packet) })
	args := []string{"libvirt:///killed?socket=" + g.socket, "--volume", "shop/vm", "--scratch", scratch}
	m.write(t, 1)
	mustRun(t, env, append([]string{"backup"}, args...)...)
	var steps []string
	for n := 1; ; n++ {
		m.write(t, n)
		g.mu.Lock()
		calls = libvirtCalls{}
		g.mu.Unlock()
		step := g.kill(t, env, n, append([]string{"backup"}, args...)...)
		if step == "" {
			break
		}
		steps = append(steps, step)
		after := fmt.Sprintf("call %d (%s)", n, step)
		// A job that is ending is not described any more: a backup does not wait long for one, as it may be another's.
		waitUntil(t, "libvirt has done what the killed backup asked for", func() bool {
			_, err := m.virsh("backup-dumpxml", "killed")
			return err == nil || m.idle()
		})
		m.write(t, n+400)
		mustBackUp(t, env, after, m.model, "shop/vm-vdb", args...)
		mustHaveLeft(t, after, m.uuid, scratch)
		waitUntil(t, "no job is left after "+after, m.idle)
		if list, err := m.virsh("checkpoint-list", "killed", "--name"); err != nil || len(strings.Fields(list)) != 1 {
			t.Errorf("after %s: checkpoints: %v, %q", after, err, strings.Fields(list))
		}
		nodes, err := m.virsh("qemu-monitor-command", "killed", `{"execute":"query-named-block-nodes","arguments":{"flat":true}}`)
		if n := strings.Count(nodes, `"granularity"`); err != nil || n != 1 || strings.Contains(nodes, scratch) {
			t.Errorf("after %s: %d bitmaps, or scratch files, are left in QEMU: %v\n%s", after, n, err, nodes)
		}
	}
	all := strings.Join(steps, " ")
	// DomainBackupBegin, DomainBackupGetXMLDesc, DomainAbortJob, DomainCheckpointDelete.
	for _, step := range []string{"421", "422", "164", "417"} {
		if !strings.Contains(all, "procedure "+step) {
			t.Errorf("no backup was killed at procedure %s; at %s", step, all)
		}
	}
}

// libvirtCalls tells which messages of one run are steps: the n-th must be the same in each run.
type libvirtCalls struct {
	looked bool
	begun  bool
	loop   []uint32 // what is called until the answer is another, however often
}

// count reports whether a message is a step. Not counted are messages that are no calls, as those
// that keep a connection alive; calls before the one that looks for what an earlier backup left;
// and all but the first of those that ask again and again: whether a job ends, whether it does after it was aborted, and
// whether that of the backup is there still.
func (c *libvirtCalls) count(packet []byte) bool {
	const (
		remoteProgram = 0x20008086 // src/remote/remote_protocol.x of libvirt
		abortJob      = 164
		getJobStats   = 298
		backupBegin   = 421
		backupGetXML  = 422
	)
	if binary.BigEndian.Uint32(packet[4:]) != remoteProgram {
		return false
	}
	procedure := binary.BigEndian.Uint32(packet[12:])
	again := slices.Contains(c.loop, procedure)
	c.looked = c.looked || procedure == getJobStats
	c.begun = c.begun || procedure == backupBegin
	switch {
	case again:
	case procedure == getJobStats, procedure == abortJob:
		c.loop = []uint32{procedure, backupGetXML}
	case procedure == backupGetXML && c.begun:
		c.loop = []uint32{backupGetXML}
	default:
		c.loop = nil
	}
	return c.looked && !again
}

// readPacket reads a message of libvirt, which begins with its length.
func readPacket(r *bufio.Reader) ([]byte, error) {
	head, err := r.Peek(4)
	if err != nil {
		return nil, err
	}
	packet := make([]byte, binary.BigEndian.Uint32(head))
	_, err = io.ReadFull(r, packet)
	return packet, err
}
