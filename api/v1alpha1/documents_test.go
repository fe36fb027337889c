package v1alpha1

import (
	"errors"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apiextensions-apiserver/pkg/apiserver/schema"
	"k8s.io/apiextensions-apiserver/pkg/apiserver/schema/defaulting"
	"k8s.io/apiextensions-apiserver/pkg/apiserver/schema/pruning"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/util/json"
	"sigs.k8s.io/yaml"
)

// fragments are the kinds of examples that show a part of an object: document and first field.
var fragments = map[string]string{
	"cbt-csi.md volumes":              "Pod",
	"hooks.md group":                  "BackupPolicy",
	"hooks.md hooks":                  "BackupPolicy",
	"kubernetes.md namespaceIdentity": "BackupStore",
	"kubernetes.md pins":              "BackupStore",
	"kubernetes.md storage":           "BackupStore",
	"repository.md password-file":     "", // settings of the command; a test of cmd/varve uses them
}

// example is YAML of a document.
type example struct{ file, text string }

var (
	fence    = regexp.MustCompile("(?ms)^```yaml\n(.*?)^```$")
	heredoc  = regexp.MustCompile(`(?ms)<<'?YAML'?\n(.*?)^YAML$`)
	indented = regexp.MustCompile(`(?m)^\n((?: {4}.*\n)+)`)
	object   = regexp.MustCompile(`^(?:(?:apiVersion|kind): \S+|[A-Za-z]+:)\n`)
	variable = regexp.MustCompile(`\$\([^)]*\)|\$[A-Z_]+`)
)

// examples finds those of a document: fenced, given to a command, or indented.
func examples(file, text string) []example {
	var out []example
	add := func(text string) {
		for part := range strings.SplitSeq(text, "\n---\n") {
			out = append(out, example{file, part})
		}
	}
	for _, m := range fence.FindAllStringSubmatch(text, -1) {
		add(m[1])
	}
	for _, m := range heredoc.FindAllStringSubmatch(text, -1) {
		add(variable.ReplaceAllStringFunc(m[1], func(name string) string {
			if name == "$PLAIN_HTTP" {
				return "false"
			}
			return "x"
		}))
	}
	for _, m := range indented.FindAllStringSubmatch(text, -1) {
		if block := strings.ReplaceAll("\n"+m[1], "\n    ", "\n")[1:]; object.MatchString(block) {
			add(block)
		}
	}
	return out
}

// complete makes an object of an example: itself, or a sample of its kind with the fields that a
// fragment shows. It returns the fragment's row, if any; the object is nil if there is none to check.
func (e example) complete() (o map[string]any, row string, err error) {
	text, err := yaml.YAMLToJSONStrict([]byte(e.text))
	if err != nil {
		return nil, "", err
	}
	if err := json.Unmarshal(text, &o); err != nil {
		return nil, "", err
	}
	if o["apiVersion"] != nil {
		return o, "", nil
	}
	if o["kind"] != nil { // of Kubernetes
		o["apiVersion"] = "v1"
		return o, "", nil
	}
	shown, wrapped := o["spec"].(map[string]any)
	if !wrapped {
		shown = o
	} else if len(o) != 1 {
		return nil, "", errors.New("a spec beside other fields, without a kind")
	}
	first := regexp.MustCompile(`(?m)^ *([\w-]+):`).FindAllStringSubmatch(e.text, 2)
	name := first[0][1]
	if wrapped {
		name = first[1][1]
	}
	row = e.file + " " + name
	kind, known := fragments[row]
	if !known {
		return nil, "", fmt.Errorf("fragments has no row %q", row)
	}
	if kind == "" {
		return nil, row, nil
	}
	o = map[string]any{"apiVersion": "v1", "kind": kind, "metadata": map[string]any{"name": "x"}, "spec": map[string]any{}}
	if sample, ours := samples[kind]; ours {
		o["apiVersion"] = GroupVersion.String()
		var spec map[string]any
		if err := yaml.Unmarshal([]byte(sample), &spec); err != nil {
			return nil, row, err
		}
		o["spec"] = spec
	}
	maps.Copy(o["spec"].(map[string]any), shown)
	return o, row, nil
}

