package nbdserver

import (
	"time"

	"github.com/varve-io/varve/nbdserver/proto"
)

// Metrics counts what the server does. Its methods are called concurrently and must not
// block.
type Metrics interface {
	// Connected is called when a client enters transmission on an export.
	Connected(export string) ExportMetrics
}

// ExportMetrics counts one connection's requests on its export.
type ExportMetrics interface {
	// Request reports an answered request: the bytes of its range, the time
	// from reading it to queueing its reply, and its error number (0: none).
	Request(cmd proto.Command, bytes int64, took time.Duration, errno proto.Errno)
	// Disconnected is the last call.
	Disconnected()
}
