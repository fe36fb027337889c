package cluster

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"time"

	"github.com/varve-io/varve/e2e/csidriver"
)

// Up starts a cluster from the binaries in bin and returns once pods can run and volumes
// can be made. What a failure leaves stays for inspection until Down.
func Up(ctx context.Context, bin string, o Options, log *slog.Logger) (*Cluster, error) {
	if os.Geteuid() != 0 {
		return nil, errors.New("the cluster needs root: namespaces, loop devices, mounts")
	}
	if _, err := Open(ctx); err == nil {
		return nil, errors.New("a cluster is up already; take it down with make e2e-cluster-down")
	}
	if err := Down(ctx); err != nil { // what a crash may have left
		return nil, fmt.Errorf("clear the run directory: %w", err)
	}
	dir, err := RunDir()
	if err != nil {
		return nil, err
	}
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return nil, err
	}
	ctx, cancel := context.WithTimeout(ctx, startTimeout)
	defer cancel()
	start := time.Now()
	c := &Cluster{Options: o, Run: dir, Bin: bin, Drivers: map[string]*Driver{},
		Nodes: map[string]*Node{nodeName(1): {Name: nodeName(1), Number: 1}}}
	n := c.Control()
	for _, step := range []struct {
		name string
		do   func() error
	}{
		{"namespaces", func() error { return errors.Join(c.spawn(ctx, n), c.save()) }},
		{"certificates", c.makeCertificates},
		{"network", func() error { return errors.Join(c.link(ctx, n), c.configure(n)) }},
		{"control plane", func() error { return c.startControlPlane(ctx) }},
		{"container runtime and images", func() error { return c.startRuntime(ctx, n) }},
		{"node ready", func() error { return errors.Join(c.startKubelet(ctx, n), c.waitReady(ctx, n)) }},
		{"definitions and rights", func() error { return c.installManifests(ctx) }},
		{"CSI driver and sidecars", func() error {
			if err := c.startSnapshotController(ctx); err != nil {
				return err
			}
			_, err := c.AddDriver(ctx, DefaultDriver, csidriver.Options{})
			return err
		}},
		{"S3 server", func() error { return c.startS3(ctx) }},
	} {
		if err := step.do(); err != nil {
			return nil, fmt.Errorf("%s: %w (logs are in %s)", step.name, err, c.NodePath(n, "log"))
		}
		log.Info("up", "step", step.name, "after", time.Since(start).Round(10*time.Millisecond))
	}
	for i := 2; i <= o.Nodes; i++ {
		if _, err := c.AddNode(ctx, i); err != nil {
			return nil, err
		}
		log.Info("up", "step", nodeName(i), "after", time.Since(start).Round(10*time.Millisecond))
	}
	return c, nil
}

func (c *Cluster) startS3(ctx context.Context) error {
	m, err := render("s3.yaml", map[string]string{"Namespace": SystemNamespace, "Image": S3Image, "Node": c.Control().Name,
		"AccessKey": S3AccessKey, "SecretKey": S3SecretKey})
	if err != nil {
		return err
	}
	// A controller makes the account that pods run under, at some time.
	if err := until(ctx, "the namespace's service account", func(ctx context.Context) error {
		_, err := c.Kubectl(ctx, nil, "get", "serviceaccount", "default", "-n", SystemNamespace)
		return err
	}); err != nil {
		return err
	}
	if err := c.Apply(ctx, m); err != nil {
		return err
	}
	_, err = c.Kubectl(ctx, nil, "wait", "--for=condition=Ready", "--timeout=90s", "-n", SystemNamespace, "pod/s3")
	return err
}
