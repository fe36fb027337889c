package main

import (
	"errors"
	"fmt"
	"os"
	"slices"
	"strings"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"
	yaml "go.yaml.in/yaml/v3"
)

// Where a flag's value comes from: the command line; else the environment;
// else the settings file (--from-file); else its default. Names follow from
// the flag's:
//
//	global flag --log-level         VARVE_LOG_LEVEL         log-level: debug
//	flag --bucket of a command s3   VARVE_S3_BUCKET         s3: {bucket: b}
//
// The section of a command is its last word. A flag annotated with sectionKey
// belongs to that section instead, so that sibling commands share it.

const (
	sectionKey          = "varve-section"           // annotation: the section a flag belongs to
	appliedElsewhereKey = "varve-applied-elsewhere" // annotation: other code chooses between the flag's sources
	settingsFlag        = "from-file"
	environmentRoot     = "VARVE_"
)

// settings is a settings file: values of global flags, and sections of values by command.
type settings struct {
	file     string
	global   map[string][]string
	sections map[string]map[string][]string
}

// readSettings reads a settings file in YAML, which includes JSON.
func readSettings(file string) (*settings, error) {
	p, err := os.ReadFile(file)
	if err != nil {
		return nil, usagef("read settings file: %w", err)
	}
	s, err := parseSettings(p)
	if err != nil {
		return nil, usagef("settings file %s: %w", file, err)
	}
	s.file = file
	return s, nil
}

func parseSettings(p []byte) (*settings, error) {
	var doc map[string]yaml.Node
	if err := yaml.Unmarshal(p, &doc); err != nil {
		return nil, err
	}
	s := &settings{global: map[string][]string{}, sections: map[string]map[string][]string{}}
	for name, node := range doc {
		if node.Kind != yaml.MappingNode {
			v, err := settingValues(&node)
			if err != nil {
				return nil, fmt.Errorf("%s: %w", name, err)
			}
			s.global[name] = v
			continue
		}
		var section map[string]yaml.Node
		if err := node.Decode(&section); err != nil {
			return nil, fmt.Errorf("%s: %w", name, err)
		}
		values := map[string][]string{}
		for key, n := range section {
			v, err := settingValues(&n)
			if err != nil {
				return nil, fmt.Errorf("%s.%s: %w", name, key, err)
			}
			values[key] = v
		}
		s.sections[name] = values
	}
	return s, nil
}

func settingValues(n *yaml.Node) ([]string, error) {
	switch n.Kind {
	case yaml.ScalarNode:
		if n.Tag == "!!null" {
			return nil, errors.New("has no value")
		}
		return []string{n.Value}, nil
	case yaml.SequenceNode:
		var all []string
		for _, e := range n.Content {
			if e.Kind != yaml.ScalarNode {
				return nil, errors.New("is a list of values that are not plain")
			}
			all = append(all, e.Value)
		}
		return all, nil
	default:
		return nil, errors.New("is neither a plain value nor a list")
	}
}

// applySettings sets the flags of cmd that the command line did not, from the environment or
// the settings file.
func (a *app) applySettings(cmd *cobra.Command) error {
	if f := cmd.Flags().Lookup(settingsFlag); f != nil && !f.Changed {
		if v, ok := a.lookupEnv(environmentName(cmd, f)); ok {
			a.flags.settings = v
		}
	}
	a.settings = &settings{}
	if a.flags.settings != "" {
		s, err := readSettings(a.flags.settings)
		if err != nil {
			return err
		}
		if err := s.check(cmd.Root(), a.secrets); err != nil {
			return usagef("settings file %s: %w", s.file, err)
		}
		a.settings = s
	}
	var failed error
	cmd.Flags().VisitAll(func(f *pflag.Flag) {
		if failed != nil || f.Changed || f.Name == settingsFlag || !settable(f) || f.Annotations[appliedElsewhereKey] != nil {
			return
		}
		name := environmentName(cmd, f)
		from, values := "$"+name, []string(nil)
		if v, ok := a.lookupEnv(name); ok {
			values = []string{v}
		} else if v, ok := a.settings.lookup(flagSection(cmd, f), f.Name); ok {
			from, values = a.settings.file, v
		}
		for _, v := range values {
			if err := cmd.Flags().Set(f.Name, v); err != nil {
				failed = usagef("%s: %w", from, err)
				return
			}
		}
	})
	return failed
}

func (s *settings) lookup(section, name string) ([]string, bool) {
	if section == "" {
		v, ok := s.global[name]
		return v, ok
	}
	v, ok := s.sections[section][name]
	return v, ok
}

// check rejects unknown names: a typing error must not silently leave a default in force.
func (s *settings) check(root *cobra.Command, secrets []*secretSetting) error {
	known := map[string][]string{}
	var walk func(c *cobra.Command)
	walk = func(c *cobra.Command) {
		for _, set := range []*pflag.FlagSet{c.LocalFlags(), c.PersistentFlags()} {
			set.VisitAll(func(f *pflag.Flag) {
				if section := flagSection(c, f); settable(f) {
					known[section] = append(known[section], f.Name)
				}
			})
		}
		for _, sub := range c.Commands() {
			walk(sub)
		}
	}
	walk(root)
	for _, secret := range secrets {
		known[secret.section] = append(known[secret.section], secret.name)
	}
	for name := range s.global {
		if !slices.Contains(known[""], name) {
			return fmt.Errorf("unknown setting %q", name)
		}
	}
	for section, values := range s.sections {
		names, ok := known[section]
		if !ok || section == "" {
			return fmt.Errorf("unknown section %q", section)
		}
		for name := range values {
			if !slices.Contains(names, name) {
				return fmt.Errorf("unknown setting %q in section %q", name, section)
			}
		}
	}
	return nil
}

func settable(f *pflag.Flag) bool {
	return f.Name != "help" && f.Name != "version"
}

// flagSection returns the section of a flag of cmd; empty for global flags.
func flagSection(cmd *cobra.Command, f *pflag.Flag) string {
	if s := f.Annotations[sectionKey]; len(s) == 1 {
		return s[0]
	}
	if cmd.Root().PersistentFlags().Lookup(f.Name) == f {
		return ""
	}
	return cmd.Name()
}

func environmentName(cmd *cobra.Command, f *pflag.Flag) string {
	return environmentOf(flagSection(cmd, f), f.Name)
}

func environmentOf(section, name string) string {
	if section != "" {
		name = section + "-" + name
	}
	return environmentRoot + strings.ToUpper(strings.ReplaceAll(name, "-", "_"))
}

// describeEnvironment adds to each flag's usage the name of its variable.
func describeEnvironment(cmd *cobra.Command) {
	seen := map[*pflag.Flag]bool{}
	add := func(f *pflag.Flag) {
		if settable(f) && !seen[f] {
			seen[f] = true
			f.Usage += " [$" + environmentName(cmd, f) + "]"
		}
	}
	cmd.LocalNonPersistentFlags().VisitAll(add)
	cmd.PersistentFlags().VisitAll(add)
}

// inSection puts flags into a section of settings.
func inSection(set *pflag.FlagSet, section string, names ...string) {
	for _, name := range names {
		if err := set.SetAnnotation(name, sectionKey, []string{section}); err != nil {
			panic(err) // a flag that was not defined: a mistake in this program
		}
	}
}
