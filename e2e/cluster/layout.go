package cluster

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"hash/fnv"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"

	"github.com/varve-io/varve/e2e/cluster/supervisor"
)

// Names and addresses inside the cluster.
const (
	// DefaultDriver is the CSI driver every cluster has; its StorageClasses are
	// "e2e" (the default), "e2e-wffc" and "e2e-xfs", its snapshot classes "e2e".
	DefaultDriver = "e2e.csi.varve.io"
	// SystemNamespace holds the service accounts of the sidecars.
	SystemNamespace = "e2e-system"
	// ToolImage has busybox; pods of tests use it.
	ToolImage = "e2e.local/tool:1"
	// PauseImage is the sandbox of every pod.
	PauseImage = "e2e.local/pause:1"
	// S3Image is the S3 server.
	S3Image = "e2e.local/versitygw:1.8.0"
	// S3Endpoint is the S3 server as pods reach it; S3AccessKey and S3SecretKey open it.
	S3Endpoint  = "http://s3." + SystemNamespace + ".svc.cluster.local:7070"
	S3AccessKey = "e2e-access"
	S3SecretKey = "e2e-secret-key"

	serviceIP   = "10.96.0.1"
	serviceCIDR = "10.96.0.0/16"
	podCIDR     = "10.244.0.0/16"
)

// socketRoom is the part of a unix socket path's 107 bytes that the longest one below the
// run directory needs.
const socketRoom = 60

// Options says how a cluster is started.
type Options struct {
	// Nodes is how many nodes it has at first, 1 to 9.
	Nodes int `json:"nodes"`
	// DeviceOwnership sets containerd's device_ownership_from_security_context.
	DeviceOwnership bool `json:"deviceOwnership"`
}

// OptionsFromEnv reads VARVE_E2E_NODES and VARVE_E2E_DEVICE_OWNERSHIP.
func OptionsFromEnv() (Options, error) {
	o := Options{Nodes: 1}
	var err error
	if s := os.Getenv("VARVE_E2E_NODES"); s != "" {
		if o.Nodes, err = strconv.Atoi(s); err != nil || o.Nodes < 1 || o.Nodes > 9 {
			return o, fmt.Errorf("VARVE_E2E_NODES=%q: want a number from 1 to 9", s)
		}
	}
	if s := os.Getenv("VARVE_E2E_DEVICE_OWNERSHIP"); s != "" {
		if o.DeviceOwnership, err = strconv.ParseBool(s); err != nil {
			return o, fmt.Errorf("VARVE_E2E_DEVICE_OWNERSHIP=%q: want true or false", s)
		}
	}
	return o, nil
}

// CacheDir is where builds are kept: $VARVE_E2E_CACHE, else varve-e2e in the user's
// cache directory.
func CacheDir() (string, error) {
	if d := os.Getenv("VARVE_E2E_CACHE"); d != "" {
		return filepath.Abs(d)
	}
	d, err := os.UserCacheDir()
	return filepath.Join(d, "varve-e2e"), err
}

// RunDir is where a running cluster writes everything: $VARVE_E2E_RUN, else run in the
// cache directory.
func RunDir() (string, error) {
	d := os.Getenv("VARVE_E2E_RUN")
	if d == "" {
		c, err := CacheDir()
		if err != nil {
			return "", err
		}
		d = filepath.Join(c, "run")
	}
	d, err := filepath.Abs(d)
	if err != nil {
		return "", err
	}
	if len(d)+socketRoom > 107 {
		return "", fmt.Errorf("run directory %s is too long a path for unix sockets; set VARVE_E2E_RUN to a shorter one", d)
	}
	for _, hidden := range []string{"/run", "/var/run", "/proc", "/sys", "/opt", "/var/log", "/var/lib"} {
		if d == hidden || strings.HasPrefix(d, hidden+"/") {
			return "", fmt.Errorf("run directory %s lies where nodes mount their own %s; set VARVE_E2E_RUN to another one", d, hidden)
		}
	}
	return d, nil
}

// cgroupName is the cgroup that holds all of the cluster in a run directory.
func cgroupName(run string) string {
	h := fnv.New32a()
	_, _ = h.Write([]byte(run)) // never fails
	return fmt.Sprintf("varve-e2e-%08x", h.Sum32())
}

// Cluster is one that runs.
type Cluster struct {
	Options Options            `json:"options"`
	Run     string             `json:"run"` // the run directory
	Bin     string             `json:"bin"` // the binaries
	Nodes   map[string]*Node   `json:"nodes"`
	Drivers map[string]*Driver `json:"drivers"`
}

