package v1alpha1_test

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	apiextensionsv1 "k8s.io/apiextensions-apiserver/pkg/apis/apiextensions/v1"
	"sigs.k8s.io/yaml"
)

// Each field that a user sets has an example. Enumerations need none, nor do Kubernetes' own
// types (selectors, references).
func TestEachFieldHasAnExample(t *testing.T) {
	files, err := filepath.Glob("../../deploy/crds/*.yaml")
	if err != nil || len(files) < 7 {
		t.Fatalf("%d definitions in deploy/crds (%v)", len(files), err)
	}
	fields := 0
	for _, file := range files {
		text, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		var crd apiextensionsv1.CustomResourceDefinition
		if err := yaml.UnmarshalStrict(text, &crd); err != nil {
			t.Fatalf("%s: %v", file, err)
		}
		names := crd.Spec.Names
		if len(names.ShortNames) == 0 || len(crd.Spec.Versions[0].AdditionalPrinterColumns) == 0 {
			t.Errorf("%s has no short name, or no columns", names.Kind)
		}
		if names.Kind == "VolumePopulation" || names.Kind == "VolumeReplacement" {
			continue // Varve's own
		}
		spec := crd.Spec.Versions[0].Schema.OpenAPIV3Schema.Properties["spec"]
		fields += walk(t, names.Kind+".spec", spec)
	}
	if fields < 100 {
		t.Errorf("only %d fields were looked at", fields)
	}
}

func walk(t *testing.T, at string, s apiextensionsv1.JSONSchemaProps) (fields int) {
	t.Helper()
	if s.Items != nil && s.Items.Schema != nil {
		s = *s.Items.Schema
	}
	for name, p := range s.Properties {
		where := at + "." + name
		fields++
		if err := example(p); err != nil {
			t.Errorf("%s: %v", where, err)
		}
		if _, selects := p.Properties["matchLabels"]; !selects && name != "credentialsSecretRef" {
			fields += walk(t, where, p)
		}
	}
	return fields
}

// example checks that a field's description ends in an example of the field's type.
func example(p apiextensionsv1.JSONSchemaProps) error {
	if len(p.Enum) > 0 {
		return nil
	}
	_, text, ok := strings.Cut(p.Description, "Example:")
	if !ok {
		return fmt.Errorf("no example in %q", p.Description)
	}
	var v any
	if err := yaml.Unmarshal([]byte(text), &v); err != nil {
		return fmt.Errorf("the example is not YAML: %w", err)
	}
	var is string
	switch v.(type) {
	case string:
		is = "string"
	case bool:
		is = "boolean"
	case float64, int64:
		is = "integer"
	case []any:
		is = "array"
	case map[string]any:
		is = "object"
	}
	if is != p.Type && !p.XIntOrString {
		return fmt.Errorf("the example %s is of type %q, the field of %q", strings.TrimSpace(text), is, p.Type)
	}
	return nil
}
