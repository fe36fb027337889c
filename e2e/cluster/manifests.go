package cluster

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"path/filepath"
	"strings"

	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/util/yaml"
	sigyaml "sigs.k8s.io/yaml"
)

// upstream reads the definitions and the rights that came with the sidecars'
// modules, moved to SystemNamespace.
func (c *Cluster) upstream() (crds, rest []byte, err error) {
	files, err := filepath.Glob(filepath.Join(filepath.Dir(c.Bin), "manifests", "*.yaml"))
	if err != nil {
		return nil, nil, err
	}
	if len(files) == 0 {
		return nil, nil, fmt.Errorf("no manifests beside %s; remove that directory and build again", c.Bin)
	}
	var defs, others bytes.Buffer
	for _, f := range files {
		text, err := readFile(f)
		if err != nil {
			return nil, nil, err
		}
		objects, err := parseObjects(text)
		if err != nil {
			return nil, nil, fmt.Errorf("%s: %w", f, err)
		}
		for _, o := range objects {
			moveTo(o, SystemNamespace)
			b, err := sigyaml.Marshal(o.Object)
			if err != nil {
				return nil, nil, err
			}
			w := &others
			if o.GetKind() == "CustomResourceDefinition" {
				w = &defs
			}
			w.WriteString("---\n")
			w.Write(b)
		}
	}
	return defs.Bytes(), others.Bytes(), nil
}

func parseObjects(text string) ([]*unstructured.Unstructured, error) {
	var out []*unstructured.Unstructured
	d := yaml.NewYAMLOrJSONDecoder(strings.NewReader(text), 4096)
	for {
		o := &unstructured.Unstructured{}
		err := d.Decode(&o.Object)
		if errors.Is(err, io.EOF) {
			return out, nil
		}
		if err != nil {
			return nil, err
		}
		if len(o.Object) > 0 {
			out = append(out, o)
		}
	}
}

// moveTo puts service accounts, roles and bindings, and the subjects of the latter,
// into a namespace.
func moveTo(o *unstructured.Unstructured, namespace string) {
	switch o.GetKind() {
	case "ServiceAccount", "Role", "RoleBinding":
		o.SetNamespace(namespace)
	}
	subjects, ok, _ := unstructured.NestedSlice(o.Object, "subjects")
	if !ok {
		return
	}
	for _, s := range subjects {
		if m, ok := s.(map[string]any); ok && m["kind"] == "ServiceAccount" {
			m["namespace"] = namespace
		}
	}
	o.Object["subjects"] = subjects
}
