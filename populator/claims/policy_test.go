package claims

import (
	"errors"
	"maps"
	"os"
	"strings"
	"testing"

	admissionregistrationv1 "k8s.io/api/admissionregistration/v1"
	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/equality"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apiserver/pkg/admission"
	plugincel "k8s.io/apiserver/pkg/admission/plugin/cel"
	"k8s.io/apiserver/pkg/admission/plugin/policy/mutating/patch"
	"k8s.io/apiserver/pkg/admission/plugin/webhook/matchconditions"
	celconfig "k8s.io/apiserver/pkg/apis/cel"
	"k8s.io/apiserver/pkg/cel/environment"
	"sigs.k8s.io/yaml"
)

// policy is the shipped admission policy, evaluated as the API server does.
type policy struct {
	matcher  matchconditions.Matcher
	patchers []patch.Patcher
	objects  admission.ObjectInterfaces
}

func readPolicy(t *testing.T, file string) *policy {
	t.Helper()
	text, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	var o admissionregistrationv1.MutatingAdmissionPolicy
	for _, doc := range strings.Split(string(text), "\n---\n") {
		if strings.Contains(doc, "\nkind: MutatingAdmissionPolicy\n") {
			if err := yaml.UnmarshalStrict([]byte(doc), &o); err != nil {
				t.Fatal(err)
			}
		}
	}
	if len(o.Spec.MatchConditions) == 0 || len(o.Spec.Mutations) == 0 {
		t.Fatalf("no policy in %s", file)
	}
	s := runtime.NewScheme()
	if err := corev1.AddToScheme(s); err != nil {
		t.Fatal(err)
	}
	compiler, err := plugincel.NewCompositedCompiler(environment.MustBaseEnvSet(environment.DefaultCompatibilityVersion()))
	if err != nil {
		t.Fatal(err)
	}
	declared := plugincel.OptionalVariableDeclarations{HasAuthorizer: true}
	var conditions []plugincel.ExpressionAccessor
	for i := range o.Spec.MatchConditions {
		conditions = append(conditions, (*matchconditions.MatchCondition)(&o.Spec.MatchConditions[i]))
	}
	p := &policy{
		matcher: matchconditions.NewMatcher(compiler.CompileCondition(conditions, declared, environment.StoredExpressions), o.Spec.FailurePolicy, "policy", "mutate", o.Name),
		objects: admission.NewObjectInterfacesFromScheme(s),
	}
	declared.HasPatchTypes = true
	for _, m := range o.Spec.Mutations {
		compiled := compiler.CompileMutatingEvaluator(&patch.JSONPatchCondition{Expression: m.JSONPatch.Expression}, declared, environment.StoredExpressions)
		if err := errors.Join(compiled.CompilationErrors()...); err != nil {
			t.Fatal(err)
		}
		p.patchers = append(p.patchers, patch.NewJSONPatcher(compiled))
	}
	return p
}

// admit returns a created claim after admission.
func (p *policy) admit(t *testing.T, claim *corev1.PersistentVolumeClaim) *corev1.PersistentVolumeClaim {
	t.Helper()
	kind, resource := corev1.SchemeGroupVersion.WithKind("PersistentVolumeClaim"), corev1.SchemeGroupVersion.WithResource("persistentvolumeclaims")
	attrs, err := admission.NewVersionedAttributes(
		admission.NewAttributesRecord(claim.DeepCopy(), nil, kind, claim.Namespace, claim.Name, resource, "", admission.Create, &metav1.CreateOptions{}, false, nil), kind, p.objects)
	if err != nil {
		t.Fatal(err)
	}
	if match := p.matcher.Match(t.Context(), attrs, nil, nil); match.Error != nil {
		t.Fatal(match.Error)
	} else if !match.Matches {
		return claim
	}
	for _, patcher := range p.patchers {
		attrs.VersionedObject, err = patcher.Patch(t.Context(), patch.Request{MatchedResource: resource, VersionedAttributes: attrs, ObjectInterfaces: p.objects}, celconfig.RuntimeCELCostBudget)
		if err != nil {
			t.Fatal(err)
		}
	}
	return attrs.VersionedObject.(*corev1.PersistentVolumeClaim)
}

// A claim that names Varve keeps its reference, which the API server would drop with a
// namespace in it. It is filled only if that namespace was its own.
func TestAdmissionPolicy(t *testing.T) {
	for _, file := range []string{"../../deploy/varve-admission-v1.yaml", "../../deploy/varve-admission-v1beta1.yaml"} {
		p := readPolicy(t, file)
		for name, tc := range map[string]struct {
			namespace   *string
			group       string
			annotations map[string]string
			noted       string
			asIs        bool
		}{
			"no namespace":       {group: "varve.io", asIs: true},
			"another":            {namespace: new("other"), group: "varve.io", noted: "other/last"},
			"another, annotated": {namespace: new("other"), group: "varve.io", annotations: map[string]string{"a": "b"}, noted: "other/last"},
			"its own":            {namespace: new(userNS), group: "varve.io"},
			"its own, annotated": {namespace: new(userNS), group: "varve.io", annotations: map[string]string{"a": "b"}},
			"empty":              {namespace: new(""), group: "varve.io"},
			"of others":          {namespace: new("other"), group: "other.io", asIs: true},
		} {
			c := newClaim(corev1.PersistentVolumeBlock, "fast")
			c.Annotations = tc.annotations
			c.Spec.DataSourceRef.APIGroup, c.Spec.DataSourceRef.Namespace = &tc.group, tc.namespace
			want := c.DeepCopy()
			if !tc.asIs {
				want.Spec.DataSourceRef.Namespace = nil
			}
			if tc.noted != "" {
				metav1.SetMetaDataAnnotation(&want.ObjectMeta, AnnotationReference, tc.noted)
			}
			if got := p.admit(t, c); !maps.Equal(got.Annotations, want.Annotations) || !equality.Semantic.DeepEqual(got.Spec, want.Spec) {
				t.Errorf("%s: %s: it becomes %v with %+v, want %v with %+v", file, name, got.Annotations, got.Spec.DataSourceRef, want.Annotations, want.Spec.DataSourceRef)
			}
		}
	}
}
