package metrics

import (
	"context"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	corev1 "k8s.io/api/core/v1"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"github.com/varve-io/varve/api/v1alpha1"
	"github.com/varve-io/varve/populator/queue"
	"github.com/varve-io/varve/populator/store"
)

// Volumes reports at collection the age of each volume's newest point, how many claims
// have none, and how long runs wait. It reads the controller's cache.
type Volumes struct {
	Client client.Reader
	// Namespace is Varve's, whose claims are not counted.
	Namespace string
	Queue     *queue.Queue
}

var (
	lastSuccess = prometheus.NewDesc("varve_volume_last_success_timestamp_seconds", "Time of the newest recovery point of a claim.", []string{"namespace", "claim", "store"}, nil)
	rpo         = prometheus.NewDesc("varve_volume_rpo_seconds", "Age of the newest recovery point of a claim: what would be lost now.", []string{"namespace", "claim", "store"}, nil)
	consistent  = prometheus.NewDesc("varve_volume_last_consistent_timestamp_seconds", "Time of the newest recovery point of a claim whose applications were held still.", []string{"namespace", "claim", "store"}, nil)
	unprotected = prometheus.NewDesc("varve_unprotected_volumes", "Bound claims that have no recovery point and have not opted out.", nil, nil)
	oldest      = prometheus.NewDesc("varve_queue_oldest_seconds", "How long the run that waits longest for its turn has waited.", []string{"kind"}, nil)
)

// Describe implements prometheus.Collector.
func (v *Volumes) Describe(out chan<- *prometheus.Desc) {
	out <- lastSuccess
	out <- rpo
	out <- consistent
	out <- unprotected
	out <- oldest
}

// Collect implements prometheus.Collector. What cannot be read is left out.
func (v *Volumes) Collect(out chan<- prometheus.Metric) {
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	now := time.Now()
	for _, k := range []queue.Kind{queue.Backup, queue.Restore} {
		age := 0.0
		if t := v.Queue.Oldest(k); !t.IsZero() {
			age = now.Sub(t).Seconds()
		}
		out <- prometheus.MustNewConstMetric(oldest, prometheus.GaugeValue, age, string(k))
	}
	var volumes v1alpha1.ProtectedVolumeList
	var claims corev1.PersistentVolumeClaimList
	if v.Client.List(ctx, &volumes) != nil || v.Client.List(ctx, &claims) != nil {
		return
	}
	asked := map[client.ObjectKey]*corev1.PersistentVolumeClaim{} // claims that should have points
	for i := range claims.Items {
		c := &claims.Items[i]
		if c.Namespace != v.Namespace && c.Status.Phase == corev1.ClaimBound && c.Labels[v1alpha1.OptOutLabel] != "true" {
			asked[client.ObjectKeyFromObject(c)] = c
		}
	}
	has := map[client.ObjectKey]bool{}
	for i := range volumes.Items {
		p := &volumes.Items[i]
		name := client.ObjectKey{Namespace: p.Namespace, Name: p.Spec.ClaimName}
		c := asked[name]
		// A claim that is deleted or has opted out can lose nothing more, and its points
		// stay forever.
		if c == nil || p.Status.LastSuccess == nil {
			continue
		}
		if p.Status.ClaimUID == "" || p.Status.ClaimUID == c.UID {
			has[name] = true
		}
		labels := []string{p.Namespace, p.Spec.ClaimName, store.KeyOf(p.Spec.StoreRef, p.Namespace).String()}
		out <- prometheus.MustNewConstMetric(lastSuccess, prometheus.GaugeValue, float64(p.Status.LastSuccess.Unix()), labels...)
		out <- prometheus.MustNewConstMetric(rpo, prometheus.GaugeValue, now.Sub(p.Status.LastSuccess.Time).Seconds(), labels...)
		if at := p.Status.LastConsistent; at != nil {
			out <- prometheus.MustNewConstMetric(consistent, prometheus.GaugeValue, float64(at.Unix()), labels...)
		}
	}
	out <- prometheus.MustNewConstMetric(unprotected, prometheus.GaugeValue, float64(len(asked)-len(has)))
}
