package cluster

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"syscall"
	"time"

	"github.com/varve-io/varve/e2e/cluster/supervisor"
)

// startTimeout is for what takes seconds on an idle machine; the machine may be busy.
const startTimeout = 5 * time.Minute

// spawn makes a node's namespaces and waits until its supervisor answers.
func (c *Cluster) spawn(ctx context.Context, n *Node) error {
	for _, d := range []string{"log", "cni", "kubelet/plugins_registry", "containerd"} {
		if err := os.MkdirAll(c.NodePath(n, d), 0o755); err != nil {
			return err
		}
	}
	if err := os.RemoveAll(c.NodePath(n, "init.sock")); err != nil {
		return err
	}
	log, err := os.OpenFile(c.Log(n, "init"), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o644)
	if err != nil {
		return err
	}
	defer func() { _ = log.Close() }()
	cmd := exec.Command(c.bin("e2e-cluster"), "node-enter", c.Cgroup(n), n.Name, c.NodePath(n), c.NodePath(n, "init.sock"))
	cmd.Stdout, cmd.Stderr = log, log
	cmd.Env = append(os.Environ(), "PATH="+c.Bin+":/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin")
	cmd.Dir = "/"
	cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: supervisor.CloneFlags, Setsid: true}
	if err := cmd.Start(); err != nil {
		return fmt.Errorf("start node %s (it needs root): %w", n.Name, err)
	}
	n.PID = cmd.Process.Pid
	// It outlives this process; until it answers, its end must be noticed.
	ended := make(chan error, 1)
	go func() { ended <- cmd.Wait() }()
	return until(ctx, "the supervisor of "+n.Name, func(ctx context.Context) error {
		select {
		case err := <-ended:
			ended <- err
			b, _ := os.ReadFile(c.Log(n, "init"))
			return fmt.Errorf("it ended: %w: %s", errors.Join(err), b)
		default:
		}
		_, err := c.Supervisor(n).Status(ctx)
		return err
	})
}

// link sets up a node's network: the first has the bridge, the others are joined to it.
// Each has routes to the others' pods.
func (c *Cluster) link(ctx context.Context, n *Node) error {
	ip := func(n *Node, args ...string) error {
		_, err := c.Exec(ctx, n, NetworkOnly, nil, append([]string{"ip"}, args...)...)
		return err
	}
	control := c.Control()
	steps := [][]string{{"link", "set", "lo", "up"}}
	if n.Number == 1 {
		steps = append(steps,
			[]string{"link", "add", "node0", "type", "bridge"},
			[]string{"addr", "add", n.IP() + "/24", "dev", "node0"},
			[]string{"link", "set", "node0", "up"},
			// A port gives the bridge a carrier while there is no second node.
			[]string{"link", "add", "v0", "type", "veth", "peer", "name", "v1"},
			[]string{"link", "set", "v0", "master", "node0"},
			[]string{"link", "set", "v0", "up"},
			[]string{"link", "set", "v1", "up"},
			// kube-proxy and pods of the host network look for a default route.
			[]string{"route", "add", "default", "dev", "node0"})
	} else {
		port := "port" + strconv.Itoa(n.Number)
		if err := errors.Join(
			ip(control, "link", "add", port, "type", "veth", "peer", "name", "eth0", "netns", strconv.Itoa(n.PID)),
			ip(control, "link", "set", port, "master", "node0"),
			ip(control, "link", "set", port, "up")); err != nil {
			return err
		}
		steps = append(steps,
			[]string{"addr", "add", n.IP() + "/24", "dev", "eth0"},
			[]string{"link", "set", "eth0", "up"},
			[]string{"route", "add", "default", "via", control.IP()})
	}
	for _, s := range steps {
		if err := ip(n, s...); err != nil {
			return err
		}
	}
	for _, name := range c.nodeNames() {
		other := c.Nodes[name]
		if other == n || other.PID == 0 {
			continue
		}
		if err := errors.Join(ip(n, "route", "replace", other.podRange(), "via", other.IP()),
			ip(other, "route", "replace", n.podRange(), "via", n.IP())); err != nil {
			return err
		}
	}
	return nil
}

