package cluster

import (
	"context"
	"encoding/base64"
	"errors"
	"fmt"
	"os"
	"strings"
	"syscall"

	"github.com/varve-io/varve/e2e/cluster/supervisor"
	"github.com/varve-io/varve/e2e/csidriver"
)

// Driver is one CSI driver with its sidecars.
type Driver struct {
	Name string `json:"name"`
	// Options at its start; csidriver.WriteOptions changes them while it runs.
	Options csidriver.Options `json:"options"`
	// Port is the metadata sidecar's.
	Port int `json:"port"`
}

// Class is the name of the driver's StorageClass, VolumeSnapshotClass and
// VolumeGroupSnapshotClass; "-wffc" and "-xfs" of it are StorageClasses too, bound on
// first use and with XFS.
func (d *Driver) Class() string {
	label, _, _ := strings.Cut(d.Name, ".")
	return label
}

// Audience is the audience of tokens for the metadata sidecar.
func (d *Driver) Audience() string { return d.Class() + "-snapshot-metadata" }

// DriverState is a driver's state directory.
func (c *Cluster) DriverState(d *Driver) string { return c.Path("csi", d.Class()) }

func (d *Driver) process(name string) string { return d.Class() + "." + name }

// sidecars are the processes beside the controller part of a driver.
func (c *Cluster) sidecars(d *Driver) []supervisor.Process {
	n := c.Control()
	socket := c.NodePath(n, "csi-"+d.Class()+".sock")
	common := func(name string, more ...string) supervisor.Process {
		return supervisor.Process{Name: d.process(name), Restart: true, Argv: append([]string{name, "--kubeconfig", c.Path(name + ".kubeconfig"),
			"--csi-address", socket, "--v=2"}, more...)}
	}
	// Long back-off would make tests wait for what is possible by then.
	retry := []string{"--leader-election=false", "--http-endpoint=", "--timeout=60s", "--retry-interval-start=500ms", "--retry-interval-max=5s"}
	provisioner := append([]string{"--extra-create-metadata", "--default-fstype=ext4",
		// A snapshot whose finalizer could not be removed at once waits this long.
		"--snapshot-orphan-sweep-interval=2s"}, retry...)
	if d.Options.NodeLocal {
		// The selected node or none: a source elsewhere is an error.
		provisioner = append(provisioner, "--strict-topology")
	}
	out := []supervisor.Process{
		common("csi-provisioner", provisioner...),
		common("csi-snapshotter", append([]string{"--extra-create-metadata", "--feature-gates=CSIVolumeGroupSnapshot=true"}, retry...)...),
		common("csi-resizer", retry...),
	}
	if d.Options.AttachRequired {
		out = append(out, common("csi-attacher", retry...))
	}
	if !d.Options.Metadata.Absent {
		out = append(out, common("csi-snapshot-metadata", "--tls-cert", c.Path("pki", "snapshot-metadata.crt"),
			"--tls-key", c.Path("pki", "snapshot-metadata.key"), "--port", fmt.Sprint(d.Port), "--http-endpoint", d.healthAddress()))
	}
	return out
}

func (d *Driver) healthAddress() string { return fmt.Sprintf("127.0.0.1:%d", d.Port+1000) }

func (c *Cluster) nodeDriver(d *Driver, n *Node) supervisor.Process {
	socket := c.NodePath(n, "csi-"+d.Class()+".sock")
	argv := []string{"e2ecsi", "--name", d.Name, "--node", n.Name, "--state", c.DriverState(d), "--endpoint", socket,
		"--registration", c.NodePath(n, "kubelet", "plugins_registry", d.Class()+".sock")}
	if n.Number == 1 {
		argv = append(argv, "--controller")
	}
	return supervisor.Process{Name: d.process("e2ecsi"), Argv: argv, Restart: true}
}

func (c *Cluster) driverManifest(d *Driver) ([]byte, error) {
	ca, err := os.ReadFile(c.Path("pki", "ca.crt"))
	if err != nil {
		return nil, err
	}
	type class struct {
		Name, Binding, FSType string
		Default               bool
	}
	const immediate, first = "Immediate", "WaitForFirstConsumer"
	secret := ""
	if d.Options.RequiredSecret != "" {
		secret = d.Class() + "-csi"
	}
	return render("driver.yaml", map[string]any{
		"Name": d.Name, "Class": d.Class(), "Namespace": SystemNamespace, "AttachRequired": d.Options.AttachRequired,
		"Classes": []class{
			{d.Class(), immediate, "ext4", d.Name == DefaultDriver},
			{d.Class() + "-wffc", first, "ext4", false},
			{d.Class() + "-xfs", immediate, "xfs", false},
		},
		"Secret": secret, "Token": d.Options.RequiredSecret,
		"SecretKinds": []string{"provisioner", "controller-publish", "node-stage", "controller-expand"},
		"Metadata":    !d.Options.Metadata.Absent, "Address": fmt.Sprintf("%s:%d", c.Control().IP(), d.Port),
		"Audience": d.Audience(), "CA": base64.StdEncoding.EncodeToString(ca),
	})
}

