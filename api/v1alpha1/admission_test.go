package v1alpha1

import (
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"k8s.io/apiextensions-apiserver/pkg/apis/apiextensions"
	apiextensionsv1 "k8s.io/apiextensions-apiserver/pkg/apis/apiextensions/v1"
	crdvalidation "k8s.io/apiextensions-apiserver/pkg/apis/apiextensions/validation"
	"k8s.io/apiextensions-apiserver/pkg/apiserver/schema"
	"k8s.io/apiextensions-apiserver/pkg/apiserver/schema/cel"
	"k8s.io/apiextensions-apiserver/pkg/apiserver/validation"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/util/json"
	celconfig "k8s.io/apiserver/pkg/apis/cel"
	"sigs.k8s.io/yaml"
)

// One stored object that Go cannot decode makes every list of its kind fail in the
// controller, for all namespaces. So what a definition admits must decode, and must still
// be admitted once encoded again, since fields of policies are copied to their runs.

// samples are objects with only the required fields.
var samples = map[string]string{
	"BackupPolicy":      "{storeRef: {name: main}, schedule: {cron: '@daily'}}",
	"BackupStore":       "{storage: {s3: {bucket: b}}, credentialsSecretRef: {name: s}, clusterName: c}",
	"DumpRestore":       "{storeRef: {name: main}, from: {volume: data.sql}, into: {command: psql, podSelector: {}}}",
	"ProtectedVolume":   "{claimName: c, storeRef: {name: main}}",
	"RecoverySource":    "{storeRef: {name: main}}",
	"Repository":        "{storage: {s3: {bucket: b}}, credentialsSecretRef: {name: s}, clusterName: c}",
	"VolumeBackup":      "{claimName: c, storeRef: {name: main}}",
	"VolumePopulation":  "{claim: {namespace: shop, name: c, uid: u}, storeRef: {name: main}, volumeMode: Block}",
	"VolumeReplacement": "{volumes: [{claim: {namespace: shop, name: c, uid: u}, volume: v, old: '{}', new: '{}', oldPolicy: Delete, newPolicy: Delete, source: s}]}",
	"VolumeRestore":     "{claimName: c, storeRef: {name: main}}",
}

// definition is the definition by which the API server validates objects of a kind.
type definition struct {
	kind       string
	spec       schema.Structural
	structural *schema.Structural
	values     validation.SchemaValidator
	rules      *cel.Validator
}

func definitions(t *testing.T) map[string]*definition {
	t.Helper()
	files, err := filepath.Glob("../../deploy/crds/*.yaml")
	if err != nil || len(files) != len(samples) {
		t.Fatalf("%d definitions in deploy/crds, %d samples (%v)", len(files), len(samples), err)
	}
	out := map[string]*definition{}
	for _, file := range files {
		d := define(t, file)
		out[d.kind] = d
	}
	return out
}

func define(t *testing.T, file string) *definition {
	t.Helper()
	text, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	var crd apiextensionsv1.CustomResourceDefinition
	if err := yaml.UnmarshalStrict(text, &crd); err != nil {
		t.Fatalf("%s: %v", file, err)
	}
	apiextensionsv1.SetDefaults_CustomResourceDefinition(&crd)
	apiextensionsv1.SetDefaults_CustomResourceDefinitionSpec(&crd.Spec)
	crd.Status.StoredVersions = []string{crd.Spec.Versions[0].Name}
	var internal apiextensions.CustomResourceDefinition
	if err := apiextensionsv1.Convert_v1_CustomResourceDefinition_To_apiextensions_CustomResourceDefinition(&crd, &internal, nil); err != nil {
		t.Fatalf("%s: %v", file, err)
	}
	// Rules must compile, and cost no more than the API server's budget.
	if errs := crdvalidation.ValidateCustomResourceDefinition(t.Context(), &internal); len(errs) > 0 {
		t.Fatalf("%s: %v", file, errs.ToAggregate())
	}
	props := internal.Spec.Validation.OpenAPIV3Schema
	d := &definition{kind: crd.Spec.Names.Kind}
	if d.structural, err = schema.NewStructural(props); err != nil {
		t.Fatalf("%s: %v", file, err)
	}
	if d.values, _, err = validation.NewSchemaValidator(props); err != nil {
		t.Fatalf("%s: %v", file, err)
	}
	d.rules = cel.NewValidator(d.structural, true, celconfig.PerCallLimit)
	d.spec = d.structural.Properties["spec"]
	return d
}

// refuses returns why the API server would reject an object; nil if it would not.
func (d *definition) refuses(t *testing.T, o map[string]any) error {
	t.Helper()
	errs := validation.ValidateCustomResource(nil, o, d.values)
	if d.rules != nil {
		more, _ := d.rules.Validate(t.Context(), nil, d.structural, o, nil, celconfig.RuntimeCELCostBudget)
		errs = append(errs, more...)
	}
	return errs.ToAggregate()
}

