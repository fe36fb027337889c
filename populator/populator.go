// Package populator is Varve in Kubernetes: one process that backs claims up by policy and
// fills new claims from recovery points. New puts its controllers together; each is a
// package of its own:
//
//	store      what BackupStore and Repository objects say, and how they are opened
//	stores     their status, and the maintenance of their repositories
//	backups    VolumeBackups: the runs
//	claims     claims that name a recovery point: resolved, filled, handed over
//	policies   BackupPolicies: which runs are due; ProtectedVolumes
//	mover      the pods that move data, and package work in them
//	queue      who may run now
//	step       runs as lists of steps that survive a restart
//	report     events and conditions
//	metrics    what is counted
package populator

import (
	"context"
	"errors"
	"fmt"
	"time"

	snapshotmetadatav1beta1 "github.com/kubernetes-csi/external-snapshot-metadata/client/apis/snapshotmetadataservice/v1beta1"
	snapshotv1 "github.com/kubernetes-csi/external-snapshotter/client/v8/apis/volumesnapshot/v1"
	batchv1 "k8s.io/api/batch/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/labels"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/kubernetes/scheme"
	"k8s.io/client-go/rest"
	"sigs.k8s.io/controller-runtime/pkg/cache"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/controller-runtime/pkg/config"
	"sigs.k8s.io/controller-runtime/pkg/event"
	"sigs.k8s.io/controller-runtime/pkg/healthz"
	"sigs.k8s.io/controller-runtime/pkg/manager"
	ctrlmetrics "sigs.k8s.io/controller-runtime/pkg/metrics"
	"sigs.k8s.io/controller-runtime/pkg/metrics/filters"
	"sigs.k8s.io/controller-runtime/pkg/metrics/server"

	"github.com/varve-io/varve/api/v1alpha1"
	"github.com/varve-io/varve/backup/cbt/csi"
	"github.com/varve-io/varve/backup/cbt/csi/csikube"
	"github.com/varve-io/varve/populator/backups"
	"github.com/varve-io/varve/populator/claims"
	"github.com/varve-io/varve/populator/metrics"
	"github.com/varve-io/varve/populator/mover"
	"github.com/varve-io/varve/populator/policies"
	"github.com/varve-io/varve/populator/queue"
	"github.com/varve-io/varve/populator/report"
	"github.com/varve-io/varve/populator/step"
	"github.com/varve-io/varve/populator/store"
	"github.com/varve-io/varve/populator/stores"
)

// Options of the controller.
type Options struct {
	// Pods is what movers are made of; Pods.Namespace is Varve's.
	Pods mover.Pods
	// Dir takes connections' caches and ConfigDir their configuration, VolumesDir has the
	// claims that stores name; see store.Stores.
	Dir, ConfigDir, VolumesDir string
	// Movers at once, in all; 0 for no limit but the stores'.
	Movers int
	// Workers reconcile at once, of each kind.
	Workers int
	// VerifyUnchanged is the share of blocks reported unchanged that each increment
	// reads and compares, 0 to 1.
	VerifyUnchanged float64
	// MaintainEvery is the time between two maintenance Jobs of a repository.
	MaintainEvery time.Duration
	Version       string

	// MetricsAddress and HealthAddress to listen on; "0" for none.
	MetricsAddress, HealthAddress string
	// MetricsInsecure serves metrics by plain HTTP to anybody.
	MetricsInsecure bool
	// MetricsCertDir has tls.crt and tls.key; empty for a certificate signed by itself.
	MetricsCertDir string
	LeaderElection bool

	// Hook sees each write to the API server; tests stop the process there.
	Hook step.Hook
	// Registry of metrics; nil for the process's.
	Registry ctrlmetrics.RegistererGatherer
}

// leaderElectionID is the Lease that the leader holds.
const leaderElectionID = "varve-controller"

// Scheme knows all objects that Varve works with.
func Scheme() (*runtime.Scheme, error) {
	s := runtime.NewScheme()

	return s, errors.Join(scheme.AddToScheme(s), v1alpha1.AddToScheme(s), snapshotv1.AddToScheme(s), snapshotmetadatav1beta1.AddToScheme(s))
}

// New makes the manager with all controllers; its Start runs them.
func New(cfg *rest.Config, opt Options) (manager.Manager, error) {
	s, err := Scheme()
	if err != nil {
		return nil, err
	}
	serving := server.Options{BindAddress: opt.MetricsAddress}
	if !opt.MetricsInsecure {
		serving.SecureServing, serving.CertDir = true, opt.MetricsCertDir
		serving.FilterProvider = filters.WithAuthenticationAndAuthorization
	}
	again := true // tests run several managers in one process
	mgr, err := manager.New(cfg, manager.Options{
		Scheme: s, Metrics: serving, HealthProbeBindAddress: opt.HealthAddress,
		LeaderElection: opt.LeaderElection, LeaderElectionID: leaderElectionID, LeaderElectionNamespace: opt.Pods.Namespace,
		LeaderElectionReleaseOnCancel: true,
		Controller:                    config.Controller{SkipNameValidation: &again},
		Cache:                         caches(opt.Pods.Namespace),
		NewClient: func(c *rest.Config, o client.Options) (client.Client, error) {
			cl, err := client.NewWithWatch(c, o)
			if err != nil {
				return nil, err
			}

			return step.Observe(cl, opt.Hook), nil
		},
	})
	if err != nil {
		return nil, fmt.Errorf("controller: %w", err)
	}
	if err := errors.Join(mgr.AddHealthzCheck("ping", healthz.Ping), mgr.AddReadyzCheck("ping", healthz.Ping)); err != nil {
		return nil, err
	}

	return mgr, setup(mgr, cfg, opt)
}

