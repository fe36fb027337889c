package main

import (
	"github.com/spf13/cobra"

	"github.com/varve-io/varve/internal/secret"
)

// secretSetting is a setting that must not be on a command line, which every user of the
// machine can read: it is read from --<name>-file, from the environment, or from the settings
// file.
type secretSetting struct {
	section, name string
	also          []string // more variables, of the storage's own tools
	file          string   // --<name>-file
	into          *string
}

// addSecret adds a secret of a section of settings to a command, which must
// call a.readSecrets before it uses into.
func (a *app) addSecret(cmd *cobra.Command, into *string, section, name, usage string, also ...string) *secretSetting {
	s := &secretSetting{section: section, name: name, also: also, into: into}
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

// readSecrets sets the secrets that were given.
func (a *app) readSecrets(secrets []*secretSetting) error {
	for _, s := range secrets {
		if s.file != "" {
			v, err := a.readSecretFile(s.file)
			if err != nil {
				return usagef("%s: %w", s.name, err)
			}
			*s.into = v
			continue
		}
		value, from := "", ""
		if v, ok := a.lookupEnv(environmentOf(s.section, s.name)); ok {
			value, from = v, "$"+environmentOf(s.section, s.name)
		} else if v := a.settings.sections[s.section][s.name]; len(v) == 1 {
			value, from = v[0], "the setting "+s.name
		} else {
			for _, name := range s.also {
				if v, ok := a.lookupEnv(name); ok && v != "" {
					value, from = v, "$"+name
					break
				}
			}
		}
		if value == "" {
			continue
		}
		line, err := secret.Line([]byte(value))
		if err != nil {
			return usagef("%s %w", from, err)
		}
		*s.into = line
	}
	return nil
}