// with returns the kind's sample with one field of the spec set to a value, which is JSON.
func (d *definition) with(t *testing.T, path []string, value string) map[string]any {
	t.Helper()
	var spec map[string]any
	if err := yaml.Unmarshal([]byte(samples[d.kind]), &spec); err != nil {
		t.Fatal(err)
	}
	o := map[string]any{"apiVersion": "varve.io/v1alpha1", "kind": d.kind, "metadata": map[string]any{"name": "x"}, "spec": spec}
	at := spec
	for _, name := range path[:len(path)-1] {
		if at[name] == nil {
			at[name] = map[string]any{}
		}
		at = at[name].(map[string]any)
	}
	var v any
	if err := json.Unmarshal([]byte(value), &v); err != nil {
		t.Fatalf("%s: %v", value, err)
	}
	at[path[len(path)-1]] = v
	return o
}

// decodes checks the rule above for an admitted object.
func (d *definition) decodes(t *testing.T, what string, o map[string]any) {
	t.Helper()
	s := runtime.NewScheme()
	if err := AddToScheme(s); err != nil {
		t.Fatal(err)
	}
	typed, err := s.New(GroupVersion.WithKind(d.kind))
	if err != nil {
		t.Fatal(err)
	}
	text, err := json.Marshal(o)
	if err != nil {
		t.Fatal(err)
	}
	if err := json.Unmarshal(text, typed); err != nil {
		t.Errorf("%s is admitted and cannot be decoded: %v", what, err)
		return
	}
	if text, err = json.Marshal(typed); err != nil {
		t.Errorf("%s is admitted and cannot be encoded again: %v", what, err)
		return
	}
	var again map[string]any
	if err := json.Unmarshal(text, &again); err != nil {
		t.Fatal(err)
	}
	if err := d.refuses(t, again); err != nil {
		t.Errorf("%s is admitted and, written by Go, not any more: %v", what, err)
	}
}

// fields returns the paths of all fields below a schema.
func fields(s schema.Structural, at ...string) [][]string {
	var out [][]string
	for name, p := range s.Properties {
		path := append(slices.Clone(at), name)
		out = append(append(out, path), fields(p, path...)...)
	}
	slices.SortFunc(out, slices.Compare)
	return out
}

var hostile = []string{
	`""`, `" "`, `"0"`, `"1"`, `"-1"`, `"x"`, `0`, `-1`, `1`, `1.5`, `5.0`, `1e3`, `1e30`, `-1e300`, `2147483648`, `9223372036854775808`, `true`, `{}`, `[]`, `[""]`, `{"a":"b"}`,
	`"30d"`, `"1w"`, `"1y"`, `"-1h"`, `"+1h"`, `"h"`, `"1h-30m"`, `"99999999999999h"`, `"999999h999999h999999h"`, `"876001h"`, `"1e3h"`, `"1 h"`, `"1h\n"`, `"1H"`, `"P30D"`, `"PT1H"`, `"1.2.3h"`, `".5h"`, `"1.h"`, `"1µs"`, `"0.0000001h"`,
	`"2026-11-21t06:00:00z"`, `"2026-11-21T06:00:00z"`, `"2026-11-21 06:00:00Z"`, `"2026-11-21"`, `"2026-13-01T00:00:00Z"`, `"2026-02-30T00:00:00Z"`, `"2026-11-21T24:00:00Z"`, `"2026-11-21T23:59:60Z"`,
	`"2026-11-21T06:00:00"`, `"2026-11-21T06:00:00,5Z"`, `"2026-11-21T06:00:00x5Z"`, `"2026-11-21T06:00:00+99:99"`, `"2026-11-21T06:00:00+2:00"`, `"0000-01-01T00:00:00+23:59"`, `"9999-12-31T23:59:59-23:00"`, `"2026-11-21T06:00:00Z\n"`,
	`"1e1.5"`, `"1e"`, `"1Kii"`, `"50mi"`, `"-5Mi"`, `"1e999"`, `"1e-999"`, `"1e9999999999999999999"`, `"999999999999999999999999Ei"`, `"0x10"`, `".Mi"`,
}

func TestWhatIsAdmittedDecodes(t *testing.T) {
	for kind, d := range definitions(t) {
		if err := d.refuses(t, d.with(t, []string{"nothing"}, `""`)); err != nil {
			t.Fatalf("the sample of %s: %v", kind, err)
		}
		for _, path := range fields(d.spec) {
			for _, value := range hostile {
				o := d.with(t, path, value)
				if d.refuses(t, o) == nil {
					d.decodes(t, fmt.Sprintf("%s.%s: %s", kind, strings.Join(path, "."), value), o)
				}
			}
		}
	}
}

