// Package populator is Varve in Kubernetes: one process that backs up claims by policy and
// fills new claims from recovery points. New combines its controllers; each is a package:
//
//	store      what BackupStore and Repository objects say, and how they are opened
//	storekeeper  their status, and the maintenance of their repositories
//	backups    VolumeBackups: the runs
//	claims     new claims that name a recovery point: resolve, fill, hand over
//	replace    another PersistentVolume under a bound claim
//	restores   VolumeRestores: claims to roll back
//	feeds      DumpRestores: streams for commands in pods
//	policies   BackupPolicies: which runs are due; ProtectedVolumes
//	hold       applications, frozen while their snapshot is taken
//	stream     what a command in a pod prints or reads, on its way to or from a mover
//	mover      the pods that move data, and package work in them
//	queue      which runs may have a mover now
//	step       runs as lists of steps that survive a restart
//	unbound    whether the storage may be making a claim's volume
//	report     events and conditions
//	watch      which changes of other objects wake a controller
//	metrics    the controller's metrics
package populator

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"time"

	snapshotmetadatav1beta1 "github.com/kubernetes-csi/external-snapshot-metadata/client/apis/snapshotmetadataservice/v1beta1"
	groupsnapshotv1 "github.com/kubernetes-csi/external-snapshotter/client/v8/apis/volumegroupsnapshot/v1"
	snapshotv1 "github.com/kubernetes-csi/external-snapshotter/client/v8/apis/volumesnapshot/v1"
	batchv1 "k8s.io/api/batch/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/labels"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/types"
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
	"github.com/varve-io/varve/populator/feeds"
	"github.com/varve-io/varve/populator/hold"
	"github.com/varve-io/varve/populator/metrics"
	"github.com/varve-io/varve/populator/mover"
	"github.com/varve-io/varve/populator/policies"
	"github.com/varve-io/varve/populator/queue"
	"github.com/varve-io/varve/populator/replace"
	"github.com/varve-io/varve/populator/report"
	"github.com/varve-io/varve/populator/restores"
	"github.com/varve-io/varve/populator/step"
	"github.com/varve-io/varve/populator/store"
	"github.com/varve-io/varve/populator/storekeeper"
	"github.com/varve-io/varve/populator/stream"
)

// Options of the controller.
type Options struct {
	// Pods configures the movers' pods; Pods.Namespace is Varve's.
	Pods mover.Pods
	// Dir holds the caches of connections, ConfigDir their configuration, and VolumesDir
	// the claims that stores name; see store.Stores.
	Dir, ConfigDir, VolumesDir string
	// Log receives what no condition or event says; nil for none.
	Log *slog.Logger
	// Movers is the limit of concurrent movers, in all; 0 for no limit but the stores'.
	Movers int
	// Workers is the number of concurrent reconciles of each kind.
	Workers int
	// VerifyUnchanged is the share of blocks reported unchanged that each increment
	// reads and compares, 0 to 1.
	VerifyUnchanged float64
	// MaintainEvery is the time between two maintenance Jobs of a repository.
	MaintainEvery time.Duration
	Version       string

	// MetricsAddress and HealthAddress to listen on; "0" for none.
	MetricsAddress, HealthAddress string
	// MetricsInsecure serves metrics by plain HTTP to any client.
	MetricsInsecure bool
	// MetricsCertDir has tls.crt and tls.key; empty for a self-signed certificate.
	MetricsCertDir string
	LeaderElection bool

	// Hook is called for each write to the API server; tests stop the process there.
	Hook step.Hook
	// Registry of metrics; nil for the process's.
	Registry ctrlmetrics.RegistererGatherer
}

// leaderElectionID is the Lease that the leader holds.
const leaderElectionID = "varve-controller"

