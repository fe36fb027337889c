package chart

import (
	"fmt"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"testing"

	"sigs.k8s.io/yaml"
)

const (
	chartDir = "../../deploy/helm/varve"
	plainDir = "../../deploy"
)

type object = map[string]any

func render(t *testing.T, values object) []byte {
	t.Helper()
	text, err := Render(chartDir, values)
	if err != nil {
		t.Fatal(err)
	}
	return text
}

// parse returns objects by kind and name, and fails on two of the same.
func parse(t *testing.T, text []byte) map[string]object {
	t.Helper()
	objects := map[string]object{}
	for _, doc := range strings.Split("\n"+string(text), "\n---\n") {
		var o object
		if err := yaml.UnmarshalStrict([]byte(doc), &o); err != nil {
			t.Fatalf("%v in\n%s", err, doc)
		}
		if o == nil {
			continue // comments
		}
		meta := o["metadata"].(object)
		id := fmt.Sprint(o["kind"], " ", meta["name"])
		if objects[id] != nil {
			t.Errorf("%s is there twice", id)
		}
		objects[id] = o
	}
	return objects
}

func TestPlainManifestsAreTheChart(t *testing.T) {
	admission := func(version string) []byte {
		t.Helper()
		text, err := RenderAdmission(chartDir, version)
		if err != nil {
			t.Fatal(err)
		}
		return text
	}
	for file, tc := range map[string]struct {
		text    []byte
		objects int // at least
	}{
		"varve.yaml":                   {render(t, PlainValues()), 20},
		"varve-admission-v1.yaml":      {admission("v1"), 2},
		"varve-admission-v1beta1.yaml": {admission("v1beta1"), 2},
	} {
		text, err := os.ReadFile(filepath.Join(plainDir, file))
		if err != nil {
			t.Fatal(err)
		}
		got, want := parse(t, text), parse(t, tc.text)
		if len(want) < tc.objects {
			t.Fatalf("the chart has %d objects only for %s", len(want), file)
		}
		for id, o := range want {
			if !reflect.DeepEqual(got[id], o) {
				t.Errorf("%s in %s is not as the chart has it; run make manifests", id, file)
			}
		}
		for id := range got {
			if want[id] == nil {
				t.Errorf("%s in %s is not in the chart; run make manifests", id, file)
			}
		}
	}
}

// The manifests are applied as a whole, so every supported Kubernetes must serve the API of
// each object; the admission policy's version is from later ones.
func TestPlainManifestsAreForEveryKubernetes(t *testing.T) {
	for id, o := range parse(t, render(t, PlainValues())) {
		// ValidatingAdmissionPolicy is served since Kubernetes 1.30.
		if strings.HasPrefix(o["apiVersion"].(string), "admissionregistration.k8s.io/") && !strings.HasPrefix(o["kind"].(string), "ValidatingAdmissionPolicy") {
			t.Errorf("%s is of %s", id, o["apiVersion"])
		}
	}
	for _, version := range []string{"v1", "v1beta1"} {
		text, err := RenderAdmission(chartDir, version)
		if err != nil {
			t.Fatal(err)
		}
		for id, o := range parse(t, text) {
			if o["apiVersion"] != "admissionregistration.k8s.io/"+version {
				t.Errorf("%s for %s is of %s", id, version, o["apiVersion"])
			}
		}
	}
}

func TestDefinitionsStay(t *testing.T) {
	files, err := os.ReadDir("../../deploy/crds")
	if err != nil {
		t.Fatal(err)
	}
	objects := parse(t, render(t, nil))
	for _, f := range files {
		plural, _, _ := strings.Cut(strings.TrimPrefix(f.Name(), "varve.io_"), ".")
		crd := objects["CustomResourceDefinition "+plural+".varve.io"]
		if crd == nil {
			t.Errorf("%s is not in the chart", f.Name())

			continue
		}
		if got := crd["metadata"].(object)["annotations"].(object)["helm.sh/resource-policy"]; got != "keep" {
			t.Errorf("%s goes with the release: %v", f.Name(), got)
		}
	}
	without := parse(t, render(t, object{"crds": object{"install": false}}))
	if len(without) != len(objects)-len(files) {
		t.Errorf("%d objects without definitions, %d with their %d", len(without), len(objects), len(files))
	}
}

