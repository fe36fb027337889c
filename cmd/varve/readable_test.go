package main

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/varve-io/varve/backup/repository/repotest"
)

// There is one warning of a file with secrets that every user can read, and none of other
// files.
func TestSecretFilesAreWarnedOf(t *testing.T) {
	env := newTestEnv(t)
	dir := t.TempDir()
	password, settings, public := filepath.Join(dir, "password"), filepath.Join(dir, "settings"), filepath.Join(dir, "public")
	for name, text := range map[string]string{
		password: repotest.Password, settings: "s3: {secret-access-key: x}\n", public: "password-file: " + password + "\n",
	} {
		if err := os.WriteFile(name, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	delete(env, "VARVE_PASSWORD")
	mustRun(t, env, "repo", "create", "filesystem", "--path", filepath.Join(dir, "repo"), "--password-file", password)
	for _, file := range []string{password, settings, public, env["VARVE_CONFIG"]} {
		for mode, warned := range map[os.FileMode]bool{0o600: false, 0o640: false, 0o644: file != public, 0o602: file != public} {
			if err := os.Chmod(file, mode); err != nil {
				t.Fatal(err)
			}
			args := []string{"list", "--password-file", password, "--from-file", settings}
			if file == public {
				args = []string{"list", "--from-file", public}
			}
			r := mustRun(t, env, args...)
			if n := strings.Count(r.stderr, "chmod 600"); (n == 1 && strings.Contains(r.stderr, file)) != warned || !warned && n > 0 {
				t.Errorf("%s of mode %o: %s", filepath.Base(file), mode, r.stderr)
			}
		}
		if err := os.Chmod(file, 0o600); err != nil {
			t.Fatal(err)
		}
	}
}
