package points

import (
	"encoding/json"
	"strings"
	"testing"

	"github.com/varve-io/varve/internal/plain"
)

func FuzzNotes(f *testing.F) {
	id := strings.Repeat("ab", 16)
	for _, s := range []string{
		`{"point":"` + id + `","pid":1,"purpose":"serve","since":"2026-11-20T10:00:00Z","expires":"2026-11-20T10:00:00Z"}`,
		`{"point":"maintenance","pid":1}`, `{"point":"` + id + `","reason":"x","first":["a"],"read":0.5}`, `{"point":"../x"}`, `[]`,
	} {
		f.Add([]byte(s), id)
	}
	f.Fuzz(func(t *testing.T, p []byte, label string) {
		if l, err := decodeNote[LeaseInfo](p, label); err == nil {
			checkNote(t, l, l.Point, l.String())
		} else if len(err.Error()) > 2000 {
			t.Fatalf("error of %d bytes", len(err.Error()))
		}
		if q, err := decodeNote[Quarantine](p, label); err == nil {
			checkNote(t, q, q.Point, q.Reason)
		}
	})
}

func checkNote(t *testing.T, n any, texts ...string) {
	t.Helper()
	for _, s := range texts {
		if !plain.Is(s) {
			t.Fatalf("%q is left as it was", s)
		}
	}
	if _, err := json.Marshal(n); err != nil {
		t.Fatal(err)
	}
}
