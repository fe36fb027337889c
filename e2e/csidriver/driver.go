package csidriver

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	registration "k8s.io/kubelet/pkg/apis/pluginregistration/v1"
)

// Config is the configuration of a driver process.
type Config struct {
	Name  string // the driver's name, as in CSIDriver objects
	Node  string // the node this process serves
	State string // directory shared by all processes of the driver
	// Endpoint is the CSI socket's path.
	Endpoint string
	// Registration is a socket's path in the kubelet's plugins_registry directory;
	// empty: do not register.
	Registration string
	// Controller adds the controller services.
	Controller bool
	Log        *slog.Logger
}

// Driver answers the CSI services of one process.
type Driver struct {
	csi.UnimplementedIdentityServer
	csi.UnimplementedControllerServer
	csi.UnimplementedGroupControllerServer
	csi.UnimplementedNodeServer
	csi.UnimplementedSnapshotMetadataServer
	registration.UnimplementedRegistrationServer

	cfg         Config
	state       *state
	busy        inFlight
	failedCalls atomic.Int64
	frozen      frozenPaths
}

// New prepares a driver; Run serves it.
func New(cfg Config) (*Driver, error) {
	if cfg.Name == "" || cfg.Node == "" || cfg.State == "" || cfg.Endpoint == "" {
		return nil, errors.New("a driver needs a name, a node, a state directory and an endpoint")
	}
	if cfg.Log == nil {
		cfg.Log = slog.New(slog.DiscardHandler)
	}
	if err := os.MkdirAll(filepath.Join(cfg.State, "nodes"), 0o700); err != nil {
		return nil, err
	}
	d := &Driver{cfg: cfg, state: &state{dir: cfg.State}}
	if _, err := d.options(); err != nil {
		return nil, err
	}
	return d, nil
}

// Run serves until the context ends, then thaws what is still frozen.
func (d *Driver) Run(ctx context.Context) error {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	var serving sync.WaitGroup
	defer serving.Wait()
	serve := func(path string, register func(grpc.ServiceRegistrar)) error {
		l, err := listenUnix(path)
		if err != nil {
			return err
		}
		s := grpc.NewServer(grpc.UnaryInterceptor(d.logUnary), grpc.StreamInterceptor(d.logStream))
		register(s)
		serving.Go(func() {
			if err := s.Serve(l); err != nil {
				cancel(fmt.Errorf("serve %s: %w", path, err))
			}
		})
		context.AfterFunc(ctx, s.Stop)
		return nil
	}
	stopAgent, err := d.serveAgent()
	if err != nil {
		return err
	}
	defer stopAgent()
	if err := serve(d.cfg.Endpoint, func(s grpc.ServiceRegistrar) {
		csi.RegisterIdentityServer(s, d)
		csi.RegisterNodeServer(s, d)
		if d.cfg.Controller {
			csi.RegisterControllerServer(s, d)
			csi.RegisterGroupControllerServer(s, d)
			csi.RegisterSnapshotMetadataServer(s, d)
		}
	}); err != nil {
		return err
	}
	if d.cfg.Registration != "" {
		// With a leftover socket the kubelet would call a driver that has ended.
		defer func() { _ = os.Remove(d.cfg.Registration) }()
		if err := serve(d.cfg.Registration, func(s grpc.ServiceRegistrar) {
			registration.RegisterRegistrationServer(s, d)
		}); err != nil {
			return err
		}
	}
	<-ctx.Done()
	if err := context.Cause(ctx); !errors.Is(err, context.Canceled) {
		return err
	}
	return nil
}

func (d *Driver) options() (Options, error) {
	o, err := ReadOptions(d.cfg.State)
	if err != nil {
		return o, status.Error(codes.Internal, err.Error())
	}
	return o, nil
}

func (o Options) checkSecret(s map[string]string) error {
	if o.RequiredSecret != "" && s["token"] != o.RequiredSecret {
		return status.Error(codes.Unauthenticated, `the secret "token" is missing or wrong`)
	}
	return nil
}

func (d *Driver) begin(key string) (func(), error) {
	end, ok := d.busy.begin(key)
	if !ok {
		return nil, status.Errorf(codes.Aborted, "an operation on %s is under way", key)
	}
	return end, nil
}

// internal turns a plain error into a gRPC one; errors with a code keep it.
func internal(err error) error {
	if err == nil {
		return nil
	}
	if _, ok := status.FromError(err); ok {
		return err
	}
	return status.Error(codes.Internal, err.Error())
}

func listenUnix(path string) (net.Listener, error) {
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		return nil, err
	}
	if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, err
	}
	return net.Listen("unix", path)
}

func (d *Driver) logUnary(ctx context.Context, req any, i *grpc.UnaryServerInfo, h grpc.UnaryHandler) (any, error) {
	start := time.Now()
	resp, err := h(ctx, req)
	asked := strings.HasSuffix(i.FullMethod, "Probe") || strings.Contains(i.FullMethod, "Capabilities") // all the time
	if err != nil || !asked {
		d.cfg.Log.Info("call", "method", i.FullMethod, "took", time.Since(start), "err", err)
	}
	return resp, err
}

func (d *Driver) logStream(srv any, ss grpc.ServerStream, i *grpc.StreamServerInfo, h grpc.StreamHandler) error {
	start := time.Now()
	err := h(srv, ss)
	d.cfg.Log.Info("stream", "method", i.FullMethod, "took", time.Since(start), "err", err)
	return err
}
