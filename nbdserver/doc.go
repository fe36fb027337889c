// Package nbdserver serves block exports over the NBD protocol: fixed newstyle negotiation,
// TLS, structured replies, metadata contexts, extended headers and many requests in flight,
// answered out of order.
//
// The package does not know where bytes come from. A caller provides a [Catalog], which lists
// and opens exports by name, and each [Export] has a size, ReadAt and Extents. Everything
// else is a capability: an interface of one purpose that an export may also implement.
//
//	Writer       the export can be written, flushed, trimmed and zeroed
//	Lender       bytes already in memory are sent without a copy
//	Prefetcher   CACHE requests reach the store
//	Statuser     metadata contexts beyond base:allocation
//
// # One connection
//
// A goroutine per connection reads requests. A read whose bytes can be lent at once is
// answered immediately: its reply joins the outbox, which is written with one writev as soon
// as no further request is waiting in the input buffer. Every other request runs on a worker
// of the connection, so that slow ones do not delay fast ones.
//
// # Memory
//
// A request takes its memory from the connection's budget and, beyond a small reserve of each
// connection, from the server's; it is returned when the reply has been handed to the kernel.
// A client that does not read its replies is no longer read, and is dropped after
// [Config.StallTimeout].
//
// # Errors
//
// An export's error becomes an NBD error number by [proto.Errno], syscall.Errno or EIO; with
// structured replies its text reaches the client with the offset of the error, and the
// connection continues.
//
// docs/nbd-protocol.md lists what is supported of the protocol.
package nbdserver
