package kubernetes

import (
	"context"
	"go/ast"
	"go/parser"
	"go/token"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/varve-io/varve/e2e/cluster"
)

var document = filepath.Join("..", "..", "docs", "kubernetes.md")

func readDocument(t *testing.T) string {
	t.Helper()
	text, err := os.ReadFile(document)
	if err != nil {
		t.Fatal(err)
	}
	return string(text)
}

// Each reason that a user can meet is in the document.
func TestReasonsAreDocumented(t *testing.T) {
	f, err := parser.ParseFile(token.NewFileSet(), filepath.Join("..", "..", "api", "v1alpha1", "conditions.go"), nil, 0)
	if err != nil {
		t.Fatal(err)
	}
	text := readDocument(t)
	count := 0
	ast.Inspect(f, func(n ast.Node) bool {
		spec, ok := n.(*ast.ValueSpec)
		if !ok || !strings.HasPrefix(spec.Names[0].Name, "Reason") {
			return true
		}
		reason, err := strconv.Unquote(spec.Values[0].(*ast.BasicLit).Value)
		if err != nil {
			t.Fatal(err)
		}
		count++
		if !strings.Contains(text, "\n| "+reason+" |") {
			t.Errorf("docs/kubernetes.md does not say what to do about %s", reason)
		}
		return true
	})
	if count < 30 {
		t.Fatalf("only %d reasons were found", count)
	}
}

// Each metric is in the document, and each in the document is one.
func TestMetricsAreDocumented(t *testing.T) {
	files, err := filepath.Glob(filepath.Join("..", "..", "populator", "metrics", "*.go"))
	if err != nil {
		t.Fatal(err)
	}
	text := readDocument(t)
	name := regexp.MustCompile(`"(varve_[a-z_]+)"`)
	known := map[string]bool{}
	for _, file := range files {
		if strings.HasSuffix(file, "_test.go") {
			continue
		}
		source, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		for _, m := range name.FindAllStringSubmatch(string(source), -1) {
			known[m[1]] = true
		}
	}
	if len(known) == 0 {
		t.Fatal("no metrics were found")
	}
	row := regexp.MustCompile(`(?m)^\| (varve_[a-z_]+)`)
	documented := map[string]bool{}
	for _, m := range row.FindAllStringSubmatch(text, -1) {
		documented[m[1]] = true
		if !known[m[1]] {
			t.Errorf("%s is documented and does not exist", m[1])
		}
	}
	for m := range known {
		if !documented[m] {
			t.Errorf("%s is not documented", m)
		}
	}
}

// The document's commands, unchanged and in order, end with the restored file.
func TestDocument(t *testing.T) {
	t.Parallel()
	s := newSite(t)
	if err := s.Cluster.TagImage(t.Context(), cluster.ToolImage, "docker.io/library/busybox:1.36"); err != nil {
		t.Fatal(err)
	}
	bucket := s.bucket("doc-" + s.Namespace[len(s.Namespace)-6:])
	var script strings.Builder
	for _, block := range regexp.MustCompile("(?s)\n```sh\n(.*?)\n```\n").FindAllStringSubmatch(readDocument(t), -1) {
		script.WriteString(block[1] + "\n")
	}
	root, err := filepath.Abs(filepath.Join("..", ".."))
	if err != nil {
		t.Fatal(err)
	}
	s.atEnd(func() {
		for _, args := range [][]string{{"namespace", "diary"}, {"backupstore", "backups"}, {"secret", "varve-store", "-n", varveNamespace}} {
			if _, err := s.Cluster.Kubectl(context.Background(), nil, append([]string{"delete", "--ignore-not-found"}, args...)...); err != nil {
				t.Error(err)
			}
		}
	})
	// The result that the document promises.
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Minute)
	defer cancel()
	cmd := exec.CommandContext(ctx, "bash", "-euo", "pipefail", "-c", script.String())
	cmd.Dir = root
	cmd.Env = append(os.Environ(), "PATH="+s.Cluster.Bin+":"+os.Getenv("PATH"), "KUBECONFIG="+s.Cluster.Kubeconfig(),
		"BUCKET="+bucket.Bucket, "ENDPOINT="+bucket.Endpoint, "REGION="+bucket.Region, "PLAIN_HTTP=true",
		"ACCESS_KEY="+cluster.S3AccessKey, "SECRET_KEY="+cluster.S3SecretKey)
	out, err := cmd.CombinedOutput()
	if err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	lines := strings.Split(strings.TrimSpace(string(out)), "\n")
	if got := lines[len(lines)-1]; got != "dear diary" {
		t.Fatalf("the restored file has %q:\n%s", got, out)
	}
}