// caches hold what is watched, and of that what is ours: a cluster has many pods.
func caches(namespace string) cache.Options {
	here := cache.ByObject{Namespaces: map[string]cache.Config{namespace: {}}}
	mine := cache.ByObject{Label: labels.SelectorFromSet(labels.Set{mover.LabelManagedBy: mover.ManagedBy})}

	return cache.Options{
		ByObject: map[client.Object]cache.ByObject{
			&batchv1.Job{}: here, &v1alpha1.VolumePopulation{}: here, &snapshotv1.VolumeSnapshot{}: mine,
		},
		DefaultTransform: func(o any) (any, error) {
			if m, ok := o.(metav1.Object); ok {
				m.SetManagedFields(nil)
			}

			return o, nil
		},
	}
}

func setup(mgr manager.Manager, cfg *rest.Config, opt Options) error {
	registry := opt.Registry
	if registry == nil {
		registry = ctrlmetrics.Registry
	}
	count, err := metrics.New(registry)
	if err != nil {
		return fmt.Errorf("metrics: %w", err)
	}
	clientset, err := kubernetes.NewForConfig(cfg)
	if err != nil {
		return fmt.Errorf("controller: %w", err)
	}
	// The newer recorder forgets the text of an event that it has a series of.
	events := report.NewEvents(mgr.GetEventRecorderFor("varve")) //nolint:staticcheck
	st := &store.Stores{
		Client: mgr.GetClient(), Secrets: mgr.GetAPIReader(), Namespace: opt.Pods.Namespace,
		Dir: opt.Dir, ConfigDir: opt.ConfigDir, VolumesDir: opt.VolumesDir, Connections: store.NewConnections(),
	}
	if err := mgr.Add(manager.RunnableFunc(func(ctx context.Context) error {
		<-ctx.Done()
		st.Connections.Close()

		return nil
	})); err != nil {
		return fmt.Errorf("controller: %w", err)
	}
	const manyRuns = 4096
	wake := make(chan event.GenericEvent, manyRuns)
	q := queue.New(opt.Movers, func(t queue.Ticket) {
		if t.Kind == queue.Backup {
			select {
			case wake <- backups.WakeEvent(t.Name.Namespace, t.Name.Name, t.ID):
			default: // it looks again by itself
			}
		}
	})
	b := &backups.Reconciler{
		Client: mgr.GetClient(), Live: mgr.GetAPIReader(), Stores: st, Pods: opt.Pods, Logs: mover.PodLogs{Clientset: clientset},
		Queue: q, Events: events, Metrics: count, VerifyUnchanged: opt.VerifyUnchanged, Version: opt.Version,
		Tokens: func(audience string) csi.TokenSource {
			return &csikube.TokenRequest{Client: mgr.GetClient(), Audience: audience,
				Account: client.ObjectKey{Namespace: opt.Pods.Namespace, Name: opt.Pods.ServiceAccount}}
		},
	}
	if err := b.Setup(mgr, opt.Workers, wake); err != nil {
		return err
	}
	if err := registry.Register(&metrics.Volumes{Client: mgr.GetClient(), Namespace: opt.Pods.Namespace, Queue: q}); err != nil {
		return fmt.Errorf("metrics: %w", err)
	}
	p := &policies.Reconciler{Client: mgr.GetClient(), Live: mgr.GetAPIReader(), Stores: st, Events: events}
	if err := errors.Join(p.Setup(mgr, opt.Workers), (&policies.Watch{Reconciler: p}).Setup(mgr, opt.Workers)); err != nil {
		return err
	}
	k := &stores.Keeper{
		Client: mgr.GetClient(), Live: mgr.GetAPIReader(), Stores: st, Pods: opt.Pods, Events: events, Metrics: count, MaintainEvery: opt.MaintainEvery,
	}

	if err := k.Setup(mgr, opt.Workers); err != nil {
		return err
	}

	return claims.Setup(mgr, claims.Deps{
		Client: mgr.GetClient(), Live: mgr.GetAPIReader(), Namespace: opt.Pods.Namespace, Points: claims.StorePoints{Stores: st},
		Movers: claims.PodMovers{Pods: opt.Pods, Stores: st, Live: mgr.GetAPIReader(), Logs: mover.PodLogs{Clientset: clientset}},
		Events: events, Queue: q, Metrics: count,
	}, opt.Workers)
}
