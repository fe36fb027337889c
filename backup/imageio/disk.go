package imageio

import (
	"fmt"
	"io"
	"net/http"

	"github.com/varve-io/varve/internal/bytesize"
)

// Disk is the disk of a transfer, for reading. Safe for concurrent use, but for Close.
type Disk struct {
	client *client
	size   int64
	zeroes *runs // what reads as zeroes; nil if the service does not say
	notes  []string
}

// Size in bytes.
func (d *Disk) Size() int64 { return d.size }

// Notes are what the user should know.
func (d *Disk) Notes() []string { return d.notes }

// Connections is how many connections are used at most.
func (d *Disk) Connections() int { return d.client.transport.MaxConnsPerHost }

// TellsZeroes reports whether the service says where zeroes are.
func (d *Disk) TellsZeroes() bool { return d.zeroes != nil }

// CheckSize asks whether the disk still has the size that it had.
func (d *Disk) CheckSize() error {
	if d.size == 0 {
		return nil
	}
	now, err := d.client.size()
	if err == nil && now >= 0 && now != d.size {
		err = fmt.Errorf("%s: %w: it has %s now, and had %s", d.client.transfer, ErrSize, bytesize.Exact(now), bytesize.Exact(d.size))
	}
	return err
}

// Close ends the connections; the transfer stays, and is oVirt's to end.
func (d *Disk) Close() error {
	d.client.close()
	return nil
}

// maxRequest is the longest read or write, in bytes: what fails is repeated whole.
const maxRequest = 8 << 20

// ReadAt implements io.ReaderAt.
func (d *Disk) ReadAt(p []byte, off int64) (int, error) {
	if off < 0 {
		return 0, fmt.Errorf("read %s: negative offset %d", d.client.transfer, off)
	}
	var end error
	if rest := d.size - off; rest < int64(len(p)) {
		if rest <= 0 {
			return 0, io.EOF
		}
		p, end = p[:rest], io.EOF
	}
	for done := 0; done < len(p); {
		some := p[done:min(done+maxRequest, len(p))]
		at := off + int64(done)
		if err := d.client.repeat(func() error { return d.read(some, at) }); err != nil {
			return done, fmt.Errorf("read at %d: %w", at, err)
		}
		done += len(some)
	}
	return len(p), end
}

func (d *Disk) read(p []byte, off int64) error {
	last := off + int64(len(p)) - 1
	r := request{method: http.MethodGet, header: http.Header{"Range": {fmt.Sprintf("bytes=%d-%d", off, last)}}}
	return d.client.do(r, http.StatusPartialContent, func(resp *http.Response) error {
		of := resp.Header.Get("Content-Range")
		// The total may be left out: "*" (RFC 9110, 14.4).
		switch of {
		case fmt.Sprintf("bytes %d-%d/%d", off, last, d.size), fmt.Sprintf("bytes %d-%d/*", off, last):
		default:
			return fmt.Errorf("%w: asked for bytes %d to %d of %d, the answer is of %q", ErrSize, off, last, d.size, of)
		}
		if n := resp.ContentLength; n >= 0 && n != int64(len(p)) {
			return fmt.Errorf("%w: asked for %d bytes, got %d", ErrSize, len(p), n)
		}
		if _, err := io.ReadFull(resp.Body, p); err != nil {
			return fmt.Errorf("the answer ended early: %w", err)
		}
		// To its end, so that the connection can be used again.
		if n, _ := resp.Body.Read(make([]byte, 1)); n > 0 {
			return fmt.Errorf("%w: asked for %d bytes, got more", ErrSize, len(p))
		}
		return nil
	})
}

// DataRange returns the next range at or after off that does not read as zeroes, and io.EOF
// where there is none.
func (d *Disk) DataRange(off int64) (start, end int64, err error) {
	if off >= d.size {
		return 0, 0, io.EOF
	}
	if d.zeroes == nil {
		return off, d.size, nil
	}
	i := d.zeroes.at(off)
	if i < len(d.zeroes.ends) && d.zeroes.set(i) {
		off = d.zeroes.ends[i]
		i++
	}
	if off >= d.size || i >= len(d.zeroes.ends) {
		return 0, 0, io.EOF
	}
	return off, min(d.zeroes.ends[i], d.size), nil
}
