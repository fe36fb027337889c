package repository

import (
	"bytes"
	"compress/gzip"
	"testing"
)

func FuzzDecodeManifests(f *testing.F) {
	for _, text := range []string{
		`{"entries":[{"id":"a","labels":{"type":"t"},"modified":"2026-01-02T03:04:05Z","data":{"x":1}}]}`,
		`{"entries":[{"id":"a","labels":null,"modified":"2026-01-02T03:04:05Z","deleted":true,"data":null}]}`,
		`{"entries":[null]}`, `{"entries":[{}]}`, `{}`, `[`, ``,
	} {
		var b bytes.Buffer
		z := gzip.NewWriter(&b)
		_, _ = z.Write([]byte(text))
		_ = z.Close()
		f.Add(b.Bytes())
	}
	f.Fuzz(func(t *testing.T, p []byte) {
		entries, err := decodeManifests(p)
		if err != nil {
			return
		}
		again, err := encodeManifests(entries)
		if err != nil {
			t.Fatal(err)
		}
		if back, err := decodeManifests(again); err != nil || len(back) != len(entries) {
			t.Errorf("%d entries are %d once written and read: %v", len(entries), len(back), err)
		}
	})
}
