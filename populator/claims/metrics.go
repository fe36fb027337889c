package claims

import (
	"github.com/prometheus/client_golang/prometheus"
	"sigs.k8s.io/controller-runtime/pkg/metrics"
)

var (
	boundWithoutVarve = prometheus.NewCounter(prometheus.CounterOpts{
		Name: "varve_claims_bound_without_varve_total",
		Help: "Claims that name a recovery point and were bound to a volume that Varve did not fill.",
	})
	restores = prometheus.NewHistogramVec(prometheus.HistogramOpts{
		Name:    "varve_restore_seconds",
		Help:    "Time from the decision to fill a claim until it was bound, or given up.",
		Buckets: prometheus.ExponentialBuckets(4, 2, 14),
	}, []string{"result"})
)

func init() { metrics.Registry.MustRegister(boundWithoutVarve, restores) }