// text is what is decoded by special code.
type text struct {
	kind string
	path string
}

var (
	durations = []text{
		{"BackupPolicy", "fullEvery"}, {"BackupPolicy", "schedule.spread"}, {"VolumeBackup", "ttl"},
	}
	positive = []text{
		{"BackupPolicy", "maxBaseAge"}, {"BackupPolicy", "schedule.startingDeadline"}, {"BackupPolicy", "retention.within"}, {"VolumeBackup", "retention.within"}, {"BackupStore", "retentionFloor.age"},
	}
	times      = []text{{"VolumeBackup", "startBefore"}, {"RecoverySource", "at.time"}, {"VolumePopulation", "pointTime"}}
	quantities = []text{
		{"BackupStore", "limits.uploadPerSecond"}, {"BackupStore", "limits.downloadPerSecond"},
		{"Repository", "limits.uploadPerSecond"}, {"Repository", "limits.downloadPerSecond"},
	}
)

// Usual values are admitted, and likely mistakes are refused with a hint.
func TestValuesOfUsers(t *testing.T) {
	all := definitions(t)
	someTime := slices.Concat(durations, positive)
	for _, tc := range []struct {
		of    []text
		value string
		wrong string // text of the refusal; empty if it is admitted
	}{
		{someTime, `"720h"`, ""}, {someTime, `"30m"`, ""}, {someTime, `"1h30m"`, ""}, {someTime, `"1h0m0s"`, ""}, {someTime, `"1.5h"`, ""}, {someTime, `"90s"`, ""},
		{someTime, `"500ms"`, ""}, {someTime, `"876000h"`, ""}, {someTime, `"1.5s"`, ""},
		{someTime, `"30d"`, "not days"}, {someTime, `"-1h"`, "such as 720h"}, {someTime, `"1h-30m"`, "such as 720h"}, {someTime, `"99999999999999h"`, "such as 720h"},
		{someTime, `"876001h"`, "such as 720h"}, {someTime, `""`, "such as 720h"}, {someTime, `3600`, "must be of type string"},
		{durations, `"0s"`, ""}, {positive, `"0s"`, "more than none"}, {positive, `"0h0.000m"`, "more than none"},
		{times, `"2026-11-21T06:00:00Z"`, ""}, {times, `"9999-12-31T23:59:59Z"`, ""}, {times, `"2026-11-21T06:00:00.123456789Z"`, ""}, {times, `"2026-11-21T06:00:00+05:30"`, ""}, {times, `"2024-02-29T23:59:59-08:00"`, ""},
		{times, `"2026-11-21t06:00:00z"`, "such as 2026"}, {times, `"2026-13-01T00:00:00Z"`, "such as 2026"}, {times, `"2026-02-30T00:00:00Z"`, "such as 2026"},
		{times, `"2026-11-21"`, "such as 2026"}, {times, `[]`, "such as 2026"}, {times, `"9999-12-31T23:59:59-01:00"`, "such as 2026"},
		{quantities, `"50Mi"`, ""}, {quantities, `"1G"`, ""}, {quantities, `"1.5Gi"`, ""}, {quantities, `"1e6"`, ""}, {quantities, `1000000`, ""}, {quantities, `"0"`, ""}, {quantities, `0`, ""},
		{quantities, `"1e1.5"`, "such as 50Mi"}, {quantities, `"-5Mi"`, "not below 0"}, {quantities, `-5`, "not below 0"}, {quantities, `"50mi"`, "such as 50Mi"},
	} {
		for _, f := range tc.of {
			d := all[f.kind]
			o := d.with(t, strings.Split(f.path, "."), tc.value)
			what := fmt.Sprintf("%s.%s: %s", f.kind, f.path, tc.value)
			err := d.refuses(t, o)
			switch {
			case tc.wrong == "" && err != nil:
				t.Errorf("%s: %v", what, err)
			case tc.wrong == "":
				d.decodes(t, what, o)
			case err == nil:
				t.Errorf("%s is admitted", what)
			case !strings.Contains(err.Error(), tc.wrong):
				t.Errorf("%s: %v, which does not say %q", what, err, tc.wrong)
			}
		}
	}
}

