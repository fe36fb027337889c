package main

import (
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"sync"
	"testing"
)

// TestPrintedSettings runs "repo create s3" with the settings.yaml of docs/repository.md as
// printed, except for the paths of its secrets. The storage refuses everything: by then the
// settings have been read and used.
func TestPrintedSettings(t *testing.T) {
	text, err := os.ReadFile("../../docs/repository.md")
	if err != nil {
		t.Fatal(err)
	}
	printed := regexp.MustCompile("(?s)```yaml\n(.*?)```").FindSubmatch(text)
	if printed == nil {
		t.Fatal("no settings in docs/repository.md")
	}
	env := newTestEnv(t)
	delete(env, "VARVE_PASSWORD")
	home := env["HOME"]
	file := filepath.Join(home, "settings.yaml")
	for name, content := range map[string]string{
		file:                             strings.ReplaceAll(string(printed[1]), "/etc/varve/", home+"/"),
		filepath.Join(home, "password"):  "correct horse\n",
		filepath.Join(home, "s3-secret"): "wJalrXUtnFEMI\n",
	} {
		if err := os.WriteFile(name, []byte(content), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	var mu sync.Mutex
	signed := 0
	storage := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, q *http.Request) {
		mu.Lock()
		defer mu.Unlock()
		if strings.Contains(q.Header.Get("Authorization"), "Credential=AKIAIOSFODNN7EXAMPLE/") && strings.HasPrefix(q.URL.Path, "/backups/") {
			signed++
		}
		w.WriteHeader(http.StatusForbidden)
		_, _ = w.Write([]byte("<Error><Code>AccessDenied</Code><Message>Access Denied</Message></Error>"))
	}))
	defer storage.Close()
	env["VARVE_S3_ENDPOINT"] = strings.TrimPrefix(storage.URL, "http://")
	env["VARVE_S3_DISABLE_TLS"] = "true"
	env["VARVE_S3_REGION"] = "us-east-1"
	r := runVarve(t, env, "--from-file", file, "repo", "create", "s3")
	mu.Lock()
	defer mu.Unlock()
	if r.code != exitRepository || signed == 0 {
		t.Errorf("exit code %d after %d signed requests: %s", r.code, signed, r.stderr)
	}
}
