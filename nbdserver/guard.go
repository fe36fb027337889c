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

// guard runs f. A panic, of the export most likely, becomes an error and ends this
// connection: others may have nothing to do with it.
func (c *conn) guard(f func() error) (err error) {
	defer func() {
		if p := recover(); p != nil {
			err = panicked(p)
			c.drop(err)
		}
	}()
	return f()
}

// drop ends the connection without an answer to what is in flight.
func (c *conn) drop(err error) {
	c.cancel(err)
	_ = c.socket.Close()
}

// logPanic tells the log of a panic that ended the connection, if one did.
func (c *conn) logPanic() {
	var p *panicError
	if errors.As(context.Cause(c.ctx), &p) {
		c.log.Error("a panic ended the connection of a client", "panic", fmt.Sprint(p.value), "stack", string(p.stack))
	}
}
