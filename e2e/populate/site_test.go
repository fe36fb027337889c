package populate_test

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	batchv1 "k8s.io/api/batch/v1"
	corev1 "k8s.io/api/core/v1"
	storagev1 "k8s.io/api/storage/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/api/resource"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/tools/record"
	ctrl "sigs.k8s.io/controller-runtime"
	"sigs.k8s.io/controller-runtime/pkg/cache"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/controller-runtime/pkg/config"
	"sigs.k8s.io/controller-runtime/pkg/metrics/server"

	"github.com/go-logr/logr"
	"github.com/prometheus/client_golang/prometheus"

	"github.com/varve-io/varve/api/v1alpha1"
	"github.com/varve-io/varve/backup"
	"github.com/varve-io/varve/backup/blocktree"
	"github.com/varve-io/varve/backup/disk"
	"github.com/varve-io/varve/e2e/cluster"
	"github.com/varve-io/varve/e2e/framework"
	"github.com/varve-io/varve/populator/claims"
	"github.com/varve-io/varve/populator/metrics"
	"github.com/varve-io/varve/populator/mover"
	"github.com/varve-io/varve/populator/queue"
	"github.com/varve-io/varve/populator/report"
	"github.com/varve-io/varve/populator/step"
	"github.com/varve-io/varve/populator/store"
)

func TestMain(m *testing.M) { framework.Main(m) }

// site is an installation of the populator of a test's own.
type site struct {
	*framework.F
	varve  string // Varve's namespace
	stores *store.Stores
	ref    v1alpha1.StoreReference
	image  string
	stops  []func()
}

func newSite(t *testing.T) *site {
	s := &site{}
	// A directory that goes after the controller, which keeps connections in it.
	dir, err := os.MkdirTemp("", "varve-e2e-stores-")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := os.RemoveAll(dir); err != nil {
			t.Error(err)
		}
	})
	t.Cleanup(func() { // after the framework's, which deletes what takes a controller
		for _, stop := range s.stops {
			stop()
		}
	})
	f := framework.New(t)
	*s = site{F: f, varve: f.Namespace + "-v", image: f.VarveImage(), ref: v1alpha1.StoreReference{Kind: v1alpha1.StoreKindBackupStore, Name: f.Namespace}}
	if err := v1alpha1.AddToScheme(f.Client.Scheme()); err != nil {
		t.Fatal(err)
	}
	if out, err := f.Cluster.Kubectl(t.Context(), nil, "apply", "--server-side", "--force-conflicts", "-f", "../../deploy/crds"); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	f.Create(&corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: s.varve, Labels: map[string]string{"pod-security.kubernetes.io/enforce": "baseline"}}})
	f.Create(&corev1.ServiceAccount{ObjectMeta: metav1.ObjectMeta{Namespace: s.varve, Name: "varve-mover"}})
	f.Create(&corev1.Secret{ObjectMeta: metav1.ObjectMeta{Namespace: s.varve, Name: "store"}, StringData: map[string]string{
		"password": "a password", "accessKeyID": cluster.S3AccessKey, "secretAccessKey": cluster.S3SecretKey}})
	ip, err := f.Cluster.Kubectl(t.Context(), nil, "get", "service", "s3", "-n", cluster.SystemNamespace, "-o", "jsonpath={.spec.clusterIP}")
	if err != nil {
		t.Fatal(err)
	}
	if _, err := f.Cluster.Exec(t.Context(), f.Cluster.Control(), cluster.NetworkOnly, nil, "curl", "-sS", "--fail", "--aws-sigv4", "aws:amz:us-east-1:s3",
		"--user", cluster.S3AccessKey+":"+cluster.S3SecretKey, "-H", "x-amz-content-sha256: UNSIGNED-PAYLOAD", "-X", "PUT", "http://"+ip+":7070/"+f.Namespace); err != nil {
		t.Fatal(err)
	}
	s.createStore(v1alpha1.Storage{S3: &v1alpha1.S3Storage{Bucket: f.Namespace, Endpoint: ip + ":7070", Region: "us-east-1", DisableTLS: true}})
	s.stores = &store.Stores{Client: f.Client, Secrets: f.Client, Namespace: s.varve, Dir: dir}
	t.Cleanup(func() {
		ctx := context.Background()
		_, err := f.Cluster.Kubectl(ctx, nil, "delete", "namespace", s.varve, "--wait=false")
		if err2 := client.IgnoreNotFound(f.Client.Delete(ctx, &v1alpha1.BackupStore{ObjectMeta: metav1.ObjectMeta{Name: s.ref.Name}})); err != nil || err2 != nil {
			t.Errorf("clean up: %v, %v", err, err2)
		}
	})

	return s
}

