// e2e-cluster runs the cluster of the end-to-end tests (package cluster):
//
//	e2e-cluster build          make the binaries and images, if they are not there
//	e2e-cluster up             build, then start
//	e2e-cluster down           end it and free everything
//	e2e-cluster kubectl ...    kubectl as administrator
//	e2e-cluster exec CMD ...   run a command in the first node's network
//	e2e-cluster node add N     start one more node
//	e2e-cluster node lose N    end one without warning
//	e2e-cluster image FILE     bring an OCI archive to every node
//
// VARVE_E2E_NODES, VARVE_E2E_DEVICE_OWNERSHIP, VARVE_E2E_CACHE and VARVE_E2E_RUN
// are described in docs/e2e.md.
package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"strconv"
	"syscall"

	"github.com/varve-io/varve/e2e/cluster"
	"github.com/varve-io/varve/e2e/cluster/supervisor"
)

// exitCode is that of a command run for the user, who has seen its message.
type exitCode int

func (c exitCode) Error() string { return fmt.Sprintf("exit status %d", int(c)) }

func main() {
	log := slog.New(slog.NewTextHandler(os.Stderr, nil))
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGINT, syscall.SIGTERM)
	defer stop()
	if err := run(ctx, os.Args[1:], log); err != nil {
		var code exitCode
		if errors.As(err, &code) {
			os.Exit(int(code))
		}
		log.Error("e2e-cluster", "err", err)
		os.Exit(1)
	}
}

func run(ctx context.Context, args []string, log *slog.Logger) error {
	if len(args) == 0 {
		return errors.New("say what to do: build, warm, up, down, kubectl, exec, node or image")
	}
	switch args[0] {
	case "node-enter": // GROUP NAME DIR SOCKET, in new namespaces
		if len(args) != 5 {
			return errors.New("node-enter is for the cluster's own use")
		}
		self, err := os.Executable()
		if err != nil {
			return err
		}
		return supervisor.EnterCgroup(args[1], []string{self, "node-init", args[2], args[3], args[4]})
	case "node-init": // NAME DIR SOCKET, as first process of a node
		if len(args) != 4 {
			return errors.New("node-init is for the cluster's own use")
		}
		if err := supervisor.PrepareNode(args[1], args[2]); err != nil {
			return err
		}
		return supervisor.Serve(args[3], log)
	case "down":
		return cluster.Down(ctx)
	case "build", "up":
		return buildOrUp(ctx, args[0], log)
	}
	c, err := cluster.Open(ctx)
	if err != nil {
		return err
	}
	switch args[0] {
	case "kubectl", "exec":
		argv := c.Enter(c.Control(), cluster.NetworkOnly, args[1:]...)
		if args[0] == "kubectl" {
			argv = c.Enter(c.Control(), cluster.NetworkOnly, append([]string{c.Bin + "/kubectl"}, args[1:]...)...)
		}
		cmd := exec.Command(argv[0], argv[1:]...)
		cmd.Stdin, cmd.Stdout, cmd.Stderr = os.Stdin, os.Stdout, os.Stderr
		cmd.Env = append(os.Environ(), "KUBECONFIG="+c.Kubeconfig())
		err := cmd.Run()
		var exit *exec.ExitError
		if errors.As(err, &exit) && exit.ExitCode() > 0 {
			return exitCode(exit.ExitCode())
		}
		return err
	case "image":
		if len(args) != 2 {
			return errors.New("image wants one archive")
		}
		archive, err := filepath.Abs(args[1])
		if err != nil {
			return err
		}
		return c.ImportImage(ctx, archive)
	case "node":
		return node(ctx, c, args[1:])
	}
	return fmt.Errorf("%q is nothing this can do", args[0])
}

func buildOrUp(ctx context.Context, what string, log *slog.Logger) error {
	src, err := cluster.FindSource()
	if err != nil {
		return err
	}
	b := cluster.Builder{Source: src, Log: log}
	bin, err := b.Build(ctx)
	if err != nil || what == "build" {
		return err
	}
	o, err := cluster.OptionsFromEnv()
	if err != nil {
		return err
	}
	c, err := cluster.Up(ctx, bin, o, log)
	if err != nil {
		return err
	}
	log.Info("the cluster is up; e2e-cluster kubectl reaches it", "command", bin+"/e2e-cluster", "run", c.Run)
	return nil
}

func node(ctx context.Context, c *cluster.Cluster, args []string) error {
	if len(args) != 2 {
		return errors.New("want: node add N, or node lose N")
	}
	number, err := strconv.Atoi(args[1])
	if err != nil {
		return err
	}
	switch args[0] {
	case "add":
		_, err = c.AddNode(ctx, number)
		return err
	case "lose":
		n := c.Nodes[fmt.Sprintf("e2e-%d", number)]
		if n == nil {
			return fmt.Errorf("there is no node %d", number)
		}
		return c.LoseNode(ctx, n)
	}
	return fmt.Errorf("%q is nothing to do with a node", args[0])
}
