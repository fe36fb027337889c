package imageio

import (
	"strings"
	"testing"
)

func FuzzParseExtents(f *testing.F) {
	for _, text := range []string{
		`[]`, `[{"start":0,"length":4096,"zero":true,"hole":false}]`,
		`[{"start":0,"length":65536,"dirty":true,"zero":false},{"start":65536,"length":4096,"dirty":false}]`,
		`[{"start":0,"length":1,"dirty":true},{"start":0,"length":9223372036854775807,"dirty":true}]`, `[{"start":-1`,
	} {
		f.Add(text, true)
		f.Add(text, false)
	}
	f.Fuzz(func(t *testing.T, text string, dirty bool) {
		name := zeroContext
		if dirty {
			name = dirtyContext
		}
		set, zeroes, err := parseExtents(strings.NewReader(text), name)
		if err != nil {
			return
		}
		end := int64(0)
		for i, e := range set.ends {
			if e <= end || set.at(e-1) != i {
				t.Fatalf("run %d ends at %d, after %d", i, e, end)
			}
			end = e
		}
		if zeroes != nil && zeroes.size() != set.size() {
			t.Fatalf("one list ends at %d, the other at %d", set.size(), zeroes.size())
		}
	})
}

func FuzzParseCapabilities(f *testing.F) {
	f.Add(`{"unix_socket":"\u0000/org/ovirt/imageio","features":["extents","zero","flush"],"max_readers":8,"max_writers":8}`)
	f.Add(`{"max_readers":-1,"features":null}`)
	f.Fuzz(func(t *testing.T, text string) {
		caps, err := parseCapabilities([]byte(text))
		c := client{caps: caps, opt: Options{Connections: DefaultConnections}}
		if n := c.connections(); err == nil && (n < 1 || n > DefaultConnections) || strings.HasPrefix(caps.UnixSocket, "\x00\x00") && err != nil {
			t.Fatalf("%d connections of %+v", n, caps)
		}
	})
}

func FuzzParseTotal(f *testing.F) {
	for _, text := range []string{"bytes 0-0/4096", "bytes 0-0/*", "bytes 0-0/-1", "bytes 0-1/2", ""} {
		f.Add(text)
	}
	f.Fuzz(func(t *testing.T, text string) {
		if n, err := parseTotal(text); err == nil && n < 1 && n != -1 {
			t.Fatalf("%q is %d", text, n)
		}
	})
}

func FuzzParseTransfer(f *testing.F) {
	f.Add("https://host:54322/images/74ca180f-77e5-44be-9196-e3226104e406")
	f.Add("http://[::1]/images/a%2fb")
	f.Fuzz(func(t *testing.T, text string) {
		tr, err := ParseTransfer(text)
		if err == nil && (tr.ticket == "" || strings.Contains(tr.ticket, "/") || tr.url.Host == "") {
			t.Fatalf("%q: %+v", text, tr.url)
		}
	})
}
