//go:build !race

// The race detector uses several times the memory measured here.

package populator_test

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	snapshotv1 "github.com/kubernetes-csi/external-snapshotter/client/v8/apis/volumesnapshot/v1"
	"github.com/prometheus/client_golang/prometheus"
	batchv1 "k8s.io/api/batch/v1"
	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/tools/record"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/controller-runtime/pkg/client/fake"
	"sigs.k8s.io/controller-runtime/pkg/reconcile"

	"github.com/varve-io/varve/api/v1alpha1"
	"github.com/varve-io/varve/backup/cbt/csi/csikube"
	"github.com/varve-io/varve/backup/repository/repotest"
	"github.com/varve-io/varve/populator/backups"
	"github.com/varve-io/varve/populator/claims"
	"github.com/varve-io/varve/populator/metrics"
	"github.com/varve-io/varve/populator/mover"
	"github.com/varve-io/varve/populator/queue"
	"github.com/varve-io/varve/populator/report"
	"github.com/varve-io/varve/populator/store"
	"github.com/varve-io/varve/populator/storekeeper"
)

// crowd is how much work the controller has when it starts.
type crowd struct{ stores, claims, runs int }

// The controller stays small with any amount of work: connections are shared, and one key
// is derived at a time. Each case runs in its own process, and the kernel reports its peak.
func TestMemory(t *testing.T) {
	if c, ok := os.LookupEnv(crowdVariable); ok {
		work(t, c)
		return
	}
	// Two repositories, copied: making 50 would take most of the time. Keys are derived one
	// after the other, so a few that cost memory show as much as all would.
	const derived = 8
	costly, cheap := repotest.NewScrypt(t).Dir, repotest.New(t).Dir
	for _, row := range []struct {
		crowd
		most int // MiB
	}{
		{crowd{stores: 13, claims: 20, runs: 14}, 300},
		{crowd{stores: 50, claims: 1000, runs: 14}, 500},
	} {
		t.Run(fmt.Sprintf("%d stores %d claims", row.stores, row.claims), func(t *testing.T) {
			base := t.TempDir()
			for i := range row.stores {
				made := costly
				if i >= derived {
					made = cheap
				}
				if err := os.CopyFS(filepath.Join(base, "volumes", fmt.Sprint("s", i)), os.DirFS(made)); err != nil {
					t.Fatal(err)
				}
			}
			cmd := exec.CommandContext(t.Context(), "/proc/self/exe", "-test.run=^TestMemory$", "-test.v")
			cmd.Env = append(os.Environ(), fmt.Sprintf("%s=%d %d %d", crowdVariable, row.stores, row.claims, row.runs), "TMPDIR="+base, "GOMEMLIMIT=off", "GOGC=100")
			out, err := cmd.CombinedOutput()
			if err != nil {
				t.Fatalf("%v\n%s", err, out)
			}
			m := peakLine.FindSubmatch(out)
			if m == nil {
				t.Fatalf("it does not tell its peak:\n%s", out)
			}
			kib, err := strconv.Atoi(string(m[1]))
			if err != nil {
				t.Fatal(err)
			}
			t.Logf("peak %d MiB", kib>>10)
			if kib>>10 >= row.most {
				t.Errorf("peak %d MiB, want less than %d", kib>>10, row.most)
			}
		})
	}
}

const crowdVariable = "VARVE_TEST_CROWD"

var peakLine = regexp.MustCompile(`VmHWM:\s+(\d+) kB`)

