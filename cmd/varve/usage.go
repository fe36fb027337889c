package main

import (
	"fmt"
	"slices"
	"strings"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"
)

// unknownCommand returns the error about a word that is no command of cmd.
func unknownCommand(cmd *cobra.Command, word string) error {
	err := fmt.Sprintf("unknown command %q for %q", word, cmd.CommandPath())
	if like := cmd.SuggestionsFor(word); len(like) > 0 {
		err += fmt.Sprintf("; did you mean '%s %s'?", cmd.CommandPath(), like[0])
	}
	return usagef("%s", err)
}

// needsCommand returns the error about a group of commands that was called without a command.
func needsCommand(cmd *cobra.Command) error {
	var names []string
	for _, c := range cmd.Commands() {
		if c.IsAvailableCommand() {
			names = append(names, c.Name())
		}
	}
	return usagef("%q needs one of: %s", cmd.CommandPath(), strings.Join(names, ", "))
}

// flagError adds a suggestion to an error about flags.
func flagError(cmd *cobra.Command, err error) error {
	name, ok := strings.CutPrefix(err.Error(), "unknown flag: --")
	if !ok {
		return &usageError{err}
	}
	nearest, distance := "", 3 // a more distant one is another word
	cmd.Flags().VisitAll(func(f *pflag.Flag) {
		d := editDistance(name, f.Name)
		if strings.HasPrefix(f.Name, name) {
			d = min(d, 1)
		}
		if d < distance && !f.Hidden {
			nearest, distance = f.Name, d
		}
	})
	if nearest == "" {
		return usagef("unknown flag --%s", name)
	}
	return usagef("unknown flag --%s; did you mean --%s?", name, nearest)
}

// editDistance returns the Levenshtein distance of a and b.
func editDistance(a, b string) int {
	row := make([]int, len(b)+1)
	for j := range row {
		row[j] = j
	}
	for i := range len(a) {
		diagonal := row[0]
		row[0] = i + 1
		for j := range len(b) {
			cost := diagonal
			if a[i] != b[j] {
				cost++
			}
			diagonal = row[j+1]
			row[j+1] = min(cost, diagonal+1, row[j]+1)
		}
	}
	return row[len(b)]
}

// checkArgs runs a command's check of its arguments and names what is missing by the usage
// line, where cobra counts.
func checkArgs(cmd *cobra.Command, check cobra.PositionalArgs, args []string) error {
	if i := slices.Index(args, ""); i >= 0 {
		return usagef("argument %d is empty", i+1)
	}
	err := check(cmd, args)
	if err == nil {
		return nil
	}
	if !strings.Contains(err.Error(), "arg(s)") && !strings.HasPrefix(err.Error(), "unknown command") {
		return &usageError{err}
	}
	_, wanted, _ := strings.Cut(cmd.Use, " ")
	switch {
	case wanted == "" || strings.HasPrefix(wanted, "--"):
		return usagef("%q takes no arguments, and got %q", cmd.CommandPath(), args[0])
	case len(args) == 0:
		return usagef("%q needs %s", cmd.CommandPath(), wanted)
	}
	return usagef("%q takes %s, and got %s", cmd.CommandPath(), wanted, count(len(args), "argument", "arguments"))
}
