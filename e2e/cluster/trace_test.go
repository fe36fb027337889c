package cluster_test

import (
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/varve-io/varve/e2e/cluster"
)

// trace is what a cluster could leave on the machine: mounts, files where components
// write by default, cgroups, network devices, and processes.
func trace(t *testing.T, run string) []string {
	t.Helper()
	var out []string
	mounts, err := os.ReadFile("/proc/self/mounts")
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(mounts)) {
		if strings.Contains(line, run) {
			out = append(out, "mount "+line)
		}
	}
	for _, pattern := range []string{"/var/lib/cni*", "/var/lib/kubelet*", "/var/lib/containerd*", "/var/lib/etcd*", "/opt/*",
		"/run/containerd*", "/run/runc*", "/run/netns*", "/run/xtables*", "/var/log/pods*", "/var/log/containers*", "/etc/cni*",
		"/sys/class/net/*", "/sys/fs/cgroup/varve-e2e-*", "/sys/fs/cgroup/*/varve-e2e-*"} {
		found, err := filepath.Glob(pattern)
		if err != nil {
			t.Fatal(err)
		}
		out = append(out, found...)
	}
	procs, err := filepath.Glob("/proc/[0-9]*/cmdline")
	if err != nil {
		t.Fatal(err)
	}
	for _, p := range procs {
		if b, err := os.ReadFile(p); err == nil && strings.Contains(string(b), run) {
			out = append(out, fmt.Sprintf("process %q", b))
		}
	}
	loops, err := filepath.Glob("/sys/block/loop*/loop/backing_file")
	if err != nil {
		t.Fatal(err)
	}
	for _, l := range loops {
		if b, err := os.ReadFile(l); err == nil && strings.Contains(string(b), run) {
			out = append(out, "loop device of "+string(b))
		}
	}
	return out
}

// A cluster of two nodes that is killed with volumes in use leaves nothing behind.
func TestDownLeavesNoTrace(t *testing.T) {
	if os.Getenv("VARVE_E2E_UP") != "1" {
		t.Skip("brings up a cluster: set VARVE_E2E_UP=1")
	}
	// Not below the test's directory, whose path is too long for sockets.
	run, err := os.MkdirTemp("", "e2e")
	if err != nil {
		t.Fatal(err)
	}
	t.Setenv("VARVE_E2E_RUN", run)
	before := trace(t, run)
	src, err := cluster.FindSource()
	if err != nil {
		t.Fatal(err)
	}
	log := slog.New(slog.NewTextHandler(t.Output(), nil))
	bin, err := cluster.Builder{Source: src, Log: log}.Build(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	down := func() {
		if err := cluster.Down(t.Context()); err != nil {
			t.Error(err)
		}
	}
	c, err := cluster.Up(t.Context(), bin, cluster.Options{Nodes: 2}, log)
	if err != nil {
		down()
		t.Fatal(err)
	}
	const objects = `
apiVersion: v1
kind: PersistentVolumeClaim
metadata: {name: NAME}
spec: {accessModes: [ReadWriteOnce], volumeMode: MODE, resources: {requests: {storage: 32Mi}}}
---
apiVersion: v1
kind: Pod
metadata: {name: NAME}
spec:
  nodeSelector: {kubernetes.io/hostname: NODE}
  containers: [{name: c, image: "` + cluster.ToolImage + `", imagePullPolicy: Never, command: [sleep, "1000000"], USE}]
  volumes: [{name: v, persistentVolumeClaim: {claimName: NAME}}]
`
	for name, r := range map[string]*strings.Replacer{
		"disk":  strings.NewReplacer("NAME", "disk", "MODE", "Block", "NODE", "e2e-1", "USE", "volumeDevices: [{name: v, devicePath: /dev/v}]"),
		"files": strings.NewReplacer("NAME", "files", "MODE", "Filesystem", "NODE", "e2e-2", "USE", "volumeMounts: [{name: v, mountPath: /v}]"),
	} {
		if err := c.Apply(t.Context(), []byte(r.Replace(objects))); err != nil {
			t.Error(err)
		} else if _, err := c.Kubectl(t.Context(), nil, "wait", "--for=condition=Ready", "--timeout=90s", "pod/"+name); err != nil {
			t.Error(err)
		}
	}
	if !slices.ContainsFunc(trace(t, run), func(s string) bool { return strings.HasPrefix(s, "loop device") }) {
		t.Error("no volume is in use; there is nothing to leave")
	}
	down()
	if _, err := os.Stat(run); !os.IsNotExist(err) {
		t.Errorf("%s is still there: %v", run, err)
	}
	for _, s := range trace(t, run) {
		if !slices.Contains(before, s) {
			t.Errorf("left behind: %s", s)
		}
	}
}
