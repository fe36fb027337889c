package kubernetes

import (
	"go/ast"
	"go/parser"
	"go/token"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

// TestAlone checks that alone.txt names the tests that need a cluster for themselves: those with a site
// that do not run in parallel. The script of the cluster's tests runs them in clusters of their own.
func TestAlone(t *testing.T) {
	files, err := filepath.Glob("*_test.go")
	if err != nil {
		t.Fatal(err)
	}
	var alone []string
	for _, file := range files {
		f, err := parser.ParseFile(token.NewFileSet(), file, nil, 0)
		if err != nil {
			t.Fatal(err)
		}
		for _, d := range f.Decls {
			fn, ok := d.(*ast.FuncDecl)
			if !ok || fn.Recv != nil || !strings.HasPrefix(fn.Name.Name, "Test") || fn.Name.Name == "TestMain" {
				continue
			}
			site, parallel := false, false
			ast.Inspect(fn.Body, func(n ast.Node) bool {
				switch n := n.(type) {
				case *ast.Ident:
					site = site || n.Name == "newSite" || n.Name == "newKiller"
				case *ast.SelectorExpr:
					parallel = parallel || n.Sel.Name == "Parallel"
				}
				return true
			})
			if site && !parallel {
				alone = append(alone, fn.Name.Name)
			}
		}
	}
	slices.Sort(alone)
	listed, err := os.ReadFile("alone.txt")
	if err != nil {
		t.Fatal(err)
	}
	if want := strings.Join(alone, "\n") + "\n"; string(listed) != want {
		t.Errorf("alone.txt has\n%swant\n%s", listed, want)
	}
}
