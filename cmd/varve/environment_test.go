package main

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// TestSecretVariablesAreKnown: each secret setting has a variable that is hidden.
func TestSecretVariablesAreKnown(t *testing.T) {
	a := newApp()
	newRootCommand(a)
	if len(a.secrets) == 0 {
		t.Fatal("no secret settings")
	}
	names := []string{environmentOf("", "password"), environmentOf("", "new-password")}
	for _, s := range a.secrets {
		names = append(names, environmentOf(s.section, s.name))
	}
	for _, name := range names {
		if !isSecretVariable(name) {
			t.Errorf("$%s is not kept from child processes", name)
		}
	}
	for _, name := range []string{"VARVE_CONFIG", "VARVE_PASSWORD_FILE", "AWS_SECRET_ACCESS_KEY", "PATH"} {
		if isSecretVariable(name) {
			t.Errorf("$%s is taken for a secret", name)
		}
	}
}

// TestChildrenInheritNoSecret: a password command prints its environment and its limit of
// core dumps. The password comes from the variable for the new one.
func TestChildrenInheritNoSecret(t *testing.T) {
	env := newTestEnv(t)
	mustRun(t, env, "repo", "create", "filesystem", "--path", filepath.Join(env["HOME"], "repo"))
	told := filepath.Join(env["HOME"], "told")
	env["VARVE_PASSWORD_COMMAND"] = "{ env; ulimit -c; } >" + told + "; echo " + env["VARVE_PASSWORD"]
	env["VARVE_NEW_PASSWORD"], env["VARVE_S3_SECRET_ACCESS_KEY"] = "the new secret", "another secret"
	delete(env, "VARVE_PASSWORD")
	cmd, _, stderr := varveProcess(t, env, "repo", "change-password")
	if err := cmd.Wait(); err != nil {
		t.Fatalf("%v: %s", err, stderr)
	}
	b, err := os.ReadFile(told)
	if err != nil {
		t.Fatal(err)
	}
	if s := string(b); strings.Contains(s, "secret") || !strings.Contains(s, "PATH=") || !strings.HasSuffix(s, "\n0\n") {
		t.Errorf("a child has\n%s", s)
	}
	delete(env, "VARVE_PASSWORD_COMMAND")
	env["VARVE_PASSWORD"] = "the new secret"
	mustRun(t, env, "list")
}
