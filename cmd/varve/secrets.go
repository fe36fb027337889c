package main

import (
	"github.com/spf13/cobra"
)

// secret is a setting that must not stand on a command line, where every user
// of the machine could read it: it is taken from --<name>-file, from the
// environment, or from the settings file.
type secret struct {
	section, name string
	also          []string // further variables, as the storage's own tools name them
	file          string   // --<name>-file
	into          *string
}

// addSecret adds a secret of a section of settings to a command, which must
// call a.readSecrets before it uses into.
func (a *app) addSecret(cmd *cobra.Command, into *string, section, name, usage string, also ...string) *secret {
	s := &secret{section: section, name: name, also: also, into: into}
	also = append([]string{environmentOf(section, name)}, also...)
	usage = "file that holds " + usage + " (or the value itself in"
	for i, v := range also {
		if i > 0 {
			usage += " or"
		}
		usage += " $" + v
	}
	cmd.Flags().StringVar(&s.file, name+"-file", "", usage+")")
	inSection(cmd.Flags(), section, name+"-file")
	a.secrets = append(a.secrets, s)
	return s
}

// readSecrets fills in the secrets given.
func (a *app) readSecrets(secrets []*secret) error {
	for _, s := range secrets {
		if s.file != "" {
			v, err := readSecretFile(s.file)
			if err != nil {
				return usagef("%s: %w", s.name, err)
			}
			*s.into = v
			continue
		}
		if v, ok := a.lookupEnv(environmentOf(s.section, s.name)); ok {
			*s.into = v
			continue
		}
		if v := a.settings.sections[s.section][s.name]; len(v) == 1 {
			*s.into = v[0]
			continue
		}
		for _, name := range s.also {
			if v, ok := a.lookupEnv(name); ok && v != "" {
				*s.into = v
				break
			}
		}
	}
	return nil
}
