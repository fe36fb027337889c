package main

import (
	"context"
	"errors"
	"strings"
	"testing"

	"github.com/varve-io/varve/nbdserver"
	"github.com/varve-io/varve/nbdserver/nbdtest"
)

func TestServeRules(t *testing.T) {
	env, disk := newBackupEnv(t)
	backupJSON(t, env, disk, "--volume", "shop/db")
	backupJSON(t, env, disk, "--volume", "hr/pay")
	s := startServer(t, env, "--allow", "*=shop/*")
	if out := mustRun(t, env, "nbd", "list", s.uri("")).stdout; !strings.Contains(out, "shop/db@") || strings.Contains(out, "hr/pay") {
		t.Errorf("listed:\n%s", out)
	}
	hidden := runVarve(t, env, "nbd", "info", s.uri("hr/pay@latest"))
	unknown := runVarve(t, env, "nbd", "info", s.uri("hr/no@latest"))
	if hidden.code == exitOK || strings.ReplaceAll(hidden.stderr, "pay", "no") != unknown.stderr {
		t.Errorf("a hidden export answers\n%sand an unknown one\n%s", hidden.stderr, unknown.stderr)
	}
}

// moving is a catalogue whose alias "latest" leads to the last export.
type moving struct {
	*nbdserver.Static
	latest string
}

func (m *moving) Resolve(ctx context.Context, name string, c nbdserver.Client) (string, error) {
	if name == "latest" {
		name = m.latest
	}
	return m.Static.Resolve(ctx, name, c)
}

// A client without rights does not change the alias bindings of others.
func TestServeRulesAndAliases(t *testing.T) {
	rule, err := nbdserver.ParseAccessRule("alice=*")
	if err != nil {
		t.Fatal(err)
	}
	disk := nbdtest.NewEmptyDisk(4096).ReadOnly()
	m := &moving{Static: nbdserver.NewStatic(nbdserver.Opened{Name: "a", Export: disk}, nbdserver.Opened{Name: "b", Export: disk}), latest: "a"}
	view := clientView(m, []nbdserver.AccessRule{rule})
	alice := nbdserver.Client{Names: []string{"alice"}}
	for _, want := range []string{"a", "a"} {
		o, err := view.Open(t.Context(), "latest", alice)
		if err != nil || o.Name != want {
			t.Fatalf("latest is %+v, not %s: %v", o, want, err)
		}
		o.Close()
		m.latest = "b"
		if _, err := view.Open(t.Context(), "latest", nbdserver.Client{Names: []string{"mallory"}}); !errors.Is(err, nbdserver.ErrUnknownExport) {
			t.Fatal(err)
		}
	}
}
