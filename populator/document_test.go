package populator_test

import (
	"os"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/varve-io/varve/populator/backups"
	"github.com/varve-io/varve/populator/claims"
	"github.com/varve-io/varve/populator/metrics"
	"github.com/varve-io/varve/populator/queue"
	"github.com/varve-io/varve/populator/replace"
	"github.com/varve-io/varve/populator/restores"
)

// docs/kubernetes.md explains each reason, step and metric.
func TestDocumentIsComplete(t *testing.T) {
	text, err := os.ReadFile("../docs/kubernetes.md")
	if err != nil {
		t.Fatal(err)
	}
	words := map[string]bool{}
	for line := range strings.Lines(string(text)) {
		if cells := strings.Split(line, "|"); len(cells) > 2 {
			for _, w := range regexp.MustCompile(`[A-Za-z_-]+`).FindAllString(cells[1], -1) {
				words[w] = true
			}
		}
	}
	has := func(kind, word string) {
		t.Helper()
		if !words[word] {
			t.Errorf("%s %s is in no table of docs/kubernetes.md", kind, word)
		}
	}
	conditions, err := os.ReadFile("../api/v1alpha1/conditions.go")
	if err != nil {
		t.Fatal(err)
	}
	reasons := regexp.MustCompile(`Reason\w+\s*= "(\w+)"`).FindAllStringSubmatch(string(conditions), -1)
	if len(reasons) < 40 {
		t.Errorf("only %d reasons were found", len(reasons))
	}
	for _, r := range reasons {
		has("reason", r[1])
	}
	for _, names := range steps() {
		for _, step := range names {
			has("step", step)
		}
	}
	for _, name := range metricNames(t) {
		has("metric", name)
	}
}

// steps are the names in all lists, as status.step has them, by the kind of object.
func steps() map[string][]string {
	all := map[string][]string{"VolumeBackup": slices.Concat(backups.Backup.Names(), backups.Abandon.Names())}
	for _, l := range claims.Lists() {
		all["VolumePopulation"] = append(all["VolumePopulation"], l.Names()...)
	}
	for _, l := range replace.Lists() {
		all["VolumeReplacement"] = append(all["VolumeReplacement"], l.Names()...)
	}
	for _, l := range restores.Lists() {
		all["VolumeRestore"] = append(all["VolumeRestore"], l.Names()...)
	}
	return all
}

// TestStepsLookAlike: users read status.step beside phases and reasons, which have the same
// form, and a name must identify one step of one list.
func TestStepsLookAlike(t *testing.T) {
	style := regexp.MustCompile(`^([A-Z][a-z]+){1,3}$`)
	for kind, names := range steps() {
		seen := map[string]bool{}
		for _, name := range names {
			if !style.MatchString(name) {
				t.Errorf("step %q of a %s is not one to three words written LikeThis", name, kind)
			}
			if seen[name] {
				t.Errorf("two lists of a %s have a step %s", kind, name)
			}
			seen[name] = true
		}
		if len(seen) < 5 {
			t.Errorf("a %s has only %d steps", kind, len(seen))
		}
	}
}

// metricNames are those that the controller registers.
func metricNames(t *testing.T) []string {
	t.Helper()
	r := &described{}
	if _, err := metrics.New(r); err != nil {
		t.Fatal(err)
	}
	if err := r.Register(&metrics.Volumes{Queue: queue.New(0, nil)}); err != nil {
		t.Fatal(err)
	}
	if len(r.names) < 11 {
		t.Errorf("only %d metrics: %v", len(r.names), r.names)
	}
	return r.names
}

// described records the names of registered metrics.
type described struct {
	prometheus.Registerer
	names []string
}

func (d *described) Register(c prometheus.Collector) error {
	out := make(chan *prometheus.Desc, 32)
	c.Describe(out)
	close(out)
	for desc := range out {
		if m := regexp.MustCompile(`fqName: "(\w+)"`).FindStringSubmatch(desc.String()); m != nil {
			d.names = append(d.names, m[1])
		}
	}
	return nil
}
