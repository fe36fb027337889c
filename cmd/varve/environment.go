package main

import (
	"os"
	"slices"
	"strings"

	"golang.org/x/sys/unix"
)

// secretVariables are the ends of the names of varve's own variables that hold secrets.
// Variables of storages' own tools (AWS_SECRET_ACCESS_KEY) are left to them.
var secretVariables = []string{
	"PASSWORD", "SECRET_ACCESS_KEY", "SESSION_TOKEN", "CREDENTIALS_JSON", "ACCOUNT_KEY", "SAS_TOKEN", "CLIENT_SECRET", "B2_KEY",
}

func isSecretVariable(name string) bool {
	return strings.HasPrefix(name, environmentRoot) &&
		slices.ContainsFunc(secretVariables, func(end string) bool { return strings.HasSuffix(name, end) })
}

// hideSecrets removes secrets from the process's environment, so that the programs it starts
// (a password command, fusermount3, mount, ssh) do not inherit them, and keeps the process's
// memory, which holds keys, out of core dumps.
func (a *app) hideSecrets() {
	hidden := map[string]string{}
	for _, variable := range os.Environ() {
		name, value, _ := strings.Cut(variable, "=")
		if !isSecretVariable(name) {
			continue
		}
		hidden[name] = value
		a.hidden = append(a.hidden, variable)
		_ = os.Unsetenv(name)
	}
	lookup := a.lookupEnv
	a.lookupEnv = func(name string) (string, bool) {
		if v, ok := hidden[name]; ok {
			return v, true
		}
		return lookup(name)
	}
	// 1, not 0: only 1 also prevents a dump that is piped into a program (core(5)).
	_ = unix.Setrlimit(unix.RLIMIT_CORE, &unix.Rlimit{Cur: 1, Max: 1})
}
