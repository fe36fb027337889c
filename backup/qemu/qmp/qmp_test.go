package qmp

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"net"
	"path/filepath"
	"strings"
	"testing"
)

// serve answers one client at a socket, in turn with what script says of each line it sends.
func serve(t *testing.T, greeting string, script func(line map[string]any) string) (socket string) {
	t.Helper()
	socket = filepath.Join(t.TempDir(), "s")
	l, err := net.Listen("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		conn, err := l.Accept()
		if err != nil {
			return
		}
		defer conn.Close()
		_, _ = conn.Write([]byte(greeting))
		lines := bufio.NewReader(conn)
		for {
			line, err := lines.ReadString('\n')
			if err != nil {
				return
			}
			var m map[string]any
			if err := json.Unmarshal(bytes.TrimLeftFunc([]byte(line), func(r rune) bool { return r != '{' }), &m); err != nil {
				t.Errorf("%q: %v", line, err)
				return
			}
			_, _ = conn.Write([]byte(script(m)))
		}
	}()
	t.Cleanup(func() { l.Close(); <-done })
	return socket
}

const hello = `{"QMP": {"version": {}, "capabilities": []}}` + "\n"

func answer(m map[string]any, rest string) string {
	id, _ := json.Marshal(m["id"])
	return rest + `, "id": ` + string(id) + "}\n"
}

func TestCommands(t *testing.T) {
	t.Parallel()
	socket := serve(t, strings.ReplaceAll(hello, ",", ",\n  "), func(m map[string]any) string {
		switch m["execute"] {
		case "qmp_capabilities":
			return answer(m, `{"return": {}`)
		case "query-name":
			return `{"event": "RESUME"}` + "\n" + `{"return": 9, "id": 12345}` + "\n" + answer(m, `{"return": {"name": "shop"}`)
		}
		return answer(m, `{"error": {"class": "CommandNotFound", "desc": "not found"}`)
	})
	c, err := Dial(t.Context(), socket)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	var got struct{ Name string }
	if err := c.Do(t.Context(), "query-name", nil, &got); err != nil || got.Name != "shop" {
		t.Errorf("%+v, %v", got, err)
	}
	if err := c.Do(t.Context(), "x", nil, nil); !NoCommand(err) || !strings.Contains(err.Error(), "x: not found") {
		t.Error(err)
	}
	ended, cancel := context.WithCancel(t.Context())
	cancel()
	if err := c.Do(ended, "query-name", nil, nil); !errors.Is(err, context.Canceled) {
		t.Error(err)
	}
}

func TestConnectionLost(t *testing.T) {
	t.Parallel()
	socket := serve(t, hello, func(m map[string]any) string {
		if m["execute"] == "qmp_capabilities" {
			return answer(m, `{"return": {}`)
		}
		return "{]\n"
	})
	c, err := Dial(t.Context(), socket)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	for range 2 {
		if err := c.Do(t.Context(), "x", nil, nil); !errors.Is(err, ErrLost) {
			t.Error(err)
		}
	}
}

func TestAgent(t *testing.T) {
	t.Parallel()
	socket := serve(t, "{\"return\": {\"an old\": \"answer\"}}\n", func(m map[string]any) string {
		if m["execute"] == "guest-sync-delimited" {
			id, _ := json.Marshal(m["arguments"].(map[string]any)["id"])
			return "\xff{\"return\": 7}\n" + "{\"error\": {}}\n\xff" + `{"return": ` + string(id) + "}\n"
		}
		return answer(m, `{"return": 3`)
	})
	c, err := DialAgent(t.Context(), socket)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	var n int
	if err := c.Do(t.Context(), "guest-fsfreeze-freeze", nil, &n); err != nil || n != 3 {
		t.Error(n, err)
	}
}

func FuzzMessages(f *testing.F) {
	for _, s := range []string{hello, `{"return": [], "id": 1}{"error": {"class": "GenericError", "desc": "x"}, "id": 2}`, `{"id": 1e99}`, "{", "[]", ""} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		in := newMessages(strings.NewReader(s))
		for n := 0; ; n++ {
			m, err := in.next()
			if err != nil {
				return
			}
			if m == nil || n > len(s) {
				t.Fatal("a message of nothing")
			}
		}
	})
}
