package cluster

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"time"
)

// Space selects the namespaces of a node in which a command runs.
type Space int

// In NetworkOnly a command sees the machine's files and processes and the node's
// network; in WholeNode everything is the node's.
const (
	NetworkOnly Space = iota
	WholeNode
)

// Enter is the argument vector that runs argv in a node's namespaces.
func (c *Cluster) Enter(n *Node, s Space, argv ...string) []string {
	// nsenter rather than ip netns exec, which would hide the cgroup mounts.
	out := []string{"nsenter", "-t", strconv.Itoa(n.PID), "-n"}
	if s == WholeNode {
		out = append(out, "-m", "-p", "-C", "-u", "-i")
	}
	return append(append(out, "--"), argv...)
}

// Exec runs a command in a node's namespaces and returns its standard output.
func (c *Cluster) Exec(ctx context.Context, n *Node, s Space, stdin io.Reader, argv ...string) (string, error) {
	argv = c.Enter(n, s, argv...)
	cmd := exec.CommandContext(ctx, argv[0], argv[1:]...)
	cmd.Stdin = stdin
	cmd.Env = append(os.Environ(), "KUBECONFIG="+c.Kubeconfig(), "PATH="+c.Bin+":"+os.Getenv("PATH"))
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	text := strings.TrimSpace(string(out))
	if err != nil {
		return text, fmt.Errorf("%s: %w: %s", strings.Join(argv, " "), err, bytes.TrimSpace(stderr.Bytes()))
	}
	return text, nil
}

// Kubectl runs kubectl as administrator.
func (c *Cluster) Kubectl(ctx context.Context, stdin io.Reader, args ...string) (string, error) {
	return c.Exec(ctx, c.Control(), NetworkOnly, stdin, append([]string{c.bin("kubectl")}, args...)...)
}

// Apply creates or changes objects given as YAML.
func (c *Cluster) Apply(ctx context.Context, yaml []byte) error {
	_, err := c.Kubectl(ctx, bytes.NewReader(yaml), "apply", "--server-side", "--force-conflicts", "-f", "-")
	return err
}

// until polls until the result is nil. A deadline ends it, with the last result.
func until(ctx context.Context, what string, ask func(context.Context) error) error {
	const pause = 50 * time.Millisecond
	for {
		err := ask(ctx)
		if err == nil {
			return nil
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("wait for %s: %w", what, errors.Join(err, ctx.Err()))
		case <-time.After(pause):
		}
	}
}
