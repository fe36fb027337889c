package nbdserver

import (
	"math/bits"
	"sync"
)

// Payload buffers come in powers of two from 4 KiB to MaxPayload, so that a
// request's memory is known from its length alone.
const (
	minBufferBits = 12
	maxBufferBits = 25
)

// buffer is a pooled payload buffer.
type buffer struct {
	b     []byte // requested length, capacity of its class
	class int
}

var bufferPools [maxBufferBits - minBufferBits + 1]sync.Pool

// bufferClass returns the class whose buffers hold n bytes.
func bufferClass(n int) int {
	if n <= 1<<minBufferBits {
		return 0
	}
	return bits.Len(uint(n-1)) - minBufferBits
}

// bufferCost returns the real size of a buffer for n bytes.
func bufferCost(n int) int64 { return 1 << (bufferClass(n) + minBufferBits) }

// getBuffer returns a buffer of n bytes, at most MaxPayload, with old content.
func getBuffer(n int) *buffer {
	class := bufferClass(n)
	if v := bufferPools[class].Get(); v != nil {
		b := v.(*buffer)
		b.b = b.b[:n]
		return b
	}
	return &buffer{b: make([]byte, n, 1<<(class+minBufferBits)), class: class}
}

// Release returns the buffer to the pool.
func (b *buffer) Release() { bufferPools[b.class].Put(b) }

var _ Releaser = (*buffer)(nil)
