package nbdserver

import (
	"context"
	"errors"
	"fmt"
	"runtime/debug"
)

// panicError is a panic that ends one connection.
type panicError struct {
	value any
	stack []byte
}

func (e *panicError) Error() string { return fmt.Sprintf("panic: %v", e.value) }

// panicked makes an error of what recover returned.
func panicked(value any) error { return &panicError{value: value, stack: debug.Stack()} }

// guard runs f. A panic, most likely of the export, becomes an error and ends this connection
// only.
func (c *conn) guard(f func() error) (err error) {
	defer func() {
		if p := recover(); p != nil {
			err = panicked(p)
			c.drop(err)
		}
	}()
	return f()
}

// drop ends the connection without a reply to requests in flight.
func (c *conn) drop(err error) {
	c.cancel(err)
	_ = c.socket.Close()
}

// logPanic logs the panic that ended the connection, if one did.
func (c *conn) logPanic() {
	var p *panicError
	if errors.As(context.Cause(c.ctx), &p) {
		c.log.Error("a panic ended the connection of a client", "panic", fmt.Sprint(p.value), "stack", string(p.stack))
	}
}