// work is the measured process: each kind's workers reconcile its objects, all kinds at once,
// as when the controller starts.
func work(t *testing.T, text string) {
	var c crowd
	if _, err := fmt.Sscan(text, &c.stores, &c.claims, &c.runs); err != nil {
		t.Fatal(err)
	}
	cl := cluster(t, c)
	st := &store.Stores{
		Client: cl, Secrets: cl, Namespace: "varve", Dir: t.TempDir(), VolumesDir: filepath.Join(os.Getenv("TMPDIR"), "volumes"), Connections: store.NewConnections(),
	}
	defer st.Connections.Close()
	count, err := metrics.New(prometheus.NewRegistry())
	if err != nil {
		t.Fatal(err)
	}
	events := report.NewEvents(&record.FakeRecorder{})
	pods := mover.Pods{Namespace: "varve", Image: "varve"}
	keeper := &storekeeper.Keeper{Client: cl, Live: cl, Stores: st, Pods: pods, Events: events, Metrics: count, MaintainEvery: 6 * time.Hour}
	runs := &backups.Reconciler{Client: cl, Live: cl, Stores: st, Pods: pods, Queue: queue.New(16, nil), Events: events, Metrics: count}
	pending := &claims.Claims{Deps: claims.Deps{Client: cl, Live: cl, Namespace: "varve", Points: claims.StorePoints{Stores: st}, Events: events, Metrics: count, Now: time.Now}}

	const workers = 8
	var all sync.WaitGroup
	each := func(passes, n int, do func(i int) error) {
		all.Go(func() {
			for range passes {
				next := make(chan int)
				var kind sync.WaitGroup
				for range workers {
					kind.Go(func() {
						for i := range next {
							if err := do(i); err != nil {
								t.Error(err)
							}
						}
					})
				}
				for i := range n {
					next <- i
				}
				close(next)
				kind.Wait()
			}
		})
	}
	each(2, c.stores, func(i int) error {
		_, err := keeper.Reconcile(t.Context(), store.Key{Kind: v1alpha1.StoreKindBackupStore, Name: fmt.Sprint("s", i)})
		return err
	})
	each(1, c.runs, func(i int) error {
		_, err := runs.Reconcile(t.Context(), reconcile.Request{NamespacedName: types.NamespacedName{Namespace: "shop", Name: fmt.Sprint("run", i)}})
		return err
	})
	each(1, c.claims, func(i int) error {
		_, err := pending.Reconcile(t.Context(), reconcile.Request{NamespacedName: types.NamespacedName{Namespace: "shop", Name: fmt.Sprint("pending", i)}})
		return err
	})
	all.Wait()
	check(t, cl, c)
	status, err := os.ReadFile("/proc/self/status")
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(status)) {
		if strings.HasPrefix(line, "VmHWM:") {
			t.Log(line)
		}
	}
}

// check reports whether the measured work was done.
func check(t *testing.T, cl client.Client, c crowd) {
	t.Helper()
	for i := range c.stores {
		var o v1alpha1.BackupStore
		if err := cl.Get(t.Context(), client.ObjectKey{Name: fmt.Sprint("s", i)}, &o); err != nil {
			t.Fatal(err)
		}
		if !meta.IsStatusConditionTrue(o.Status.Conditions, v1alpha1.ConditionReady) {
			t.Errorf("store %d was not reached: %+v", i, o.Status.Conditions)
		}
	}
	for i := range c.runs {
		var o v1alpha1.VolumeBackup
		if err := cl.Get(t.Context(), client.ObjectKey{Namespace: "shop", Name: fmt.Sprint("run", i)}, &o); err != nil {
			t.Fatal(err)
		}
		if o.Status.Step != "Read" {
			t.Errorf("run %d is at step %s: %+v", i, o.Status.Step, o.Status.Conditions)
		}
	}
	var rs v1alpha1.RecoverySource
	if err := cl.Get(t.Context(), client.ObjectKey{Namespace: "shop", Name: "from0"}, &rs); err != nil {
		t.Fatal(err)
	}
	if c := meta.FindStatusCondition(rs.Status.Conditions, v1alpha1.ConditionReady); c == nil || c.Reason != v1alpha1.ReasonNoRecoveryPoint {
		t.Errorf("the repository was not asked for points: %+v", rs.Status.Conditions)
	}
}

