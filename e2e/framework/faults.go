package framework

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"

	corev1 "k8s.io/api/core/v1"

	"github.com/varve-io/varve/e2e/cluster"
)

// StopAPIServer kills the API server. The function it returns starts it again; the
// test's end does so too.
func (f *F) StopAPIServer() (start func()) {
	f.T.Helper()
	sv := f.Cluster.Supervisor(f.Cluster.Control())
	ctx, cancel := context.WithTimeout(f.T.Context(), Patience)
	defer cancel()
	if err := sv.Stop(ctx, "kube-apiserver", syscall.SIGKILL); err != nil {
		f.T.Fatal(err)
	}
	stopped := true
	start = func() {
		if !stopped {
			return
		}
		stopped = false
		if err := f.Cluster.StartAPIServer(context.Background()); err != nil {
			f.T.Error(err)
		}
	}
	f.T.Cleanup(start)
	return start
}

// KillKubelet kills the kubelet of a pod's node; its containers continue. The function it returns
// starts it again; the test's end does so too.
func (f *F) KillKubelet(pod *corev1.Pod) (start func()) {
	f.T.Helper()
	n := f.Cluster.Nodes[pod.Spec.NodeName]
	ctx, cancel := context.WithTimeout(f.T.Context(), Patience)
	defer cancel()
	if err := f.Cluster.Supervisor(n).Stop(ctx, "kubelet", syscall.SIGKILL); err != nil {
		f.T.Fatal(err)
	}
	start = sync.OnceFunc(func() {
		if err := f.Cluster.StartKubelet(context.Background(), n); err != nil {
			f.T.Error(err)
		}
	})
	f.T.Cleanup(start)
	return start
}

// ReadFile reads a file of a pod's containers without Kubernetes, which may be down.
func (f *F) ReadFile(pod *corev1.Pod, path string) (string, error) {
	pids, err := f.processes(pod)
	if err != nil {
		return "", err
	}
	for _, pid := range pids {
		text, err := os.ReadFile(fmt.Sprintf("/proc/%d/root%s", pid, path))
		if err == nil {
			return string(text), nil
		}
	}
	return "", fmt.Errorf("pod %s has no file %s", pod.Name, path)
}

// ErrNoProcess means that a pod's containers run nothing: the kubelet waits before it starts what crashed again.
var ErrNoProcess = errors.New("runs no process")

// KillPod kills the processes of a pod's containers at once, as a crash would. The
// kubelet restarts them by the pod's policy. The error is ErrNoProcess if there are none.
func (f *F) KillPod(pod *corev1.Pod) error {
	pids, err := f.processes(pod)
	if err != nil {
		return err
	}
	var errs []error
	killed := 0
	for _, pid := range pids {
		comm, err := os.ReadFile(fmt.Sprintf("/proc/%d/comm", pid))
		if err != nil || strings.TrimSpace(string(comm)) == "pause" {
			continue // ended, or what holds the pod's namespaces
		}
		if err := syscall.Kill(pid, syscall.SIGKILL); err != nil && !errors.Is(err, syscall.ESRCH) {
			errs = append(errs, err)
		}
		killed++
	}
	if killed == 0 {
		errs = append(errs, fmt.Errorf("pod %s %w", pod.Name, ErrNoProcess))
	}
	return errors.Join(errs...)
}

// KillWhen kills a pod's processes as soon as reached reports true: it stops a controller
// at a step that the API shows.
func (f *F) KillWhen(pod *corev1.Pod, step string, reached func(context.Context) (bool, error)) {
	f.T.Helper()
	const pause = 5 * time.Millisecond // a step may be over soon
	ctx, cancel := context.WithTimeout(f.T.Context(), Patience)
	defer cancel()
	for {
		ok, err := reached(ctx)
		if err != nil {
			f.T.Fatalf("kill %s at %s: %v", pod.Name, step, err)
		}
		if ok {
			break
		}
		select {
		case <-ctx.Done():
			f.T.Fatalf("pod %s never came to %s", pod.Name, step)
		case <-time.After(pause):
		}
	}
	if err := f.KillPod(pod); err != nil {
		f.T.Fatalf("kill %s at %s: %v", pod.Name, step, err)
	}
}

// KillAtLog kills a pod's processes when a container writes a matching line: it stops a
// controller at a step that only its log shows. It watches from the call on and returns
// after the kill.
func (f *F) KillAtLog(pod *corev1.Pod, container string, line *regexp.Regexp) {
	f.T.Helper()
	ctx, cancel := context.WithTimeout(f.T.Context(), Patience)
	defer cancel()
	stream, err := f.Clientset.CoreV1().Pods(pod.Namespace).GetLogs(pod.Name, &corev1.PodLogOptions{Container: container, Follow: true}).Stream(ctx)
	if err != nil {
		f.T.Fatal(err)
	}
	defer func() { _ = stream.Close() }()
	lines := bufio.NewScanner(stream)
	lines.Buffer(nil, 1<<20)
	for lines.Scan() {
		if line.MatchString(lines.Text()) {
			if err := f.KillPod(pod); err != nil {
				f.T.Fatal(err)
			}
			return
		}
	}
	f.T.Fatalf("pod %s never wrote %s: %v", pod.Name, line, errors.Join(lines.Err(), ctx.Err()))
}

