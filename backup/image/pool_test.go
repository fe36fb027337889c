package image

import (
	"context"
	"testing"
)

// A task that panics takes neither its worker nor the process with it.
func TestPoolOutlivesPanics(t *testing.T) {
	p := newPool(1)
	defer p.close()
	done := make(chan struct{})
	p.submit(true, func(context.Context) { panic("bad block") })
	p.submit(true, func(context.Context) { close(done) })
	<-done
}
