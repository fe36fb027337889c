package hold

import (
	"bytes"
	"strings"
	"testing"
)

// A pod may print anything: it is bounded, and never counts as the answer of another.
func FuzzOutput(f *testing.F) {
	const nonce = "00112233445566778899aabbccddeeff"
	for _, seed := range []string{
		"", "\n", nonce + " ready\n" + nonce + " held 0a\n", "ready\n", nonce + " note label aGVsbG8=\n", nonce + " note\r\n" + nonce,
		nonce + " failed " + strings.Repeat("x", 2*maxLine) + "\n", strings.Repeat(nonce+" note a "+strings.Repeat("QUFB", 1000)+"\n", 10),
		strings.Repeat("long ", maxSaid), nonce + " ended 1\n" + nonce + " ready\n" + nonce + " ready\n",
	} {
		f.Add([]byte(seed), 7)
	}
	f.Fuzz(func(t *testing.T, out []byte, cut int) {
		m := &member{nonce: nonce, notes: map[string]string{}, held: map[string]bool{}, ready: make(chan struct{}), changed: make(chan struct{}, 1), ended: make(chan struct{})}
		l := &lines{take: m.line}
		cut = max(1, cut)
		for rest := out; len(rest) > 0; rest = rest[min(cut, len(rest)):] {
			if n, err := l.Write(rest[:min(cut, len(rest))]); err != nil || n != min(cut, len(rest)) {
				t.Fatal(n, err)
			}
		}
		size := 0
		for k, v := range m.notes {
			size += len(k) + len(v)
		}
		if len(l.part) > maxLine || len(m.said) > maxSaid || size > maxNotes || len(m.held) > 64 || len(m.failed) > maxLine {
			t.Errorf("kept: a line of %d, %d printed, %d of notes, %d answers", len(l.part), len(m.said), size, len(m.held))
		}
		if said := bytes.Contains(out, []byte(nonce+" ready")); !said && !m.frozenAt.IsZero() {
			t.Error("it is taken for frozen, and did not say so")
		}
		if len(m.why().Error()) > 2*maxLine {
			t.Error("the reason is too long")
		}
	})
}
