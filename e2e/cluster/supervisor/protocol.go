package supervisor

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"syscall"
)

// Process is one thing to run.
type Process struct {
	Name string   `json:"name"`
	Argv []string `json:"argv"`
	// Env is added to the supervisor's environment.
	Env []string `json:"env,omitempty"`
	// Log is the file to which its output is appended.
	Log string `json:"log"`
	// Restart restarts it when it ends by itself, as a kubelet would a container.
	Restart bool `json:"restart,omitempty"`
}

// Status is the state of a process.
type Status struct {
	Process
	// PID is in the node's PID namespace; 0 if it does not run.
	PID int `json:"pid"`
	// Exits counts how often it ended; Last says how.
	Exits int    `json:"exits"`
	Last  string `json:"last,omitempty"`
}

// Client talks to a supervisor's socket.
type Client struct{ Socket string }

// Start runs a process; none of that name may be running.
func (c Client) Start(ctx context.Context, p Process) error { return c.call(ctx, "start", p, nil) }

// Signal sends a signal and returns at once.
func (c Client) Signal(ctx context.Context, name string, sig syscall.Signal) error {
	return c.call(ctx, "signal", signalRequest{Name: name, Signal: int(sig)}, nil)
}

// Stop ends a process with a signal, waits for its end, and prevents a restart.
func (c Client) Stop(ctx context.Context, name string, sig syscall.Signal) error {
	return c.call(ctx, "stop", signalRequest{Name: name, Signal: int(sig)}, nil)
}

// Status returns the state of all processes ever started, by name.
func (c Client) Status(ctx context.Context) (map[string]Status, error) {
	var s map[string]Status
	return s, c.call(ctx, "status", struct{}{}, &s)
}

type signalRequest struct {
	Name   string `json:"name"`
	Signal int    `json:"signal"`
}

func (c Client) call(ctx context.Context, what string, in, out any) error {
	body, err := json.Marshal(in)
	if err != nil {
		return err
	}
	hc := http.Client{Transport: &http.Transport{DisableKeepAlives: true,
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			var d net.Dialer
			return d.DialContext(ctx, "unix", c.Socket)
		}}}
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, "http://supervisor/"+what, bytes.NewReader(body))
	if err != nil {
		return err
	}
	resp, err := hc.Do(req)
	if err != nil {
		return fmt.Errorf("ask the supervisor: %w", err)
	}
	defer func() { _ = resp.Body.Close() }()
	b, err := io.ReadAll(resp.Body)
	if err != nil {
		return err
	}
	if resp.StatusCode != http.StatusOK {
		return fmt.Errorf("supervisor: %s: %w", what, errors.New(string(bytes.TrimSpace(b))))
	}
	if out == nil {
		return nil
	}
	return json.Unmarshal(b, out)
}
