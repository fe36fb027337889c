package bytesize_test

import (
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
)

// TestSizesHaveOneForm looks for texts that write a size in another way than this
// package: units of their own anywhere, and, in texts for people, plain bytes.
// Offsets and lengths of ranges stay in bytes, as other tools take them.
func TestSizesHaveOneForm(t *testing.T) {
	root := filepath.Join("..", "..")
	units := regexp.MustCompile(`%[dv.0-9f]+ ?[KMGTPE]i?B\b|"[^"]*KMGT[^"]*"`)
	plain := regexp.MustCompile(`"[^"]*%d bytes\b`)
	files := 0
	err := filepath.WalkDir(root, func(path string, d fs.DirEntry, err error) error {
		rel, _ := filepath.Rel(root, path)
		switch {
		case err != nil:
			return err
		case d.IsDir() && (rel == "e2e" || strings.HasPrefix(d.Name(), ".") && rel != "."):
			return filepath.SkipDir
		case d.IsDir() || !strings.HasSuffix(path, ".go") || strings.HasSuffix(path, "_test.go"), rel == filepath.Join("internal", "bytesize", "bytesize.go"),
			strings.Contains(rel, "nbdtest"), strings.Contains(rel, "diskfstest"):
			return nil
		}
		files++
		text, err := os.ReadFile(path)
		for i, line := range strings.Split(string(text), "\n") {
			if units.MatchString(line) ||
				(strings.HasPrefix(rel, "cmd") || strings.HasPrefix(rel, "populator") || strings.HasPrefix(rel, filepath.Join("internal", "serve"))) && plain.MatchString(line) {
				t.Errorf("%s:%d: write a size with bytesize.Format or bytesize.Exact: %s", rel, i+1, strings.TrimSpace(line))
			}
		}
		return err
	})
	if err != nil || files < 300 {
		t.Errorf("looked at %d files: %v", files, err)
	}
}
