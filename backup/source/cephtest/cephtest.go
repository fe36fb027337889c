// Package cephtest starts a Ceph cluster for tests.
package cephtest

import (
	"bytes"
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/varve-io/varve/fusefs/diskfs/diskfstest"
	"github.com/varve-io/varve/internal/porttest"
)

// Cluster is one monitor and one OSD, which has its objects in memory.
type Cluster struct {
	// Conf is the file for CEPH_CONF.
	Conf string
}

const conf = `[global]
fsid = 1b89895c-9f8f-4a57-aa0c-aa7bbd230917
mon_host = [v2:127.0.0.1:%[2]d]
auth_cluster_required = none
auth_service_required = none
auth_client_required = none
log_file = %[1]s/$name.log
run_dir = %[1]s
admin_socket = %[1]s/$name.asok
osd_pool_default_size = 1
osd_pool_default_min_size = 1
osd_crush_chooseleaf_type = 0
osd_pool_default_pg_autoscale_mode = off
mon_allow_pool_size_one = true
mon_data = %[1]s/mon
mon_data_avail_crit = 0
osd_data = %[1]s/osd
osd_objectstore = memstore
memstore_device_bytes = 1073741824
`

// Run runs a program of Ceph or QEMU with the cluster, and returns what it prints.
func (c *Cluster) Run(t testing.TB, program string, args ...string) []byte {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Minute) // without its cluster a client waits for ever
	defer cancel()
	cmd := exec.CommandContext(ctx, program, args...)
	cmd.Env = append(os.Environ(), "CEPH_CONF="+c.Conf)
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("%s %q: %v: %s", program, args, err, &stderr)
	}
	return out
}

// Start starts a cluster with a pool named pool, which ends with the test.
func Start(t testing.TB) *Cluster {
	t.Helper()
	for _, name := range []string{"ceph-mon", "ceph-osd", "monmaptool", "ceph", "rbd", "qemu-nbd", "qemu-io"} {
		diskfstest.NeedTool(t, name)
	}
	dir, err := os.MkdirTemp("/tmp", "ceph-") // short, as a socket's path must be
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	port := porttest.Free(t)
	c := &Cluster{filepath.Join(dir, "ceph.conf")}
	monitors, osd := filepath.Join(dir, "monmap"), filepath.Join(dir, "osd")
	for _, d := range []string{filepath.Join(dir, "mon"), osd} {
		if err := os.Mkdir(d, 0o700); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.WriteFile(c.Conf, fmt.Appendf(nil, conf, dir, port), 0o600); err != nil {
		t.Fatal(err)
	}
	daemon := func(program string, args ...string) {
		cmd := exec.Command(program, append(args, "-f")...)
		cmd.Env = append(os.Environ(), "CEPH_CONF="+c.Conf)
		var out bytes.Buffer
		cmd.Stdout, cmd.Stderr = &out, &out
		cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() {
			_ = cmd.Process.Kill()
			_ = cmd.Wait()
			if t.Failed() {
				t.Logf("%s: %s", program, out.Bytes()[max(0, out.Len()-2000):])
			}
		})
	}
	c.Run(t, "monmaptool", "--create", "--fsid", "1b89895c-9f8f-4a57-aa0c-aa7bbd230917", "--addv", "a", fmt.Sprintf("[v2:127.0.0.1:%d]", port), monitors)
	c.Run(t, "ceph-mon", "--mkfs", "-i", "a", "--monmap", monitors)
	daemon("ceph-mon", "-i", "a")
	c.Run(t, "ceph-osd", "-i", "0", "--mkfs")
	id, err := os.ReadFile(filepath.Join(osd, "fsid"))
	if err != nil {
		t.Fatal(err)
	}
	c.Run(t, "ceph", "osd", "create", strings.TrimSpace(string(id)))
	c.Run(t, "ceph", "osd", "crush", "add", "osd.0", "1", "host=h", "root=default")
	daemon("ceph-osd", "-i", "0")
	c.Run(t, "ceph", "osd", "pool", "create", "pool", "8")
	return c
}
