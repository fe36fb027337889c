// Package metrics holds the controller's metrics, by the names in docs/kubernetes.md.
package metrics

import (
	"slices"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/varve-io/varve/backup/blocktree"
	"github.com/varve-io/varve/backup/cbt"
	"github.com/varve-io/varve/backup/cbt/csi"
)

// Metrics of the controller. Safe for concurrent use.
type Metrics struct {
	runs       *prometheus.CounterVec
	fallbacks  *prometheus.CounterVec
	restores   *prometheus.HistogramVec
	reachable  *prometheus.GaugeVec
	unverified prometheus.Counter
	leftovers  prometheus.Gauge
	strangers  prometheus.Counter
}

// New registers the metrics.
func New(r prometheus.Registerer) (*Metrics, error) {
	m := &Metrics{
		runs: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "varve_backup_runs_total", Help: "Backup runs that ended, by result and by the source of changed blocks.",
		}, []string{"result", "source"}),
		fallbacks: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "varve_cbt_fallback_total", Help: "Times a better source of changed blocks was passed over, by reason.",
		}, []string{"reason"}),
		restores: prometheus.NewHistogramVec(prometheus.HistogramOpts{
			Name: "varve_restore_seconds", Help: "Time from a claim's creation to its binding, or until it was given up, by result.",
			Buckets: []float64{5, 15, 30, 60, 120, 300, 600, 1800, 3600, 4 * 3600, 12 * 3600},
		}, []string{"result"}),
		reachable: prometheus.NewGaugeVec(prometheus.GaugeOpts{
			Name: "varve_repository_reachable", Help: "1 if the store's repository could be opened when it was tried last.",
		}, []string{"store"}),
		unverified: prometheus.NewCounter(prometheus.CounterOpts{
			Name: "varve_verify_failures_total", Help: "Checks that found other bytes than there should be: spot checks of changed blocks, and restores read back.",
		}),
		strangers: prometheus.NewCounter(prometheus.CounterOpts{
			Name: "varve_claims_bound_without_varve_total", Help: "Claims that name a recovery point and were bound to a volume that Varve did not fill.",
		}),
		leftovers: prometheus.NewGauge(prometheus.GaugeOpts{
			Name: "varve_leftover_objects", Help: "Objects of runs that are gone, still to be removed.",
		}),
	}
	for _, c := range []prometheus.Collector{m.runs, m.fallbacks, m.restores, m.reachable, m.unverified, m.leftovers, m.strangers} {
		if err := r.Register(c); err != nil {
			return nil, err
		}
	}
	for _, result := range []string{"success", "failure"} {
		m.runs.WithLabelValues(result, "")
	}
	return m, nil
}

func result(ok bool) string {
	if ok {
		return "success"
	}
	return "failure"
}

// other is the label of words that no Varve writes: a stranger may have made the point that
// a run found, and each new word would be a new time series.
const other = "other"

// RunEnded counts a backup run.
func (m *Metrics) RunEnded(ok bool, source string) {
	switch source {
	case "", csi.DeltaName, csi.AllocatedName, csi.WholeName, blocktree.KindFull:
	default:
		source = other
	}
	m.runs.WithLabelValues(result(ok), source).Inc()
}

// Fallback counts a source of changed blocks that was skipped.
func (m *Metrics) Fallback(reason string) {
	if !slices.Contains(cbt.Reasons, cbt.Reason(reason)) {
		reason = other
	}
	m.fallbacks.WithLabelValues(reason).Inc()
}

// Restored counts a claim that was filled or given up.
func (m *Metrics) Restored(ok bool, took time.Duration) {
	m.restores.WithLabelValues(result(ok)).Observe(took.Seconds())
}

// BoundWithoutVarve counts a claim that names a recovery point and got another volume.
func (m *Metrics) BoundWithoutVarve() { m.strangers.Inc() }

// VerifyFailed counts a check that found wrong bytes.
func (m *Metrics) VerifyFailed() { m.unverified.Inc() }

// Reachable records whether a store could be opened.
func (m *Metrics) Reachable(store string, ok bool) {
	v := 0.0
	if ok {
		v = 1
	}
	m.reachable.WithLabelValues(store).Set(v)
}

// Forget drops a deleted store.
func (m *Metrics) Forget(store string) { m.reachable.DeleteLabelValues(store) }

// Leftovers sets the number of objects left by deleted runs.
func (m *Metrics) Leftovers(n int) { m.leftovers.Set(float64(n)) }
