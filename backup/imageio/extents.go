package imageio

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"sort"

	"github.com/varve-io/varve/backup/cbt"
)

// Contexts of a list of extents.
const (
	zeroContext  = "zero"
	dirtyContext = "dirty"
)

var (
	// errNoContext means that the service has no such list: 404.
	errNoContext = errors.New("the service has no such list of extents")
	// errMalformed means that an answer is not what the protocol has.
	errMalformed = errors.New("malformed answer")
)

// maxRuns bounds a list in memory, at 8 bytes a run: 16 Mi runs of the 64 KiB that bitmaps
// are made of are 1 TiB in the worst case.
const maxRuns = 16 << 20

// runs are ranges that cover a disk from its start, set and not set in turn.
type runs struct {
	first bool    // whether the first run is set
	ends  []int64 // offsets in bytes, ascending
}

// add appends a range; neighbours of one kind are joined.
func (r *runs) add(length int64, set bool) error {
	switch n := len(r.ends); {
	case n == 0:
		r.first = set
	case r.set(n-1) == set:
		r.ends[n-1] += length
		return nil
	case n == maxRuns:
		return &cbt.Error{Source: sourceName, Kind: cbt.ErrTooScattered, Detail: fmt.Sprintf("the disk is in more than %d pieces", maxRuns)}
	}
	r.ends = append(r.ends, r.size()+length)
	return nil
}

// set says whether run i is set.
func (r *runs) set(i int) bool { return r.first == (i%2 == 0) }

// size is where the last run ends.
func (r *runs) size() int64 {
	if len(r.ends) == 0 {
		return 0
	}
	return r.ends[len(r.ends)-1]
}

// at is the index of the run that has the byte at off.
func (r *runs) at(off int64) int {
	return sort.Search(len(r.ends), func(i int) bool { return r.ends[i] > off })
}

// element is an extent of either list.
type element struct {
	Start  *int64 `json:"start"`
	Length *int64 `json:"length"`
	Zero   *bool  `json:"zero"`
	Hole   *bool  `json:"hole"`
	Dirty  *bool  `json:"dirty"`
}

// extents asks for a list: where the disk reads as zeroes or, in the dirty context, what
// was written, with the zeroes too if the service tells (since 2.2).
func (d *Disk) extents(name string) (set, zeroes *runs, err error) {
	cut := 0
	err = d.client.repeat(func() error {
		for {
			err := d.client.do(request{method: http.MethodGet, suffix: "/extents?context=" + name}, http.StatusOK, func(resp *http.Response) (err error) {
				set, zeroes, err = parseExtents(resp.Body, name)
				if err == nil && d.size > 0 && set.size() < d.size {
					err = fmt.Errorf("%w: the list of extents ends at %d of %d bytes", errAgain, set.size(), d.size)
				}
				return err
			})
			// A list that ends early may be whole the next time; one that always does is a lie.
			if cut++; !errors.Is(err, errAgain) || cut > 8 {
				return err
			}
		}
	})
	var status *StatusError
	if errors.As(err, &status) && status.Status == http.StatusNotFound {
		err = fmt.Errorf("%w: %w", errNoContext, err)
	}
	if err != nil {
		return nil, nil, err
	}
	return set, zeroes, nil
}

// parseExtents reads a list, which covers the disk in order and without gaps. In the zero
// context set are the zeroes. Errors are those of a list (cbt.Err...) or of reading it.
func parseExtents(r io.Reader, name string) (set, zeroes *runs, err error) {
	set, zeroes = &runs{}, &runs{}
	limit := &elementLimit{r: r}
	dec := json.NewDecoder(limit)
	refuse := func(kind error, format string, args ...any) error {
		return fmt.Errorf("%w: %w", errMalformed, &cbt.Error{Source: sourceName, Kind: kind, Detail: fmt.Sprintf(format, args...)})
	}
	broken := func(err error) error {
		var syntax *json.SyntaxError
		var kind *json.UnmarshalTypeError
		if errors.As(err, &syntax) || errors.As(err, &kind) || errors.Is(err, errLong) {
			return refuse(cbt.ErrFormat, "the list of extents: %v", err)
		}
		return fmt.Errorf("the list of extents is cut off: %w", err)
	}
	if start, err := dec.Token(); err != nil {
		return nil, nil, broken(err)
	} else if start != json.Delim('[') {
		return nil, nil, refuse(cbt.ErrFormat, "the list of extents is no JSON array")
	}
	tells := true
	for n := 1; dec.More(); n++ {
		var e element
		if err := dec.Decode(&e); err != nil {
			return nil, nil, broken(err)
		}
		end := set.size()
		switch {
		case e.Start == nil, e.Length == nil, name == dirtyContext && e.Dirty == nil, name == zeroContext && e.Zero == nil:
			return nil, nil, refuse(cbt.ErrFormat, "extent %d lacks a field", n)
		case *e.Start < 0, *e.Length <= 0, *e.Length > 1<<62-*e.Start:
			return nil, nil, refuse(cbt.ErrOutOfRange, "extent %d is at %d, of %d bytes", n, *e.Start, *e.Length)
		case *e.Start < end:
			return nil, nil, refuse(cbt.ErrOverlap, "extent %d begins at %d, before the end of the one before, %d", n, *e.Start, end)
		case *e.Start > end:
			return nil, nil, refuse(cbt.ErrFormat, "nothing is said of bytes %d to %d", end, *e.Start)
		case e.Hole != nil && *e.Hole && e.Zero != nil && !*e.Zero:
			return nil, nil, ErrHidden
		}
		tells = tells && e.Zero != nil
		is, zero := e.Dirty, e.Zero
		if name == zeroContext {
			is = e.Zero
		}
		if err := set.add(*e.Length, *is); err != nil {
			return nil, nil, err
		}
		if tells {
			if err := zeroes.add(*e.Length, *zero); err != nil {
				return nil, nil, err
			}
		}
	}
	if _, err := dec.Token(); err != nil {
		return nil, nil, broken(err)
	}
	if !tells {
		zeroes = nil
	}
	return set, zeroes, nil
}

// elementLimit ends a list that continues for long without the end of an element.
type elementLimit struct {
	r       io.Reader
	without int
}

const maxElement = 64 << 10

var errLong = fmt.Errorf("an element is longer than %d bytes", maxElement)

func (l *elementLimit) Read(p []byte) (int, error) {
	n, err := l.r.Read(p[:min(len(p), 4<<10)])
	l.without += n
	for i := n - 1; i >= 0; i-- {
		if p[i] == '}' {
			l.without = n - i
			break
		}
	}
	if l.without > maxElement {
		return 0, errLong
	}
	return n, err
}