// Values composed of pieces, valid and invalid.
func TestWhatIsAdmittedOfAnyPiecesDecodes(t *testing.T) {
	numbers := []string{"", "0", "1", "30", "999999", "999999999999", "-1", "+2"}
	fractions := []string{"", "", ".", ".5", ".0001", ",5"}
	units := []string{"", "h", "m", "s", "ms", "us", "µs", "ns", "d", " h"}
	rng := rand.New(rand.NewPCG(1, 2))
	all := definitions(t)
	for _, tc := range []struct {
		of     []text
		pieces [][]string // one of each
	}{
		{slices.Concat(durations, positive), [][]string{numbers, fractions, units, {"", "30m", "1.5s", "-1s", "999999h"}}},
		{times, [][]string{
			{"2026-11-21", "2024-02-29", "2025-02-29", "0000-01-01", "0001-01-01", "9999-12-31"}, {"T", "T", "t", " "},
			{"06:00:00", "23:59:59", "24:00:00", "06:00:60", "6:00:00"}, {"", "", ".5", ".", ",5", ".1234567890"}, {"", "Z", "Z", "z", "+02:00", "-23:59", "-24:60", "+99:99"},
		}},
		{quantities, [][]string{numbers, fractions, {"", "", "e", "E", "K", "k", "M", "G", "P", "E"}, {"", "i", "n", "u", "m", "6", "-6", "1.5", "200"}}},
	} {
		for _, f := range tc.of {
			d, path := all[f.kind], strings.Split(f.path, ".")
			admitted := 0
			for range 200 {
				var b strings.Builder
				for _, p := range tc.pieces {
					b.WriteString(p[rng.IntN(len(p))])
				}
				value := fmt.Sprintf("%q", b.String())
				o := d.with(t, path, value)
				if d.refuses(t, o) == nil {
					admitted++
					d.decodes(t, fmt.Sprintf("%s.%s: %s", f.kind, f.path, value), o)
				}
			}
			if admitted == 0 {
				t.Errorf("nothing was admitted for %s.%s", f.kind, f.path)
			}
		}
	}
}

// One of a list's objects, or a field that needs another, in the API's form.
func TestObjectsOfUsers(t *testing.T) {
	all := definitions(t)
	for _, tc := range []struct {
		kind, path, value string
		wrong             string // text of the refusal; empty if it is admitted
	}{
		{"BackupStore", "retentionFloor", `{"points": 3, "age": "168h"}`, ""},
		{"BackupStore", "retentionFloor", `{"points": 3}`, ""},
		{"BackupStore", "retentionFloor", `{"age": "168h"}`, ""},
		{"BackupStore", "retentionFloor", `{}`, "points, age, or both"},
		{"BackupStore", "retentionFloor", `{"points": 0, "age": "168h"}`, "greater than or equal to 1"},
		{"BackupStore", "pins", `[{"id": "3f1c9a7be2d04c51", "reason": "case 1234"}, {"id": "3f1c9a7b"}]`, ""},
		{"BackupStore", "pins", `[{"id": "../../etc"}]`, "should match"},
		{"BackupStore", "pins", `[{"id": "3f1c9a7b", "reason": "two\nlines"}]`, "should match"},
		{"Repository", "storage", `{"volume": {"claimName": "shelf"}}`, "a claim as storage is for BackupStores only"},
		{"Repository", "storage", `{"rclone": {"remotePath": "a:b"}}`, "rclone is for BackupStores only"},
		{"Repository", "serviceAccountName", `"varve-mover"`, "service account of Varve's namespace is for BackupStores only"},
	} {
		d := all[tc.kind]
		o := d.with(t, strings.Split(tc.path, "."), tc.value)
		what := fmt.Sprintf("%s.%s: %s", tc.kind, tc.path, tc.value)
		err := d.refuses(t, o)
		switch {
		case tc.wrong == "" && err != nil:
			t.Errorf("%s: %v", what, err)
		case tc.wrong == "":
			d.decodes(t, what, o)
		case err == nil:
			t.Errorf("%s is admitted", what)
		case !strings.Contains(err.Error(), tc.wrong):
			t.Errorf("%s: %v, which does not say %q", what, err, tc.wrong)
		case strings.Contains(err.Error(), "<nil>"):
			t.Errorf("%s: %v, which names no field", what, err)
		}
	}
}

// The API server names no field in the message of a rule about the whole object: it begins
// with "<nil>: Invalid value".
func TestRulesNameAField(t *testing.T) {
	rules := 0
	for kind, d := range definitions(t) {
		if n := len(d.structural.XValidations); n > 0 {
			t.Errorf("%s has %d rules for the whole object; put them at its spec", kind, n)
		}
		rules += len(d.spec.XValidations)
	}
	if rules == 0 {
		t.Error("no spec has a rule")
	}
}

// The status of a hold lists as many applications as can be held, and one that was not.
func TestHeldMembers(t *testing.T) {
	d := define(t, "../../deploy/crds/varve.io_volumebackups.yaml")
	for n, ok := range map[int]bool{33: true, 34: false} {
		o := d.with(t, []string{"claimName"}, `"c"`)
		o["status"] = map[string]any{"hold": map[string]any{"state": "Open", "members": slices.Repeat([]any{map[string]any{"hook": "a"}}, n)}}
		if err := d.refuses(t, o); (err == nil) != ok {
			t.Errorf("%d members: %v", n, err)
		}
	}
}
