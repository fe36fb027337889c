// Package docs tests what the documents say of the whole repository. It is a package of its own because it reads
// all files: Go's test cache never has its result for long, and the tests of cmd/varve take long.
package docs

import (
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/varve-io/varve/nbdserver/nbdtest"
)

// TestDocsNameWhatExists compares docs/ with the code: every test, and every test
// of the NBD suite that they name exists. Commands and flags are tested in cmd/varve.
func TestDocsNameWhatExists(t *testing.T) {
	const root = ".."
	tests := map[string]bool{"TestSomething": true} // the example of docs/e2e.md
	define := regexp.MustCompile(`(?m)^func ((?:Test|Fuzz)[A-Z]\w*)\(`)
	err := filepath.WalkDir(root, func(path string, d os.DirEntry, err error) error {
		switch {
		case err == nil && d.IsDir() && path != root && strings.HasPrefix(d.Name(), "."):
			return filepath.SkipDir // what other programs make and remove
		case err != nil || d.IsDir() || !strings.HasSuffix(path, "_test.go"):
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
	named := 0
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
	}
	if named < 50 {
		t.Errorf("only %d tests found in docs: this test no longer reads them", named)
	}
}

// Each module that is used directly has a line in docs/dependencies.md.
func TestDependenciesHaveReasons(t *testing.T) {
	const root = ".."
	mod, err := os.ReadFile(filepath.Join(root, "go.mod"))
	if err != nil {
		t.Fatal(err)
	}
	doc, err := os.ReadFile(filepath.Join(root, "docs/dependencies.md"))
	if err != nil {
		t.Fatal(err)
	}
	table, _, _ := strings.Cut(string(doc), "\n## ")
	named := map[string]bool{}
	for _, row := range regexp.MustCompile(`(?m)^\| ([^|]+) \|`).FindAllStringSubmatch(table, -1) {
		for name := range strings.SplitSeq(row[1], ", ") {
			named[name] = true
		}
	}
	direct := 0
	for _, m := range regexp.MustCompile(`(?m)^\t(\S+) v\S+$`).FindAllSubmatch(mod, -1) {
		direct++
		if !slices.ContainsFunc(slices.Collect(maps.Keys(named)), func(name string) bool {
			return name == string(m[1]) || strings.HasPrefix(name, string(m[1])+"/") // a package of it
		}) {
			t.Errorf("docs/dependencies.md has no line for %s", m[1])
		}
	}
	if direct < 20 {
		t.Errorf("only %d modules found in go.mod: this test no longer reads it", direct)
	}
}

// The modules below e2e have each library in the version that Varve has, so that it is compiled once for all.
func TestModulesAgree(t *testing.T) {
	const root = ".."
	want := versions(t, filepath.Join(root, "go.mod"))
	others := 0
	if err := filepath.WalkDir(filepath.Join(root, "e2e"), func(path string, e fs.DirEntry, err error) error {
		if err != nil || e.Name() != "go.mod" {
			return err
		}
		others++
		for module, version := range versions(t, path) {
			if want[module] == "" {
				want[module] = version
			}
			if version != want[module] {
				t.Errorf("%s has %s %s, another module has %s", path, module, version, want[module])
			}
		}
		return nil
	}); err != nil {
		t.Fatal(err)
	}
	if others < 4 {
		t.Errorf("only %d modules were found below e2e", others)
	}
}

// versions returns the modules that a go.mod requires.
func versions(t *testing.T, path string) map[string]string {
	t.Helper()
	text, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	out := map[string]string{}
	for _, m := range regexp.MustCompile(`(?m)^\t(\S+) (v\S+)`).FindAllStringSubmatch(string(text), -1) {
		out[m[1]] = m[2]
	}
	if len(out) < 20 {
		t.Errorf("only %d modules found in %s: this test no longer reads it", len(out), path)
	}
	return out
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

// TestMapHasEveryFolder compares the map of CONTRIBUTING.md with the folders at the top and
// the packages in them, and the list in populator.go with its packages.
func TestMapHasEveryFolder(t *testing.T) {
	text, err := os.ReadFile("../CONTRIBUTING.md")
	if err != nil {
		t.Fatal(err)
	}
	_, rest, _ := strings.Cut(string(text), "## The map")
	list, _, _ := strings.Cut(rest, "\n## ")
	folders, err := os.ReadDir("..")
	if err != nil {
		t.Fatal(err)
	}
	n := 0
	for _, f := range folders {
		if !f.IsDir() || strings.HasPrefix(f.Name(), ".") || f.Name() == "bin" {
			continue
		}
		n++
		if !strings.Contains(list, "\n    "+f.Name()+"/") {
			t.Errorf("%s/ is not on the map of CONTRIBUTING.md", f.Name())
		}
	}
	if n < 10 {
		t.Errorf("only %d folders were found", n)
	}
	in := func(dir string) []string {
		t.Helper()
		found, err := filepath.Glob("../" + dir + "/*/*.go")
		if err != nil || len(found) == 0 {
			t.Fatalf("no packages in %s: %v", dir, err)
		}
		names := map[string]bool{}
		for _, f := range found {
			names[filepath.Base(filepath.Dir(f))] = true
		}
		return slices.Sorted(maps.Keys(names))
	}
	for _, dir := range []string{"backup", "fusefs", "internal"} {
		for _, name := range in(dir) {
			if !strings.Contains(list, "\n      "+dir+"/"+name+" ") {
				t.Errorf("%s/%s is not on the map of CONTRIBUTING.md", dir, name)
			}
		}
	}
	populator, err := os.ReadFile("../populator/populator.go")
	if err != nil {
		t.Fatal(err)
	}
	for _, name := range in("populator") {
		if !strings.Contains(string(populator), "\n//\t"+name+" ") {
			t.Errorf("populator/%s is not in the list of populator.go", name)
		}
	}
}