// admitted says why the API server would reject an object or drop one of its fields.
func admitted(t *testing.T, all map[string]*definition, o map[string]any) error {
	t.Helper()
	kind, _ := o["kind"].(string)
	var typed any
	d := all[kind]
	if d != nil && o["apiVersion"] == GroupVersion.String() {
		s := runtime.NewScheme()
		if err := AddToScheme(s); err != nil {
			t.Fatal(err)
		}
		var err error
		if typed, err = s.New(GroupVersion.WithKind(kind)); err != nil {
			return err
		}
	} else {
		d = nil
		typed = map[string]any{"Pod": &corev1.Pod{}, "Secret": &corev1.Secret{}, "PersistentVolumeClaim": &corev1.PersistentVolumeClaim{}}[kind]
		if typed == nil || o["apiVersion"] != "v1" {
			return fmt.Errorf("there is no %q of %q", kind, o["apiVersion"])
		}
	}
	text, err := json.Marshal(o)
	if err != nil {
		return err
	}
	if err := yaml.UnmarshalStrict(text, typed); err != nil {
		return err
	}
	if d == nil {
		return nil
	}
	if unknown := pruning.PruneWithOptions(runtime.DeepCopyJSON(o), d.structural, true, schema.UnknownFieldPathOptions{TrackUnknownFieldPaths: true}); len(unknown) > 0 {
		return fmt.Errorf("unknown fields %v", unknown)
	}
	defaulting.Default(o, d.structural)
	return d.refuses(t, o)
}

// The API server admits each example of the documents as it is.
func TestDocumentsAreAdmitted(t *testing.T) {
	files, err := filepath.Glob("../../docs/*.md")
	if err != nil || len(files) < 10 {
		t.Fatalf("%d documents (%v)", len(files), err)
	}
	all := definitions(t)
	unused := maps.Clone(fragments)
	kinds := map[string]int{}
	for _, file := range append(files, "../../README.md") {
		text, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		for _, e := range examples(filepath.Base(file), string(text)) {
			o, row, err := e.complete()
			delete(unused, row)
			if err == nil && o != nil {
				kinds[o["kind"].(string)]++
				err = admitted(t, all, o)
			}
			if err != nil {
				t.Errorf("%s: %v in\n%s", file, err, e.text)
			}
		}
	}
	if len(unused) > 0 {
		t.Errorf("no document has %v", slices.Sorted(maps.Keys(unused)))
	}
	for kind, n := range map[string]int{"BackupPolicy": 4, "BackupStore": 4, "DumpRestore": 1, "PersistentVolumeClaim": 3, "RecoverySource": 1, "VolumeBackup": 1, "VolumeRestore": 1} {
		if kinds[kind] < n {
			t.Errorf("%d examples of a %s were found, not %d", kinds[kind], kind, n)
		}
	}
}

// Each kind of mistake in an example is found.
func TestWrongDocumentsAreNotAdmitted(t *testing.T) {
	all := definitions(t)
	for says, text := range map[string]string{
		"unknown field":              "```yaml\nspec:\n  group: true\n  selecter: {}\n```\n",
		"Unsupported value":          "```yaml\n  hooks:\n  - {name: a, recipe: Oracle}\n```\n",
		"already set in map":         "```yaml\nspec:\n  group: true\n  group: true\n```\n",
		"Required value":             "sh <<'YAML'\napiVersion: varve.io/v1alpha1\nkind: DumpRestore\nmetadata: {name: x}\nspec:\n  storeRef: {name: backups}\n  from: {volume: a}\nYAML\n",
		"one of recipe, command and": "```yaml\n  hooks:\n  - {name: a, recipe: Redis, dump: {command: a}}\n```\n",
		`no "Policy" of "varve.io/`:  "sh <<YAML\napiVersion: varve.io/v1alpha1\nkind: Policy\nYAML\n",
		`unknown field "labls"`:      "\n\n    apiVersion: varve.io/v1alpha1\n    kind: VolumeBackup\n    metadata: {name: x, labls: {}}\n    spec: {claimName: c, storeRef: {name: main}}\n\n",
		`unknown field "dataSourceR`: "\n\n    kind: PersistentVolumeClaim\n    spec:\n      dataSourceReff: {}\n\n",
		`no row "hooks.md retentio`:  "```yaml\nspec:\n  retention: {}\n```\n",
		"cannot unmarshal string":    "sh <<YAML\napiVersion: varve.io/v1alpha1\nkind: BackupPolicy\nmetadata: {name: x}\nspec:\n  storeRef: {name: main}\n  schedule: {cron: '@daily'}\n  retention: {latest: $(date)}\nYAML\n",
	} {
		found := examples("hooks.md", text)
		if len(found) != 1 {
			t.Errorf("%d examples in %q", len(found), text)
			continue
		}
		o, _, err := found[0].complete()
		if err == nil {
			err = admitted(t, all, o)
		}
		if err == nil || !strings.Contains(err.Error(), says) {
			t.Errorf("%s: %v", says, err)
		}
	}
}