// Node is one set of namespaces.
type Node struct {
	Name string `json:"name"`
	// Number is 1 for the node with the control plane.
	Number int `json:"number"`
	// PID is that of the node's first process, in the machine's namespace.
	PID int `json:"pid"`
}

// IP is the node's address.
func (n *Node) IP() string { return fmt.Sprintf("10.99.0.%d", n.Number) }

// podRange is the node's part of the pod network.
func (n *Node) podRange() string { return fmt.Sprintf("10.244.%d.0/24", n.Number) }

func nodeName(number int) string { return fmt.Sprintf("e2e-%d", number) }

// Control is the node with the control plane.
func (c *Cluster) Control() *Node { return c.Nodes[nodeName(1)] }

// Path joins a path below the run directory.
func (c *Cluster) Path(elem ...string) string {
	return filepath.Join(append([]string{c.Run}, elem...)...)
}

// NodePath joins a path below a node's own directory.
func (c *Cluster) NodePath(n *Node, elem ...string) string {
	return c.Path(append([]string{n.Name}, elem...)...)
}

// Log is the log file of a process on a node.
func (c *Cluster) Log(n *Node, process string) string {
	return c.NodePath(n, "log", process+".log")
}

// Kubeconfig is the administrator's.
func (c *Cluster) Kubeconfig() string { return c.Path("admin.kubeconfig") }

// Supervisor speaks to a node's first process.
func (c *Cluster) Supervisor(n *Node) supervisor.Client {
	return supervisor.Client{Socket: c.NodePath(n, "init.sock")}
}

// Cgroup is the cgroup that holds all of a node, in every hierarchy of /sys/fs/cgroup.
func (c *Cluster) Cgroup(n *Node) string { return filepath.Join(cgroupName(c.Run), n.Name) }

func (c *Cluster) bin(name string) string { return filepath.Join(c.Bin, name) }

func (c *Cluster) nodeNames() []string {
	names := make([]string, 0, len(c.Nodes))
	for n := range c.Nodes {
		names = append(names, n)
	}
	slices.Sort(names)
	return names
}

// changing serialises changes of the cluster's record in this process: by parallel tests,
// each with its own Cluster.
var changing sync.Mutex

// change applies do to the current record, and writes it. Nodes and drivers that c has
// already stay the same objects.
func (c *Cluster) change(do func() error) error {
	changing.Lock()
	defer changing.Unlock()
	now, err := read()
	if err != nil {
		return err
	}
	update(c.Nodes, now.Nodes)
	update(c.Drivers, now.Drivers)
	if err := do(); err != nil {
		return err
	}
	return c.save()
}

func update[T any](have, now map[string]*T) {
	for name, v := range now {
		if old := have[name]; old != nil {
			*old = *v
		} else {
			have[name] = v
		}
	}
	maps.DeleteFunc(have, func(name string, _ *T) bool { return now[name] == nil })
}

func (c *Cluster) save() error {
	b, err := json.MarshalIndent(c, "", "  ")
	if err != nil {
		return err
	}
	tmp := c.Path("cluster.json.tmp")
	if err := os.WriteFile(tmp, b, 0o600); err != nil {
		return err
	}
	return os.Rename(tmp, c.Path("cluster.json"))
}

// ErrNotUp means that no cluster runs.
var ErrNotUp = errors.New("no cluster is up; run make e2e-cluster")

// Open finds the cluster that runs in the run directory.
func Open(ctx context.Context) (*Cluster, error) {
	c, err := read()
	if err != nil {
		return nil, err
	}
	if _, err := c.Supervisor(c.Control()).Status(ctx); err != nil {
		return nil, ErrNotUp
	}
	return c, nil
}

func read() (*Cluster, error) {
	run, err := RunDir()
	if err != nil {
		return nil, err
	}
	b, err := os.ReadFile(filepath.Join(run, "cluster.json"))
	if errors.Is(err, fs.ErrNotExist) {
		return nil, ErrNotUp
	}
	if err != nil {
		return nil, err
	}
	c := &Cluster{}
	if err := json.Unmarshal(b, c); err != nil {
		return nil, fmt.Errorf("read the cluster's record: %w", err)
	}
	if c.Control() == nil {
		return nil, fmt.Errorf("the cluster's record in %s has no first node; remove the directory", run)
	}
	return c, nil
}