// configure writes what the node's processes read.
func (c *Cluster) configure(n *Node) error {
	a, err := openAuthority(c.Path("pki"))
	if err != nil {
		return err
	}
	if err := errors.Join(a.client("kubelet-"+n.Name, "system:node:"+n.Name, "system:nodes"),
		a.server("kubelet-server-"+n.Name, n.Name, n.IP(), "127.0.0.1"),
		c.kubeconfig("kubelet-"+n.Name)); err != nil {
		return err
	}
	v := c.nodeValues(n)
	for file, name := range map[string]string{"containerd.toml": "containerd.toml", "cni/10-bridge.conflist": "cni.conflist",
		"kubelet.yaml": "kubelet.yaml", "kube-proxy.yaml": "kube-proxy.yaml"} {
		if err := renderTo(c.NodePath(n, file), name, v); err != nil {
			return err
		}
	}
	return os.WriteFile(c.NodePath(n, "resolv.conf"), []byte("nameserver "+c.Control().IP()+"\n"), 0o644)
}

// thrifty makes Go's garbage collector run less often, and goroutines begin with stacks that need
// not grow: the components' memory is small, and the tests are short of processors. The limit is
// for a component that grows in spite of that.
var thrifty = []string{"GOGC=400", "GOMEMLIMIT=1GiB", "GODEBUG=adaptivestackstart=1"}

// run starts a process of the node from the cluster's binaries.
func (c *Cluster) run(ctx context.Context, n *Node, p supervisor.Process) error {
	p.Log = c.Log(n, p.Name)
	p.Env = append(p.Env, thrifty...)
	if filepath.Base(p.Argv[0]) == p.Argv[0] {
		p.Argv[0] = c.bin(p.Argv[0])
	}
	return c.Supervisor(n).Start(ctx, p)
}

// startRuntime starts containerd and imports the images.
func (c *Cluster) startRuntime(ctx context.Context, n *Node) error {
	if err := c.run(ctx, n, supervisor.Process{Name: "containerd", Argv: []string{"containerd", "--config", c.NodePath(n, "containerd.toml")}}); err != nil {
		return err
	}
	if err := until(ctx, "containerd", func(ctx context.Context) error {
		_, err := c.ctr(ctx, n, "version")
		return err
	}); err != nil {
		return err
	}
	built, err1 := filepath.Glob(filepath.Join(imageDir(c.Bin), "*.tar"))
	brought, err2 := filepath.Glob(c.Path("images", "*.tar"))
	if err := errors.Join(err1, err2); err != nil {
		return err
	}
	for _, archive := range append(built, brought...) {
		if err := c.importImage(ctx, n, archive); err != nil {
			return err
		}
	}
	return nil
}

func (c *Cluster) ctr(ctx context.Context, n *Node, args ...string) (string, error) {
	return c.Exec(ctx, n, WholeNode, nil, append([]string{c.bin("ctr"), "-a", c.NodePath(n, "containerd.sock"), "-n", "k8s.io"}, args...)...)
}

func (c *Cluster) importImage(ctx context.Context, n *Node, archive string) error {
	_, err := c.ctr(ctx, n, "images", "import", archive)
	return err
}

// ImportImage imports an OCI archive on every node, and on those added later.
func (c *Cluster) ImportImage(ctx context.Context, archive string) error {
	b, err := os.ReadFile(archive)
	if err != nil {
		return err
	}
	sum := sha256.Sum256(b)
	kept := c.Path("images", hex.EncodeToString(sum[:8])+".tar")
	if err := os.MkdirAll(filepath.Dir(kept), 0o755); err != nil {
		return err
	}
	if err := os.WriteFile(kept, b, 0o644); err != nil {
		return err
	}
	for _, name := range c.nodeNames() {
		if n := c.Nodes[name]; n.PID != 0 {
			if err := c.importImage(ctx, n, kept); err != nil {
				return err
			}
		}
	}
	return nil
}

// TagImage gives an image another name on every running node.
func (c *Cluster) TagImage(ctx context.Context, image, name string) error {
	for _, node := range c.nodeNames() {
		if n := c.Nodes[node]; n.PID != 0 {
			if _, err := c.ctr(ctx, n, "images", "tag", "--force", image, name); err != nil {
				return err
			}
		}
	}
	return nil
}

