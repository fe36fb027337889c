package populator_test

import (
	"os"
	"regexp"
	"strings"
	"testing"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/varve-io/varve/populator/backups"
	"github.com/varve-io/varve/populator/claims"
	"github.com/varve-io/varve/populator/metrics"
	"github.com/varve-io/varve/populator/queue"
)

// docs/kubernetes.md says of each reason, step and metric what it means.
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
	for _, l := range []interface{ Names() []string }{backups.Backup, backups.Abandon} {
		for _, step := range l.Names() {
			has("step", step)
		}
	}
	for _, l := range claims.Lists() {
		for _, step := range l.Names() {
			has("step", step)
		}
	}
	for _, name := range metricNames(t) {
		has("metric", name)
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

// described notes the names of what is registered.
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
