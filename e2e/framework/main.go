package framework

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"os/exec"
	"os/signal"
	"syscall"
	"testing"

	"github.com/varve-io/varve/e2e/cluster"
)

// These pass Main's decisions to the process that it becomes.
const (
	envInside = "VARVE_E2E_INSIDE"
	envOwn    = "VARVE_E2E_OWN"
	envWhyNot = "VARVE_E2E_WHY_NOT"
)

// Main runs a package's tests against a cluster. It does not return.
func Main(m *testing.M) {
	log := slog.New(slog.NewTextHandler(os.Stderr, nil))
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGINT, syscall.SIGTERM)
	defer stop()
	if os.Getenv(envInside) == "" && os.Getenv(envWhyNot) == "" {
		err := enter(ctx, log)
		if !errors.Is(err, cluster.ErrNotUp) {
			log.Error("no cluster to test with", "err", err)
			os.Exit(1)
		}
		_ = os.Setenv(envWhyNot, err.Error()+", or set VARVE_E2E_UP=1")
	}
	code := m.Run()
	if os.Getenv(envOwn) != "" {
		if err := cluster.Down(context.WithoutCancel(ctx)); err != nil {
			log.Error("take the cluster down", "err", err)
			code = 1
		}
	}
	os.Exit(code)
}

// enter becomes the same process in the network of a cluster's first node; it returns
// only if that is not possible.
func enter(ctx context.Context, log *slog.Logger) error {
	c, err := cluster.Open(ctx)
	env := append(os.Environ(), envInside+"=1")
	if errors.Is(err, cluster.ErrNotUp) && os.Getenv("VARVE_E2E_UP") == "1" {
		c, err = up(ctx, log)
		env = append(env, envOwn+"=1")
	}
	if err != nil {
		return err
	}
	self, err := os.Executable()
	if err != nil {
		return err
	}
	argv := c.Enter(c.Control(), cluster.NetworkOnly, append([]string{self}, os.Args[1:]...)...)
	path, err := exec.LookPath(argv[0])
	if err != nil {
		return err
	}
	return fmt.Errorf("enter the cluster's network: %w", syscall.Exec(path, argv, env))
}

func up(ctx context.Context, log *slog.Logger) (*cluster.Cluster, error) {
	src, err := cluster.FindSource()
	if err != nil {
		return nil, err
	}
	bin, err := cluster.Builder{Source: src, Log: log}.Build(ctx)
	if err != nil {
		return nil, err
	}
	o, err := cluster.OptionsFromEnv()
	if err != nil {
		return nil, err
	}
	return cluster.Up(ctx, bin, o, log)
}