// startKubelet starts what turns the namespaces into a Kubernetes node.
func (c *Cluster) startKubelet(ctx context.Context, n *Node) error {
	if err := c.StartKubelet(ctx, n); err != nil {
		return err
	}
	return c.run(ctx, n, supervisor.Process{Name: "kube-proxy", Argv: []string{"kube-proxy", "--config=" + c.NodePath(n, "kube-proxy.yaml")}})
}

// StartKubelet starts the kubelet of a node, or again if it was killed.
func (c *Cluster) StartKubelet(ctx context.Context, n *Node) error {
	return c.run(ctx, n, supervisor.Process{Name: "kubelet", Argv: []string{"kubelet", "--config=" + c.NodePath(n, "kubelet.yaml"),
		"--kubeconfig=" + c.Path("kubelet-"+n.Name+".kubeconfig"), "--root-dir=" + c.NodePath(n, "kubelet"),
		"--cert-dir=" + c.NodePath(n, "kubelet-pki"), "--node-ip=" + n.IP(), "--hostname-override=" + n.Name, "--v=2"}})
}

func (c *Cluster) waitReady(ctx context.Context, n *Node) error {
	return until(ctx, "node "+n.Name, func(ctx context.Context) error {
		_, err := c.Kubectl(ctx, nil, "wait", "--for=condition=Ready", "--timeout=10s", "node/"+n.Name)
		return err
	})
}

// AddNode starts one more node, or one again that was lost, and waits until it is
// ready and every driver has registered there.
func (c *Cluster) AddNode(ctx context.Context, number int) (*Node, error) {
	if number < 2 || number > 9 {
		return nil, fmt.Errorf("node number %d: want 2 to 9", number)
	}
	ctx, cancel := context.WithTimeout(ctx, startTimeout)
	defer cancel()
	n := &Node{Name: nodeName(number), Number: number}
	if old := c.Nodes[n.Name]; old != nil && old.PID != 0 {
		return nil, fmt.Errorf("node %s runs already", n.Name)
	}
	if err := c.spawn(ctx, n); err != nil {
		return nil, err
	}
	if err := c.change(func() error { c.Nodes[n.Name] = n; return nil }); err != nil {
		return nil, err
	}
	for _, step := range []func(context.Context, *Node) error{
		c.link,
		func(_ context.Context, n *Node) error { return c.configure(n) },
		c.startRuntime, c.startKubelet, c.waitReady, c.startNodeDrivers,
	} {
		if err := step(ctx, n); err != nil {
			return nil, fmt.Errorf("node %s: %w", n.Name, err)
		}
	}
	return n, nil
}

// LoseNode ends a node as a power cut would: nothing on it cleans up. Its object stays in
// the API until it is deleted; AddNode brings it back.
func (c *Cluster) LoseNode(ctx context.Context, n *Node) error {
	if n.Number == 1 {
		return errors.New("the node with the control plane cannot be lost")
	}
	if n.PID == 0 {
		return nil
	}
	// A real node's kernel would lose its loop devices; this one is shared.
	loops, err := loopDevices(ctx, c.NodePath(n)+"/")
	if err != nil {
		return err
	}
	if err := killAndWait(ctx, n.PID); err != nil {
		return err
	}
	n.PID = 0
	return errors.Join(detachLoops(ctx, loops), c.change(func() error {
		if known := c.Nodes[n.Name]; known != nil {
			known.PID = 0
		}
		return nil
	}))
}

// SetDeviceOwnership switches containerd's device_ownership_from_security_context on all
// nodes, for containers started from then on.
func (c *Cluster) SetDeviceOwnership(ctx context.Context, on bool) error {
	if c.Options.DeviceOwnership == on {
		return nil
	}
	ctx, cancel := context.WithTimeout(ctx, startTimeout)
	defer cancel()
	c.Options.DeviceOwnership = on
	for _, name := range c.nodeNames() {
		n := c.Nodes[name]
		if n.PID == 0 {
			continue
		}
		if err := renderTo(c.NodePath(n, "containerd.toml"), "containerd.toml", c.nodeValues(n)); err != nil {
			return err
		}
		if err := c.Supervisor(n).Stop(ctx, "containerd", syscall.SIGTERM); err != nil {
			return err
		}
		// Its shims, and so all containers, keep running.
		if err := c.startRuntime(ctx, n); err != nil {
			return err
		}
		if err := c.waitReady(ctx, n); err != nil {
			return err
		}
	}
	return c.save()
}
