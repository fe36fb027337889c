package main

import (
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	"github.com/varve-io/varve/nbdserver/nbdtest"
)

// TestDocsNameWhatExists holds the tables of docs/ against the code: every test that
// they name is there, every test of the NBD suite too, and every command and flag.
func TestDocsNameWhatExists(t *testing.T) {
	const root = "../.."
	tests := map[string]bool{"TestSomething": true} // the example of docs/e2e.md
	define := regexp.MustCompile(`(?m)^func ((?:Test|Fuzz)[A-Z]\w*)\(`)
	err := filepath.WalkDir(root, func(path string, d os.DirEntry, err error) error {
		if err != nil || d.IsDir() || !strings.HasSuffix(path, "_test.go") {
			return err
		}
		text, err := os.ReadFile(path)
		for _, m := range define.FindAllSubmatch(text, -1) {
			tests[string(m[1])] = true
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	docs, err := filepath.Glob(filepath.Join(root, "docs", "*.md"))
	if err != nil || len(docs) == 0 {
		t.Fatalf("no docs: %v", err)
	}
	docs = append(docs, filepath.Join(root, "README.md"))
	named, examples := 0, 0
	for _, path := range docs {
		b, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		text := string(b)
		for _, name := range regexp.MustCompile(`\b(?:Test|Fuzz)[A-Z]\w*`).FindAllString(text, -1) {
			named++
			if !tests[name] {
				t.Errorf("%s names test %s, which does not exist", path, name)
			}
		}
		if filepath.Base(path) == "nbd-protocol.md" {
			checkSuiteNames(t, text)
		}
		for _, line := range strings.Split(strings.ReplaceAll(text, "\\\n", " "), "\n") {
			if checkCommandLine(t, path, line) {
				examples++
			}
		}
	}
	if named < 50 || examples < 30 {
		t.Errorf("only %d tests and %d commands found in docs: this test no longer reads them", named, examples)
	}
}

// checkSuiteNames looks up `group/*` and `group/name` in the NBD suite.
func checkSuiteNames(t *testing.T, text string) {
	groups := map[string]bool{}
	for name := range nbdtest.All {
		group, _, _ := strings.Cut(name, "/")
		groups[group], groups[group+"/*"], groups[name] = true, true, true
	}
	found := 0
	for _, m := range regexp.MustCompile("`([a-z]+)(/[a-z*-]+)`").FindAllStringSubmatch(text, -1) {
		if m[2] == "/*" || groups[m[1]] {
			found++
			if !groups[m[1]+m[2]] {
				t.Errorf("the NBD suite has no test %s%s", m[1], m[2])
			}
		}
	}
	if found < 10 {
		t.Errorf("only %d tests of the NBD suite are named", found)
	}
}

// checkCommandLine holds an example of a document against the commands and flags.
func checkCommandLine(t *testing.T, path, line string) (isCommand bool) {
	line, ok := strings.CutPrefix(line, "    varve ")
	if !ok {
		return false
	}
	line, _, _ = strings.Cut(line, " | ")
	line, _, _ = strings.Cut(line, " #")
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