func (s *site) createStore(storage v1alpha1.Storage) {
	s.T.Helper()
	s.Create(&v1alpha1.BackupStore{ObjectMeta: metav1.ObjectMeta{Name: s.ref.Name}, Spec: v1alpha1.BackupStoreSpec{RepositorySpec: v1alpha1.RepositorySpec{
		Storage: storage, ClusterName: "e2e", CredentialsSecretRef: corev1.LocalObjectReference{Name: "store"}}}})
}

// run starts the reconcilers; the function it returns stops them.
func (s *site) run(hook step.Hook) (stop func()) {
	s.T.Helper()
	ctrl.SetLogger(logr.Discard())
	opts := ctrl.Options{
		Scheme: s.Client.Scheme(), Metrics: server.Options{BindAddress: "0"}, LeaderElection: false, Logger: logr.Discard(),
		Controller: config.Controller{SkipNameValidation: ptr(true)},
		Cache:      cache.Options{ByObject: map[client.Object]cache.ByObject{&batchv1.Job{}: {Namespaces: map[string]cache.Config{s.varve: {}}}}},
	}
	mgr, err := ctrl.NewManager(s.Config, opts)
	if err != nil {
		s.T.Fatal(err)
	}
	c := step.Observe(s.Client, hook)
	count, err := metrics.New(prometheus.NewRegistry())
	if err != nil {
		s.T.Fatal(err)
	}
	broadcaster := record.NewBroadcaster()
	broadcaster.StartRecordingToSink(eventSink{s.Clientset})
	pods := mover.Pods{Namespace: s.varve, Image: s.image, PullPolicy: corev1.PullNever, ServiceAccount: "varve-mover"}
	err = claims.Setup(mgr, claims.Deps{
		Client: c, Live: s.Client, Namespace: s.varve, Points: claims.StorePoints{Stores: s.stores},
		Movers: claims.PodMovers{Pods: pods, Stores: s.stores, Live: s.Client, Logs: mover.PodLogs{Clientset: s.Clientset}},
		Events: report.NewEvents(broadcaster.NewRecorder(s.Client.Scheme(), corev1.EventSource{Component: "varve"})),
		Queue:  queue.New(0, nil), Metrics: count,
	}, 8)
	if err != nil {
		s.T.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- mgr.Start(ctx) }()
	stopped := false
	stop = func() {
		if stopped {
			return
		}
		stopped = true
		cancel()
		if err := <-done; err != nil {
			s.T.Errorf("controller: %v", err)
		}
		broadcaster.Shutdown()
	}
	s.stops = append(s.stops, stop)

	return stop
}

func ptr[T any](v T) *T { return &v }

// seed writes a recovery point of a disk image.
func (s *site) seed(name string, image string, claim *blocktree.Claim) *backup.Point {
	s.T.Helper()
	ctx := s.T.Context()
	st, err := s.stores.Get(ctx, s.ref, s.Namespace)
	if err != nil {
		s.T.Fatal(err)
	}
	repo, err := s.stores.Ensure(ctx, st)
	if err != nil {
		s.T.Fatal(err)
	}
	defer repo.Close(context.Background())
	d, err := disk.Open(image, disk.Options{})
	if err != nil {
		s.T.Fatal(err)
	}
	defer d.Close()
	p, _, err := backup.Run(ctx, repo.Repository, backup.Options{Volume: backup.Volume{Namespace: s.Namespace, Name: name, Cluster: "e2e"}, Disk: d, Claim: claim})
	if err != nil {
		s.T.Fatal(err)
	}

	return p
}

// image makes a disk of so many MiB by a shell script that knows it as $1.
func (s *site) disk(mib int64, script string) string {
	s.T.Helper()
	path := filepath.Join(s.T.TempDir(), "disk")
	if err := os.WriteFile(path, nil, 0o600); err != nil {
		s.T.Fatal(err)
	}
	if err := os.Truncate(path, mib<<20); err != nil {
		s.T.Fatal(err)
	}
	if out, err := shell(s.T.Context(), script, path); err != nil {
		s.T.Fatalf("%v: %s", err, out)
	}

	return path
}

func (s *site) source(name string, change func(*v1alpha1.RecoverySource)) {
	s.T.Helper()
	rs := &v1alpha1.RecoverySource{ObjectMeta: metav1.ObjectMeta{Namespace: s.Namespace, Name: name}, Spec: v1alpha1.RecoverySourceSpec{StoreRef: s.ref}}
	if change != nil {
		change(rs)
	}
	s.Create(rs)
}

// claim makes a claim that names a RecoverySource.
func (s *site) claim(c framework.Claim, source string) *corev1.PersistentVolumeClaim {
	s.T.Helper()
	pvc := claimOf(s.Namespace, c, source)
	s.Create(pvc)

	return pvc
}

