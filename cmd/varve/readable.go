package main

import (
	"fmt"
	"os"
)

// openToAll are the permissions by which every user of the machine can read or change a file.
const openToAll = 0o006

// checkSecretFile warns, once per file, of a file with secrets that every user of the machine
// can read or change. It ignores pipes and devices, such as a shell's <(command).
func (a *app) checkSecretFile(file string) {
	st, err := os.Stat(file)
	if err != nil || !st.Mode().IsRegular() || st.Mode()&openToAll == 0 || a.warned[file] {
		return
	}
	if a.warned == nil {
		a.warned = map[string]bool{}
	}
	a.warned[file] = true
	verb := "read"
	if st.Mode()&0o004 == 0 {
		verb = "change"
	}
	a.log.Warn(fmt.Sprintf("every user of this machine can %s this file, which holds secrets: run \"chmod 600\" on it", verb), "file", file)
}

// checkSettingsFile is checkSecretFile for a settings file with a secret in it. Names of
// secret files are no secrets.
func (a *app) checkSettingsFile() {
	for _, s := range a.secrets {
		if _, ok := a.settings.sections[s.section][s.name]; ok {
			a.checkSecretFile(a.settings.file)
			return
		}
	}
}