func TestValues(t *testing.T) {
	const policy = "MutatingAdmissionPolicy varve-no-namespace-in-datasourceref"
	container := func(o map[string]object) object {
		spec := o["Deployment varve-controller"]["spec"].(object)["template"].(object)["spec"].(object)
		return spec["containers"].([]any)[0].(object)
	}
	for _, tc := range []struct {
		name   string
		values object
		check  func(o map[string]object) string
	}{
		{"Helm makes the namespace", nil, func(o map[string]object) string {
			if o["Namespace "+Namespace] != nil {
				return "the chart makes it too"
			}
			return ""
		}},
		{"no policy where the cluster has no such thing", nil, func(o map[string]object) string {
			if o[policy] != nil {
				return "there is one"
			}
			return ""
		}},
		{"policy of an older cluster", object{"admissionPolicy": object{"apiVersion": "v1beta1"}}, func(o map[string]object) string {
			if o[policy] == nil || o[policy]["apiVersion"] != "admissionregistration.k8s.io/v1beta1" {
				return "it is not v1beta1"
			}
			return ""
		}},
		{"pinned image", object{"image": object{"digest": "sha256:abc"}}, func(o map[string]object) string {
			c := container(o)
			image := c["image"]
			if image != "ghcr.io/varve-io/varve@sha256:abc" {
				return fmt.Sprint(image)
			}
			if !slices.Contains(c["args"].([]any), any("--image=ghcr.io/varve-io/varve@sha256:abc")) {
				return "movers run another image"
			}
			return ""
		}},
		{"more arguments", object{"controller": object{"extraArgs": []any{"--workers=2"}}}, func(o map[string]object) string {
			args := container(o)["args"].([]any)
			if args[0] != "controller" || args[len(args)-1] != "--workers=2" {
				return fmt.Sprint(args)
			}
			return ""
		}},
		{"stores on claims", object{"storeVolumes": []any{"nfs"}}, func(o map[string]object) string {
			mounts := container(o)["volumeMounts"].([]any)
			last := mounts[len(mounts)-1].(object)
			if last["mountPath"] != "/var/run/varve/volumes/nfs" {
				return fmt.Sprint(mounts)
			}
			return ""
		}},
		{"movers", object{"mover": object{"nonRoot": true, "nodeSelector": object{"disk": "fast"}}}, func(o map[string]object) string {
			text := o["ConfigMap varve-mover"]["data"].(object)["mover.yaml"].(string)
			if !strings.Contains(text, "disk: fast") || !slices.Contains(container(o)["args"].([]any), any("--mover-non-root")) {
				return text
			}
			return ""
		}},
		{"network policies", nil, func(o map[string]object) string {
			for _, name := range []string{"varve-controller", "varve-mover", "varve-mover-metadata"} {
				if p := o["NetworkPolicy "+name]; p == nil || p["metadata"].(object)["namespace"] != Namespace {
					return name + ": " + fmt.Sprint(p)
				}
			}
			return ""
		}},
		{"no network policies", object{"networkPolicy": object{"enabled": false}}, func(o map[string]object) string {
			for id := range o {
				if strings.HasPrefix(id, "NetworkPolicy ") {
					return "there is " + id
				}
			}
			return ""
		}},
		{"no metadata service", object{"networkPolicy": object{"metadata": false}}, func(o map[string]object) string {
			if o["NetworkPolicy varve-mover-metadata"] != nil {
				return "movers reach it"
			}
			for _, name := range []string{"varve-controller", "varve-mover"} {
				if text := fmt.Sprint(o["NetworkPolicy "+name]["spec"].(object)["egress"]); strings.Contains(text, "cidr:169.254") || !strings.Contains(text, "except:[169.254.0.0/16 ") {
					return name + ": " + text
				}
			}
			return ""
		}},
		{"more egress", object{"networkPolicy": object{"extraEgress": []any{object{"ports": []any{object{"port": 16443}}}}}, "metrics": object{"port": 9443}}, func(o map[string]object) string {
			for _, name := range []string{"varve-controller", "varve-mover"} {
				if text := fmt.Sprint(o["NetworkPolicy "+name]["spec"]); !strings.Contains(text, "port:16443") || strings.Contains(text, "port:9443") != (name == "varve-controller") {
					return name + ": " + text
				}
			}
			return ""
		}},
		{"scheduling", object{"controller": object{"nodeSelector": object{"a": "b"}, "priorityClassName": "high", "tolerations": []any{object{"operator": "Exists"}}}}, func(o map[string]object) string {
			spec := o["Deployment varve-controller"]["spec"].(object)["template"].(object)["spec"].(object)
			if spec["priorityClassName"] != "high" || spec["nodeSelector"].(object)["a"] != "b" || len(spec["tolerations"].([]any)) != 1 {
				return fmt.Sprint(spec)
			}
			return ""
		}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			if wrong := tc.check(parse(t, render(t, tc.values))); wrong != "" {
				t.Error(wrong)
			}
		})
	}
}

// The controller reads the movers' settings once, when it starts: an upgrade that changes these
// must restart it, and one that does not must not.
func TestControllerStartsAnewForMovers(t *testing.T) {
	template := func(values object) object {
		return parse(t, render(t, values))["Deployment varve-controller"]["spec"].(object)["template"].(object)
	}
	was := template(nil)
	for _, tc := range []struct {
		values object
		anew   bool
	}{
		{object{"mover": object{"nodeSelector": object{"disk": "fast"}}}, true},
		{object{"mover": object{"tolerations": []any{object{"operator": "Exists"}}}}, true},
		{object{"mover": object{"priorityClassName": "low"}}, true},
		{object{"mover": object{"resources": object{"limits": object{"memory": "4Gi"}}}}, true},
		{object{"controller": object{"replicas": 3}}, false},
		{object{"mover": object{"serviceAccountAnnotations": object{"a": "b"}}}, false},
	} {
		if got := !reflect.DeepEqual(template(tc.values), was); got != tc.anew {
			t.Errorf("%v: started anew is %v", tc.values, got)
		}
	}
}

// No wildcard, no Secret of a tenant, and no right to escalate.
func TestRightsAreNamed(t *testing.T) {
	for id, o := range parse(t, render(t, PlainValues())) {
		rules, _ := o["rules"].([]any)
		for _, r := range rules {
			r := r.(object)
			for _, key := range []string{"apiGroups", "resources", "verbs", "nonResourceURLs"} {
				values, _ := r[key].([]any)
				for _, v := range values {
					switch {
					case v == "*":
						t.Errorf("%s has a wildcard in %s", id, key)
					case v == "secrets" && o["kind"] == "ClusterRole" && id != "ClusterRole varve-tenant-secrets":
						t.Errorf("%s opens Secrets everywhere", id)
					case v == "pods/exec" && id == "ClusterRole varve-hooks": // bound in the named namespaces
					case v == "pods/exec" && id == "Role varve-controller": // dumps go to movers, in Varve's own namespace
					case v == "escalate", v == "bind", v == "impersonate", v == "pods/exec":
						t.Errorf("%s may %v", id, v)
					}
				}
			}
		}
	}
}