func claimOf(namespace string, c framework.Claim, source string) *corev1.PersistentVolumeClaim {
	pvc := &corev1.PersistentVolumeClaim{
		ObjectMeta: metav1.ObjectMeta{Namespace: namespace, Name: c.Name},
		Spec: corev1.PersistentVolumeClaimSpec{
			AccessModes: []corev1.PersistentVolumeAccessMode{corev1.ReadWriteOnce}, VolumeMode: &c.Mode,
			Resources:     corev1.VolumeResourceRequirements{Requests: corev1.ResourceList{corev1.ResourceStorage: resource.MustParse(c.Size)}},
			DataSourceRef: &corev1.TypedObjectReference{APIGroup: ptr("varve.io"), Kind: "RecoverySource", Name: source},
		}}
	if c.Class != "" {
		pvc.Spec.StorageClassName = &c.Class
	}

	return pvc
}

// event waits for an event about a claim.
func (s *site) event(name, reason, part string) {
	s.T.Helper()
	s.Eventually("event "+reason+" of "+name, func(ctx context.Context) error {
		var list corev1.EventList
		if err := s.Client.List(ctx, &list, client.InNamespace(s.Namespace)); err != nil {
			return err
		}
		var all []string
		for _, e := range list.Items {
			if e.InvolvedObject.Name == name {
				if e.Reason == reason && strings.Contains(e.Message, part) {
					return nil
				}
				all = append(all, e.Reason+": "+e.Message)
			}
		}

		return fmt.Errorf("there are: %s", strings.Join(all, "\n"))
	})
}

func (s *site) pending(name string) {
	s.T.Helper()
	var pvc corev1.PersistentVolumeClaim
	if err := s.Client.Get(s.T.Context(), s.Key(name), &pvc); err != nil || pvc.Status.Phase != corev1.ClaimPending || pvc.Spec.VolumeName != "" {
		s.T.Fatalf("claim %s is %s to %q, %v", name, pvc.Status.Phase, pvc.Spec.VolumeName, err)
	}
}

// tidy waits until nothing of the way is left: in Varve's namespace, and volumes.
func (s *site) tidy() {
	s.T.Helper()
	s.Eventually("nothing to be left in "+s.varve, func(ctx context.Context) error {
		var left []string
		for _, l := range []client.ObjectList{&v1alpha1.VolumePopulationList{}, &corev1.PersistentVolumeClaimList{}, &batchv1.JobList{}, &corev1.PodList{}} {
			if err := s.Client.List(ctx, l, client.InNamespace(s.varve)); err != nil {
				return err
			}
			items, err := names(l)
			if err != nil {
				return err
			}
			left = append(left, items...)
		}
		var secrets corev1.SecretList
		if err := s.Client.List(ctx, &secrets, client.InNamespace(s.varve)); err != nil {
			return err
		}
		for _, o := range secrets.Items {
			if o.Name != "store" {
				left = append(left, "Secret "+o.Name)
			}
		}
		var pvs corev1.PersistentVolumeList
		if err := s.Client.List(ctx, &pvs); err != nil {
			return err
		}
		handles := map[string]int{}
		for _, pv := range pvs.Items {
			if ref := pv.Spec.ClaimRef; ref != nil {
				var c corev1.PersistentVolumeClaim
				err := s.Client.Get(ctx, client.ObjectKey{Namespace: ref.Namespace, Name: ref.Name}, &c)
				if ref.Namespace == s.varve || ref.Namespace == s.Namespace && (apierrors.IsNotFound(err) || err == nil && c.UID != ref.UID) {
					left = append(left, "PersistentVolume "+pv.Name)
				}
			}
			if pv.Spec.CSI != nil {
				if handles[pv.Spec.CSI.VolumeHandle]++; handles[pv.Spec.CSI.VolumeHandle] > 1 {
					left = append(left, "second PersistentVolume "+pv.Name)
				}
			}
		}
		var attached storagev1.VolumeAttachmentList
		if err := s.Client.List(ctx, &attached); err != nil {
			return err
		}
		if len(left) > 0 {
			var pops v1alpha1.VolumePopulationList
			_ = s.Client.List(ctx, &pops, client.InNamespace(s.varve))
			for _, p := range pops.Items {
				left = append(left, fmt.Sprintf("%s at %s: %+v", p.Spec.Claim.Name, p.Status.Step, p.Status.Conditions))
			}

			return fmt.Errorf("left: %s", strings.Join(left, ", "))
		}

		return nil
	})
}

// sourceOf makes a RecoverySource of another volume than the claim's name says.
func (s *site) sourceOf(name, volume string) {
	s.T.Helper()
	s.source(name, func(rs *v1alpha1.RecoverySource) { rs.Spec.From.Volume = volume })
}
