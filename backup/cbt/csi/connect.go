package csi

import (
	"context"
	"crypto/tls"
	"fmt"
	"net"
	"sync"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/keepalive"
)

// DialFunc opens a TCP connection.
type DialFunc func(ctx context.Context, network, address string) (net.Conn, error)

const (
	// tcpIdle, tcpInterval and tcpProbes find a dead peer within a minute and a half.
	tcpIdle     = 30 * time.Second
	tcpInterval = 10 * time.Second
	tcpProbes   = 6

	// pingAfter is above the five minutes below which a gRPC server with defaults, as the
	// sidecar, disconnects clients that ping.
	pingAfter   = 6 * time.Minute
	pingTimeout = 30 * time.Second
)

func dial(ctx context.Context, network, address string) (net.Conn, error) {
	d := net.Dialer{KeepAliveConfig: net.KeepAliveConfig{Enable: true, Idle: tcpIdle, Interval: tcpInterval, Count: tcpProbes}}
	return d.DialContext(ctx, network, address)
}

// connect prepares the connection; it is made by the first call.
func connect(o Options, troubles *troubles) (*grpc.ClientConn, error) {
	pool, err := o.Endpoint.pool()
	if err != nil {
		return nil, err
	}

	conn, err := grpc.NewClient("dns:///"+o.Endpoint.Address,
		grpc.WithTransportCredentials(watchedCredentials{
			TransportCredentials: credentials.NewTLS(&tls.Config{RootCAs: pool, MinVersion: tls.VersionTLS12}),
			troubles:             troubles,
		}),
		grpc.WithContextDialer(func(ctx context.Context, address string) (net.Conn, error) {
			c, err := o.Dialer(ctx, "tcp", address)
			if err != nil {
				troubles.note(err)
			}
			return c, err
		}),
		grpc.WithDisableServiceConfig(), // no retry settings from DNS
		grpc.WithDisableRetry(),
		grpc.WithNoProxy(),
		grpc.WithDefaultCallOptions(grpc.MaxCallRecvMsgSize(maxMessage)),
		grpc.WithKeepaliveParams(keepalive.ClientParameters{Time: pingAfter, Timeout: pingTimeout}),
		grpc.WithConnectParams(grpc.ConnectParams{MinConnectTimeout: 20 * time.Second}),
		grpc.WithUserAgent("varve"),
	)
	if err != nil {
		return nil, fmt.Errorf("connect to %s: %w", o.Endpoint.Address, err)
	}
	return conn, nil
}

// troubles records why a connection could not be made; nil once it was. The status of a call
// has that only as text.
type troubles struct {
	mu   sync.Mutex
	last error
}

func (t *troubles) note(err error) {
	t.mu.Lock()
	defer t.mu.Unlock()

	t.last = err
}

func (t *troubles) get() error {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.last
}

// watchedCredentials record the result of the TLS handshake.
type watchedCredentials struct {
	credentials.TransportCredentials
	troubles *troubles
}

func (w watchedCredentials) ClientHandshake(ctx context.Context, authority string, c net.Conn) (net.Conn, credentials.AuthInfo, error) {
	conn, info, err := w.TransportCredentials.ClientHandshake(ctx, authority, c)
	w.troubles.note(err)
	return conn, info, err
}

func (w watchedCredentials) Clone() credentials.TransportCredentials {
	return watchedCredentials{w.TransportCredentials.Clone(), w.troubles}
}
