package main

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// TestDocsNameCommands compares docs/ with the program: every command and every flag of an
// example exists.
func TestDocsNameCommands(t *testing.T) {
	const root = "../.."
	docs, err := filepath.Glob(filepath.Join(root, "docs", "*.md"))
	if err != nil || len(docs) == 0 {
		t.Fatalf("no docs: %v", err)
	}
	examples := 0
	for _, path := range append(docs, filepath.Join(root, "README.md")) {
		text, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		for line := range strings.SplitSeq(strings.ReplaceAll(string(text), "\\\n", " "), "\n") {
			if checkCommandLine(t, path, line) {
				examples++
			}
		}
	}
	if examples < 30 {
		t.Errorf("only %d commands found in docs: this test no longer reads them", examples)
	}
}

// checkCommandLine checks the commands and flags of an example.
func checkCommandLine(t *testing.T, path, line string) (isCommand bool) {
	line, ok := strings.CutPrefix(line, "    varve ")
	if !ok {
		return false
	}
	line, _, _ = strings.Cut(line, " | ")
	line, _, _ = strings.Cut(line, " #")
	line, _, _ = strings.Cut(line, " -- ") // another program's
	words := strings.Fields(line)
	cmd, _, err := newRootCommand(newApp()).Find(words)
	if err != nil || !cmd.HasParent() || cmd.HasSubCommands() {
		t.Errorf("%s: there is no command for %q: %v", path, line, err)
		return true
	}
	for _, w := range words {
		name, isFlag := strings.CutPrefix(w, "--")
		name, _, _ = strings.Cut(name, "=")
		if isFlag && name != "" && cmd.Flag(name) == nil {
			t.Errorf("%s: %q: no flag --%s", path, line, name)
		}
	}
	return true
}
