package mover

import (
	"encoding/json"
	"os"
	"os/exec"
	"reflect"
	"strings"
	"testing"
	"time"
	"unicode/utf8"

	corev1 "k8s.io/api/core/v1"

	"github.com/varve-io/varve/api/v1alpha1"
	"github.com/varve-io/varve/populator/store"
)

func TestResultFits(t *testing.T) {
	r := Result{Reason: v1alpha1.ReasonMoverFailed, Message: strings.Repeat("a \"quoted\" word ", 1000), KeepError: strings.Repeat("x", 5000),
		Point: &v1alpha1.PointSummary{ID: strings.Repeat("f", 32)}}
	for range 20 {
		r.Listed = append(r.Listed, ListedPoint{ID: strings.Repeat("0", 32), Time: time.Now()})
		r.Point.Fallbacks = append(r.Point.Fallbacks, strings.Repeat("csi-delta: FailedPrecondition", 10))
	}
	p := r.Encode()
	if len(p) > maxResult {
		t.Fatalf("%d bytes do not fit into a termination message", len(p))
	}
	got, ok := DecodeResult(string(p))
	if !ok || got.Reason != r.Reason || got.Point == nil || got.Point.ID != r.Point.ID {
		t.Errorf("came back as %+v", got)
	}
}

func TestNoResult(t *testing.T) {
	for _, text := range []string{"", "Error: exit 1", `{"version":2,"ok":true}`, `{"version":1}`, `{"ok":true}`, strings.Repeat(" ", maxResult) + `{"version":1,"ok":true}`} {
		if r, ok := DecodeResult(text); ok {
			t.Errorf("%.40q was taken for %+v", text, r)
		}
	}
}

func TestDecodeTask(t *testing.T) {
	for text, good := range map[string]bool{
		``:                                  false,
		`{}`:                                false,
		`{"version":1,"action":"backup"}`:   false,
		`{"version":1,"action":"dance"}`:    false,
		`{"version":1,"action":"restore"}`:  false,
		`{"version":2,"action":"maintain"}`: false,
		`{"version":1,"action":"maintain"}`: true,
		`{"version":1,"action":"backup","backup":{"volume":{"namespace":"a","name":"b","cluster":"c"}}}`: true,
	} {
		if _, err := decodeTask(text); (err == nil) != good {
			t.Errorf("%s: %v", text, err)
		}
	}
}

// environment looks up variables as a pod's process does.
func environment(vars []corev1.EnvVar) func(string) (string, bool) {
	return func(name string) (string, bool) {
		for _, v := range vars {
			if v.Name == name {
				return v.Value, true
			}
		}
		return "", false
	}
}

// asMover runs this test again, in a process with a mover's environment.
const asMover = "VARVE_TEST_MOVER"

// largeTask is one of a store whose caBundle is as large as the API admits: a distribution's
// authorities in one file have four fifths of that.
func largeTask() Task {
	block := "# Főtanúsítvány, $(HOME), $$\n" + strings.Repeat("MIIDdzCCAl+gAwIBAgIEAgAAuTANBgkqhkiG9w0BAQUFADBaMQswCQYDVQQGEwJJ\n", 20)
	return Task{Version: ProtocolVersion, Action: ActionMaintain, Store: store.Settings{CABundle: strings.Repeat(block, 256<<10/len(block)+1), ClusterName: "here"}}
}

func TestTaskOfAnySize(t *testing.T) {
	want := largeTask()
	if os.Getenv(asMover) != "" {
		if got, err := ReadTask(os.LookupEnv); err != nil || !reflect.DeepEqual(got, want) {
			t.Errorf("%d bytes of a bundle came of %d (%v)", len(got.Store.CABundle), len(want.Store.CABundle), err)
		}
		return
	}
	job, err := Pods{}.Build(Job{Name: "j", Task: want})
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.CommandContext(t.Context(), os.Args[0], "-test.run=^TestTaskOfAnySize$")
	cmd.Env = []string{asMover + "=1"}
	for _, v := range job.Spec.Template.Spec.Containers[0].Env {
		if strings.Contains(v.Value, "$") || !utf8.ValidString(v.Value) {
			t.Errorf("%s does not come through the kubelet as it is", v.Name)
		}
		cmd.Env = append(cmd.Env, v.Name+"="+v.Value)
	}
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Errorf("%v\n%s", err, out)
	}
}

// A character of several bytes is not cut: the API server accepts only UTF-8.
func TestVariablesAreText(t *testing.T) {
	for pad := range 4 {
		want := Task{Version: ProtocolVersion, Action: ActionMaintain, Store: store.Settings{ClusterName: strings.Repeat("x", pad) + strings.Repeat("𐍈", maxVariable)}}
		vars, err := want.Variables()
		if err != nil || len(vars) != 5 {
			t.Fatalf("%d variables (%v)", len(vars), err)
		}
		for _, v := range vars {
			if !utf8.ValidString(v.Value) || len(v.Value) > maxVariable {
				t.Errorf("%s has %d bytes, or is not UTF-8", v.Name, len(v.Value))
			}
		}
		if got, err := ReadTask(environment(vars)); err != nil || !reflect.DeepEqual(got, want) {
			t.Errorf("it does not come back (%v)", err)
		}
	}
}

func TestProgress(t *testing.T) {
	a, b := Progress{Phase: "reading", Done: 1, Total: 4}, Progress{Phase: "reading", Done: 3, Total: 4}
	log := "time=now level=INFO\n" + a.Line() + "\n" + b.Line() + "\n{\"varve\":\"progress\",\"phase\":\"cut of\nanother line"
	got, ok := LastProgress(log)
	if !ok || got != b {
		t.Errorf("read %+v of\n%s", got, log)
	}
	if p := got.Percent(); p == nil || *p != 75 {
		t.Errorf("it is %v percent", p)
	}
	if p := (Progress{Done: 9, Total: 4}).Percent(); *p != 100 {
		t.Errorf("more than all is %d percent", *p)
	}
	if (Progress{}).Percent() != nil {
		t.Error("percent of an unknown total")
	}
}

func FuzzDecodeResult(f *testing.F) {
	f.Add(string(Result{OK: true}.Encode()))
	f.Add(`{"version":1,"reason":"x"}`)
	f.Fuzz(func(t *testing.T, text string) {
		r, ok := DecodeResult(text)
		if ok && !r.OK && r.Reason == "" {
			t.Error("a failure without a reason")
		}
		if ok {
			if p := r.Encode(); len(p) > maxResult || !json.Valid(p) {
				t.Errorf("encodes as %d bytes: %.100q", len(p), p)
			}
		}
	})
}

func FuzzLastProgress(f *testing.F) {
	f.Add(Progress{Phase: "a", Done: 1, Total: 2}.Line())
	f.Fuzz(func(t *testing.T, text string) {
		p, ok := LastProgress(text)
		if percent := p.Percent(); ok && percent != nil && (*percent < 0 || *percent > 100) {
			t.Errorf("%+v is %d percent", p, *percent)
		}
	})
}