// CutNetwork drops all traffic of a pod, including its node's probes. The function it
// returns ends that; so does the test's end.
func (f *F) CutNetwork(pod *corev1.Pod) (restore func()) {
	f.T.Helper()
	pids, err := f.processes(pod)
	if err != nil || len(pids) == 0 {
		f.T.Fatalf("cut the network of %s: no process to be found: %v", pod.Name, err)
	}
	// Any process of the pod will do, but only the sandbox's stays as long as the pod.
	inPod := func(ctx context.Context, rules string) error {
		pids, err := f.processes(pod)
		if err != nil || len(pids) == 0 {
			return err // the pod is gone, with its network
		}
		n := &cluster.Node{PID: pids[0]}
		_, err = f.Cluster.Exec(ctx, n, cluster.NetworkOnly, strings.NewReader(rules), "nft", "-f", "-")
		return err
	}
	if err := inPod(f.T.Context(), `table inet e2e_cut {
  chain in { type filter hook input priority 0; policy drop; iif lo accept; }
  chain out { type filter hook output priority 0; policy drop; oif lo accept; }
}`); err != nil {
		f.T.Fatal(err)
	}
	cut := true
	restore = func() {
		if !cut {
			return
		}
		cut = false
		if err := inPod(context.Background(), "delete table inet e2e_cut"); err != nil {
			f.T.Error(err)
		}
	}
	f.T.Cleanup(restore)
	return restore
}

// processes returns the PIDs, in the machine's namespace, of a pod's containers and its
// sandbox.
func (f *F) processes(pod *corev1.Pod) ([]int, error) {
	node := f.Cluster.Nodes[pod.Spec.NodeName]
	if node == nil {
		return nil, fmt.Errorf("pod %s is on no node", pod.Name)
	}
	roots, err := filepath.Glob(filepath.Join("/sys/fs/cgroup/*", f.Cluster.Cgroup(node), "kubepods"))
	if err != nil {
		return nil, err
	}
	roots = append(roots, filepath.Join("/sys/fs/cgroup", f.Cluster.Cgroup(node), "kubepods"))
	var pids []int
	for _, root := range roots {
		err := filepath.WalkDir(root, func(p string, e fs.DirEntry, err error) error {
			if err != nil {
				if errors.Is(err, fs.ErrNotExist) { // cgroups come and go
					return nil
				}
				return err
			}
			if e.Name() != "cgroup.procs" || !strings.Contains(p, "/pod"+string(pod.UID)) {
				return nil
			}
			b, err := os.ReadFile(p)
			if err != nil {
				return nil
			}
			for s := range strings.FieldsSeq(string(b)) {
				pid, err := strconv.Atoi(s)
				if err != nil {
					return fmt.Errorf("%s: %w", p, err)
				}
				pids = append(pids, pid)
			}
			return nil
		})
		if err != nil || len(pids) > 0 {
			return pids, err // every hierarchy has the same
		}
	}
	return pids, nil
}

// Nodes makes sure that the cluster has this many running nodes.
func (f *F) Nodes(count int) []*cluster.Node {
	f.T.Helper()
	nodes := []*cluster.Node{f.Cluster.Control()}
	for i := 2; i <= count; i++ {
		name := fmt.Sprintf("e2e-%d", i)
		n := f.Cluster.Nodes[name]
		if n == nil || n.PID == 0 {
			var err error
			if n, err = f.Cluster.AddNode(f.T.Context(), i); err != nil {
				f.T.Fatal(err)
			}
		}
		nodes = append(nodes, n)
	}
	return nodes
}

// LoseNode ends a node as a power cut would. It comes back when the test ends, before
// the test's objects are deleted, or when Nodes is called.
func (f *F) LoseNode(n *cluster.Node) {
	f.T.Helper()
	ctx, cancel := context.WithTimeout(f.T.Context(), Patience)
	defer cancel()
	if err := f.Cluster.LoseNode(ctx, n); err != nil {
		f.T.Fatal(err)
	}
	f.T.Cleanup(func() {
		if now := f.Cluster.Nodes[n.Name]; now.PID != 0 {
			return
		}
		if _, err := f.Cluster.AddNode(context.Background(), n.Number); err != nil {
			f.T.Error(err)
		}
	})
}

// DeviceOwnership switches containerd's device_ownership_from_security_context for
// the rest of the test.
func (f *F) DeviceOwnership(on bool) {
	f.T.Helper()
	before := f.Cluster.Options.DeviceOwnership
	if err := f.Cluster.SetDeviceOwnership(f.T.Context(), on); err != nil {
		f.T.Fatal(err)
	}
	f.T.Cleanup(func() {
		if err := f.Cluster.SetDeviceOwnership(context.Background(), before); err != nil {
			f.T.Error(err)
		}
	})
}
