package imageiotest

import (
	"bytes"
	"encoding/json"
	"net/http"
	"strings"
)

// Extent is an element of either list.
type Extent struct {
	Start  int64 `json:"start"`
	Length int64 `json:"length"`
	Zero   bool  `json:"zero"`
	Hole   *bool `json:"hole,omitempty"`
	Dirty  *bool `json:"dirty,omitempty"`
}

// grain is how finely zeroes are looked for, in bytes.
const grain = 512

func (s *Server) extents(w http.ResponseWriter, r *http.Request) {
	name := r.URL.Query().Get("context")
	if name == "dirty" && s.cfg.Dirty == nil {
		Fail(w, http.StatusNotFound, "Ticket does not support dirty extents")
		return
	}
	list := s.List(name == "dirty")
	w.Header().Set("Content-Type", "application/json")
	_ = json.NewEncoder(w).Encode(list)
}

// List is a list of extents as the service answers it.
func (s *Server) List(dirty bool) []Extent {
	s.mu.Lock()
	defer s.mu.Unlock()
	size, out := int64(len(s.cache)), []Extent{}
	for off := int64(0); off < size; {
		end := min(off+grain-off%grain, size)
		for _, r := range s.cfg.Dirty { // which begin and end anywhere
			for _, edge := range []int64{r.Offset, r.Offset + r.Length} {
				if dirty && off < edge && edge < end {
					end = edge
				}
			}
		}
		wrote, zero := s.wrote(off), bytes.Count(s.cache[off:end], []byte{0}) == int(end-off)
		n := len(out)
		same := n > 0 && out[n-1].Zero == zero && (!dirty || *out[n-1].Dirty == wrote)
		if same && (s.cfg.Pieces == 0 || out[n-1].Length+end-off <= s.cfg.Pieces) {
			out[n-1].Length += end - off
		} else {
			e := Extent{Start: off, Length: end - off, Zero: zero}
			if dirty {
				e.Dirty = &wrote
			} else {
				e.Hole = &zero // as of a thin disk without backing file: it hides nothing
			}
			out = append(out, e)
		}
		off = end
	}
	return out
}

func (s *Server) wrote(off int64) bool {
	for _, r := range s.cfg.Dirty {
		if off >= r.Offset && off < r.Offset+r.Length {
			return true
		}
	}
	return false
}

// AnswerExtents is a hook that answers each list of extents with this one.
func AnswerExtents(list []Extent) func(*Server, http.ResponseWriter, *http.Request, int) bool {
	return func(_ *Server, w http.ResponseWriter, r *http.Request, _ int) bool {
		if !strings.HasSuffix(r.URL.Path, "/extents") {
			return false
		}
		_ = json.NewEncoder(w).Encode(list)
		return true
	}
}