// AddDriver starts another driver with its sidecars and classes, and waits until every
// node has it.
func (c *Cluster) AddDriver(ctx context.Context, name string, o csidriver.Options) (*Driver, error) {
	ctx, cancel := context.WithTimeout(ctx, startTimeout)
	defer cancel()
	// Below the ports that the kernel gives to connections.
	d := &Driver{Name: name, Options: o, Port: 20051}
	if err := c.change(func() error {
		for _, other := range c.Drivers {
			if other.Class() == d.Class() {
				return fmt.Errorf("a driver %s runs already", other.Name)
			}
			d.Port = max(d.Port, other.Port+1)
		}
		c.Drivers[name] = d
		return nil
	}); err != nil {
		return nil, err
	}
	if err := os.MkdirAll(c.DriverState(d), 0o700); err != nil {
		return nil, err
	}
	if err := csidriver.WriteOptions(c.DriverState(d), o); err != nil {
		return nil, err
	}
	manifest, err := c.driverManifest(d)
	if err != nil {
		return nil, err
	}
	if err := c.Apply(ctx, manifest); err != nil {
		return nil, err
	}
	for _, node := range c.nodeNames() {
		if n := c.Nodes[node]; n.PID != 0 {
			if err := c.run(ctx, n, c.nodeDriver(d, n)); err != nil {
				return nil, err
			}
		}
	}
	socket := c.NodePath(c.Control(), "csi-"+d.Class()+".sock")
	if err := until(ctx, socket, func(context.Context) error { _, err := os.Stat(socket); return err }); err != nil {
		return nil, err
	}
	for _, p := range c.sidecars(d) {
		if err := c.run(ctx, c.Control(), p); err != nil {
			return nil, err
		}
	}
	for _, node := range c.nodeNames() {
		if n := c.Nodes[node]; n.PID != 0 {
			if err := c.waitRegistered(ctx, d, n); err != nil {
				return nil, err
			}
		}
	}
	if o.Metadata.Absent {
		return d, nil
	}
	return d, until(ctx, "the metadata sidecar of "+d.Name, func(ctx context.Context) error {
		_, err := c.Exec(ctx, c.Control(), NetworkOnly, nil, "curl", "-sf", "--max-time", "2", "http://"+d.healthAddress()+"/health")
		return err
	})
}

func (c *Cluster) waitRegistered(ctx context.Context, d *Driver, n *Node) error {
	return until(ctx, "driver "+d.Name+" on "+n.Name, func(ctx context.Context) error {
		names, err := c.Kubectl(ctx, nil, "get", "csinode", n.Name, "-o", "jsonpath={.spec.drivers[*].name}")
		if err == nil && !strings.Contains(" "+names+" ", " "+d.Name+" ") {
			err = fmt.Errorf("the node has %q", names)
		}
		return err
	})
}

func (c *Cluster) startNodeDrivers(ctx context.Context, n *Node) error {
	for _, d := range c.Drivers {
		if err := c.run(ctx, n, c.nodeDriver(d, n)); err != nil {
			return err
		}
		if err := c.waitRegistered(ctx, d, n); err != nil {
			return err
		}
	}
	return nil
}

// RemoveDriver ends a driver. Its volumes should be deleted; any that are left are
// deleted with its state.
func (c *Cluster) RemoveDriver(ctx context.Context, d *Driver) error {
	var errs []error
	manifest, err := c.driverManifest(d)
	if err != nil {
		return err
	}
	_, err = c.Kubectl(ctx, strings.NewReader(string(manifest)), "delete", "--ignore-not-found", "--wait=false", "-f", "-")
	errs = append(errs, err)
	for _, p := range c.sidecars(d) {
		errs = append(errs, c.Supervisor(c.Control()).Stop(ctx, p.Name, syscall.SIGKILL))
	}
	for _, node := range c.nodeNames() {
		if n := c.Nodes[node]; n.PID != 0 {
			errs = append(errs, c.Supervisor(n).Stop(ctx, d.process("e2ecsi"), syscall.SIGTERM))
		}
	}
	loops, err := loopDevices(ctx, c.DriverState(d)+"/")
	errs = append(errs, err, detachLoops(ctx, loops), os.RemoveAll(c.DriverState(d)))
	return errors.Join(append(errs, c.change(func() error {
		delete(c.Drivers, d.Name)
		return nil
	}))...)
}