// Scheme knows all objects that Varve works with.
func Scheme() (*runtime.Scheme, error) {
	s := runtime.NewScheme()
	return s, errors.Join(scheme.AddToScheme(s), v1alpha1.AddToScheme(s), snapshotv1.AddToScheme(s), groupsnapshotv1.AddToScheme(s), snapshotmetadatav1beta1.AddToScheme(s))
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

// caches hold watched objects, but only Varve's: a cluster has many pods.
func caches(namespace string) cache.Options {
	here := cache.ByObject{Namespaces: map[string]cache.Config{namespace: {}}}
	mine := cache.ByObject{Label: labels.SelectorFromSet(labels.Set{mover.LabelManagedBy: mover.ManagedBy})}
	return cache.Options{
		ByObject: map[client.Object]cache.ByObject{
			&batchv1.Job{}: here, &v1alpha1.VolumePopulation{}: here, &v1alpha1.VolumeReplacement{}: here, &snapshotv1.VolumeSnapshot{}: mine,
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
	// The newer recorder loses the text of an event that it counts as a series.
	events := report.NewEvents(mgr.GetEventRecorderFor("varve")) //nolint:staticcheck // see above
	st := &store.Stores{
		Client: mgr.GetClient(), Secrets: mgr.GetAPIReader(), Namespace: opt.Pods.Namespace,
		Dir: opt.Dir, ConfigDir: opt.ConfigDir, VolumesDir: opt.VolumesDir, Connections: store.NewConnections(),
		Log: opt.Log,
	}
	if err := mgr.Add(manager.RunnableFunc(func(ctx context.Context) error {
		<-ctx.Done()
		st.Connections.Close()
		return nil
	})); err != nil {
		return fmt.Errorf("controller: %w", err)
	}
	const manyRuns = 4096
	wake := map[queue.Kind]chan event.GenericEvent{
		queue.Backup: make(chan event.GenericEvent, manyRuns), queue.Restore: make(chan event.GenericEvent, manyRuns),
	}
	q := queue.New(opt.Movers, func(t queue.Ticket) {
		e := backups.WakeEvent(t.Name.Namespace, t.Name.Name, t.ID)
		if t.Kind == queue.Restore {
			e = claims.WakeEvent(t.Name, t.ID)
		}
		select {
		case wake[t.Kind] <- e:
		default: // it checks again by itself
		}
	})
	hostname, _ := os.Hostname() // of the pod; the rest names the process
	execs := hold.PodExec{Config: cfg, Clientset: clientset}
	b := &backups.Reconciler{
		Holds: &hold.Holds{Exec: execs, Same: execs.Same, Log: opt.Log}, Streams: &stream.Streams{Exec: execs}, Process: fmt.Sprintf("%s/%x", hostname, time.Now().UnixNano()),
		Wake: func(namespace, name string, uid types.UID) {
			select {
			case wake[queue.Backup] <- backups.WakeEvent(namespace, name, uid):
			default: // it checks again by itself
			}
		},
		Client: mgr.GetClient(), Live: mgr.GetAPIReader(), Stores: st, Pods: opt.Pods, Logs: mover.PodLogs{Clientset: clientset},
		Queue: q, Events: events, Metrics: count, VerifyUnchanged: opt.VerifyUnchanged, Version: opt.Version, Log: opt.Log,
		Tokens: func(audience string) csi.TokenSource {
			return &csikube.TokenRequest{Client: mgr.GetClient(), Audience: audience,
				Account: client.ObjectKey{Namespace: opt.Pods.Namespace, Name: opt.Pods.ServiceAccount}}
		},
	}
	if err := b.Setup(mgr, opt.Workers, wake[queue.Backup]); err != nil {
		return err
	}
	if err := registry.Register(&metrics.Volumes{Client: mgr.GetClient(), Namespace: opt.Pods.Namespace, Queue: q}); err != nil {
		return fmt.Errorf("metrics: %w", err)
	}
	p := &policies.Reconciler{Client: mgr.GetClient(), Live: mgr.GetAPIReader(), Stores: st, Events: events}
	if err := errors.Join(p.Setup(mgr, opt.Workers), (&policies.Watch{Reconciler: p}).Setup(mgr, opt.Workers)); err != nil {
		return err
	}
	k := &storekeeper.Keeper{
		Client: mgr.GetClient(), Live: mgr.GetAPIReader(), Stores: st, Pods: opt.Pods, Events: events, Metrics: count, MaintainEvery: opt.MaintainEvery,
		Log: opt.Log,
	}

	if err := k.Setup(mgr, opt.Workers); err != nil {
		return err
	}

	leases := &store.Leases{Stores: st}
	filling := claims.Deps{
		Client: mgr.GetClient(), Live: mgr.GetAPIReader(), Namespace: opt.Pods.Namespace, Points: claims.StorePoints{Stores: st},
		Leases: leases, Movers: claims.PodMovers{Pods: opt.Pods, Stores: st, Live: mgr.GetAPIReader(), Logs: mover.PodLogs{Clientset: clientset}, Log: opt.Log},
		Events: events, Queue: q, Metrics: count, Log: opt.Log,
	}
	feeding := &feeds.Reconciler{
		Client: mgr.GetClient(), Live: mgr.GetAPIReader(), Points: filling.Points, Leases: leases, Stores: st, Pods: opt.Pods, Streams: b.Streams, Process: b.Process,
		Queue: q, Events: events, Metrics: count, Log: opt.Log,
	}
	b.Others = append(b.Others, feeding.Sweep)
	swaps := &replace.Reconciler{Client: mgr.GetClient(), Live: mgr.GetAPIReader(), Namespace: opt.Pods.Namespace, Events: events}
	return errors.Join(swaps.Setup(mgr, opt.Workers), feeding.Setup(mgr, opt.Workers), (&restores.Reconciler{Deps: filling}).Setup(mgr, opt.Workers),
		claims.Setup(mgr, filling, opt.Workers, wake[queue.Restore]))
}