// cluster has stores on directories, claims that wait for a missing point, and runs that are
// about to read the repository.
func cluster(t *testing.T, c crowd) client.Client {
	t.Helper()
	s := runtime.NewScheme()
	if err := errors.Join(corev1.AddToScheme(s), batchv1.AddToScheme(s), v1alpha1.AddToScheme(s), csikube.AddToScheme(s)); err != nil {
		t.Fatal(err)
	}
	yes, handle := true, "snap"
	objects := []client.Object{
		&corev1.Secret{ObjectMeta: metav1.ObjectMeta{Namespace: "varve", Name: "creds"}, Data: map[string][]byte{"password": []byte(repotest.Password)}},
		&corev1.PersistentVolume{ObjectMeta: metav1.ObjectMeta{Name: "pv"}},
	}
	class := "class"
	for i := range c.stores {
		name := fmt.Sprint("s", i)
		objects = append(objects, &v1alpha1.BackupStore{
			ObjectMeta: metav1.ObjectMeta{Name: name, UID: types.UID(name), CreationTimestamp: metav1.Now()}, Spec: v1alpha1.BackupStoreSpec{RepositorySpec: v1alpha1.RepositorySpec{
				Storage: v1alpha1.Storage{Volume: &v1alpha1.VolumeStorage{ClaimName: name}}, ClusterName: "here", CredentialsSecretRef: corev1.LocalObjectReference{Name: "creds"},
			}},
		}, &v1alpha1.RecoverySource{
			ObjectMeta: metav1.ObjectMeta{Namespace: "shop", Name: fmt.Sprint("from", i)}, Spec: v1alpha1.RecoverySourceSpec{StoreRef: v1alpha1.StoreReference{Name: name}},
		})
	}
	for i := range c.runs {
		uid := types.UID(fmt.Sprint("run", i))
		twin := "varve-twin-" + string(uid)
		now := metav1.Now()
		objects = append(objects,
			&v1alpha1.VolumeBackup{
				ObjectMeta: metav1.ObjectMeta{Namespace: "shop", Name: string(uid), UID: uid},
				Spec:       v1alpha1.VolumeBackupSpec{ClaimName: fmt.Sprint("data", i), StoreRef: v1alpha1.StoreReference{Name: fmt.Sprint("s", i%c.stores)}},
				Status: v1alpha1.VolumeBackupStatus{
					Step: "AskChanges", ClaimUID: "claim", VolumeHandle: "vol", SnapshotHandle: handle, SnapshotTime: &now,
					Claim: &v1alpha1.ClaimSummary{VolumeMode: corev1.PersistentVolumeBlock, RequestBytes: 1 << 20, CapacityBytes: 1 << 20, StorageClassName: class},
				},
			},
			&corev1.PersistentVolumeClaim{ObjectMeta: metav1.ObjectMeta{Namespace: "shop", Name: fmt.Sprint("data", i), UID: "claim"}, Spec: corev1.PersistentVolumeClaimSpec{VolumeName: "pv"}},
			&snapshotv1.VolumeSnapshot{
				ObjectMeta: metav1.ObjectMeta{Namespace: "varve", Name: twin, UID: uid},
				Status:     &snapshotv1.VolumeSnapshotStatus{BoundVolumeSnapshotContentName: &twin, ReadyToUse: &yes},
			},
			&snapshotv1.VolumeSnapshotContent{
				ObjectMeta: metav1.ObjectMeta{Name: twin},
				Spec: snapshotv1.VolumeSnapshotContentSpec{Driver: "csi", Source: snapshotv1.VolumeSnapshotContentSource{SnapshotHandle: &handle},
					VolumeSnapshotRef: corev1.ObjectReference{Namespace: "varve", Name: twin, UID: uid}},
				Status: &snapshotv1.VolumeSnapshotContentStatus{SnapshotHandle: &handle, ReadyToUse: &yes},
			})
	}
	for i := range c.claims {
		name := fmt.Sprint("pending", i)
		objects = append(objects, &corev1.PersistentVolumeClaim{
			ObjectMeta: metav1.ObjectMeta{Namespace: "shop", Name: name, UID: types.UID(name)},
			Spec: corev1.PersistentVolumeClaimSpec{
				StorageClassName: &class,
				DataSourceRef:    &corev1.TypedObjectReference{APIGroup: &v1alpha1.GroupVersion.Group, Kind: "RecoverySource", Name: fmt.Sprint("from", i%c.stores)},
			},
		})
	}
	return fake.NewClientBuilder().WithScheme(s).
		WithStatusSubresource(&v1alpha1.VolumeBackup{}, &v1alpha1.BackupStore{}, &v1alpha1.RecoverySource{}, &v1alpha1.ProtectedVolume{}).
		WithObjects(objects...).Build()
}
