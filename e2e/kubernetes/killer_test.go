package kubernetes

import (
	"context"
	"errors"
	"fmt"
	"hash/fnv"
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	batchv1 "k8s.io/api/batch/v1"
	corev1 "k8s.io/api/core/v1"
	storagev1 "k8s.io/api/storage/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/rest"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"github.com/varve-io/varve/api/v1alpha1"
	"github.com/varve-io/varve/e2e/cluster"
	"github.com/varve-io/varve/e2e/csidriver"
	"github.com/varve-io/varve/e2e/framework"
)

// killer kills working controllers and checks the result.
type killer struct {
	*site
	driver *cluster.Driver
	class  string
	// retaining is a class of the same driver whose volumes stay when they are released.
	retaining string
	cfg       *rest.Config
	sum       string // of what the source "block" has
	runs      int
}

// run does jobs once, with the controller dying where dies says, and fails the test
// unless all is then unchanged except for what the jobs must leave. look reads what came
// back; its claims are deleted afterwards.
func (k *killer) run(dies func(point) bool, jobs func(n int) []job, look func(n int), claims ...string) []point {
	k.T.Helper()
	n := k.runs
	k.runs++
	ctx, cancel := context.WithTimeout(k.T.Context(), 20*time.Minute)
	defer cancel()
	k.Exec("writer", "dd if=/dev/urandom of=/dev/data bs=4096 count=2 seek=700 conv=notrunc 2>/dev/null; sync")
	if err := k.Await(ctx, "what was before to be over", k.idle); err != nil {
		k.T.Fatal(err)
	}
	before, err := k.take(ctx, k.driver)
	if err != nil {
		k.T.Fatal(err)
	}
	died, err := k.through(ctx, k.cfg, jobs(n), dies)
	if err != nil {
		k.T.Fatalf("killed %d times, last %v: %v", len(died), died[max(0, len(died)-3):], err)
	}
	if look != nil {
		look(n)
	}
	for _, c := range claims {
		k.deleteClaim(fmt.Sprintf("%s-%d", c, n))
	}
	// There is one base before and another one after; all else is unchanged.
	if err := k.Await(ctx, "the cluster to be as it was", func(ctx context.Context) error {
		after, err := k.take(ctx, k.driver)
		if err != nil {
			return err
		}
		return before.alike().differs(after.alike())
	}); err != nil {
		k.T.Errorf("killed at %v: %v", died, err)
	}
	return died
}

// idle returns nil if nothing runs in Varve's namespace.
func (s *site) idle(ctx context.Context) error {
	var busy []string
	for _, list := range []client.ObjectList{&batchv1.JobList{}, &corev1.PodList{}, &corev1.PersistentVolumeClaimList{}, &v1alpha1.VolumePopulationList{}, &v1alpha1.VolumeReplacementList{}} {
		names, err := s.names(ctx, list, func(o client.Object) bool {
			return o.GetNamespace() == varveNamespace && o.GetLabels()["app.kubernetes.io/component"] != "controller"
		})
		if err != nil {
			return err
		}
		busy = append(busy, names...)
	}
	if len(busy) > 0 {
		return errors.New(strings.Join(busy, ", "))
	}
	return nil
}

// work returns a backup by delta and a restore of each kind.
func (k *killer) work(n int) []job {
	return []job{
		k.backupJob(fmt.Sprintf("run-%d", n), v1alpha1.BackupSucceeded),
		k.restoreJob(framework.Claim{Name: fmt.Sprintf("block-%d", n), Class: k.class, Mode: framework.Block, Size: "64Mi"}, "block"),
		k.restoreJob(framework.Claim{Name: fmt.Sprintf("files-%d", n), Class: k.class, Mode: framework.Filesystem, Size: "32Mi"}, "files"),
		k.rollBackJob(fmt.Sprintf("roll-%d", n), false),
	}
}

// sees fails the test unless what came back equals what was backed up.
func (k *killer) sees(n int, claims map[string]corev1.PersistentVolumeMode) {
	k.T.Helper()
	mounts := map[string]corev1.PersistentVolumeMode{}
	for name, mode := range claims {
		mounts[fmt.Sprintf("%s-%d", name, n)] = mode
	}
	k.RunPod(framework.Pod{Name: "reader", Claims: mounts})
	for name, mode := range mounts {
		if mode == framework.Block {
			if got := k.Exec("reader", "head -c 67108864 /dev/"+name+" | sha256sum | cut -d' ' -f1"); got != k.sum {
				k.T.Errorf("what came back on %s is not what was backed up", name)
			}
		} else if got := k.Exec("reader", "cat /"+name+"/a"); got != "layer" {
			k.T.Errorf("the file that came back on %s has %q", name, got)
		}
	}
	k.deletePod("reader")
}

// worked is run of work.
func (k *killer) worked(dies func(point) bool) []point {
	k.T.Helper()
	return k.run(dies, k.work, func(n int) {
		k.sees(n, map[string]corev1.PersistentVolumeMode{"block": framework.Block, "files": framework.Filesystem})
	}, "block", "files")
}

// everywhere dies once at each write: before and after it if VARVE_E2E_KILLS is all, else on one side of it, which the
// day chooses, and in any case where a step begins to write.
func everywhere() func(point) bool {
	both, day := os.Getenv("VARVE_E2E_KILLS") == "all", today()
	done, steps := map[point]bool{}, map[string]bool{}
	return func(p point) bool {
		side := fnv.New32a() // writing to it never fails
		_, _ = fmt.Fprint(side, p.step, p.verb, p.kind, day)
		if done[p] || !both && steps[p.step] && p.after != (side.Sum32()%2 == 0) {
			return false
		}
		done[p], steps[p.step] = true, true
		return true
	}
}

// today is the number of the day.
func today() int { return int(time.Now().Unix() / int64(24*time.Hour/time.Second)) }

// at dies once at each of some points.
func at(points ...point) func(point) bool {
	left := slices.Clone(points)
	return func(p point) bool {
		i := slices.Index(left, p)
		if i < 0 {
			return false
		}
		left = slices.Delete(left, i, i+1)
		return true
	}
}

// detach is how long the driver takes to detach a volume: long enough to be killed.
const detach = csidriver.Duration(300 * time.Millisecond)

// retainingClass is like another class, but its volumes stay when they are released.
func (s *site) retainingClass(like string) string {
	s.T.Helper()
	var class storagev1.StorageClass
	s.Eventually("class "+like, func(ctx context.Context) error { return s.Client.Get(ctx, client.ObjectKey{Name: like}, &class) })
	retain := corev1.PersistentVolumeReclaimRetain
	class.ObjectMeta = metav1.ObjectMeta{Name: like + "-retain"}
	class.ReclaimPolicy = &retain
	s.Create(&class)
	s.atEnd(func() {
		if err := s.Client.Delete(context.Background(), &class); err != nil {
			s.T.Error(err)
		}
	})
	return class.Name
}

// newKiller backs up a claim of each mode, and leaves no controller but this process.
func newKiller(t *testing.T) *killer {
	t.Helper()
	s := newSite(t)
	k := &killer{site: s, driver: s.Driver(csidriver.Options{AttachRequired: true, DetachDelay: detach})}
	k.class = k.driver.Class()
	k.retaining = s.retainingClass(k.class)
	s.CreateClaim(framework.Claim{Name: "data", Class: k.class, Mode: framework.Block, Size: "64Mi"})
	s.CreateClaim(framework.Claim{Name: "text", Class: k.class, Mode: framework.Filesystem, Size: "32Mi"})
	s.CreateClaim(framework.Claim{Name: "roll", Class: k.class, Mode: framework.Block, Size: "64Mi"})
	s.RunPod(framework.Pod{Name: "writer", Claims: map[string]corev1.PersistentVolumeMode{"data": framework.Block, "text": framework.Filesystem}})
	s.Exec("writer", fill+"\necho layer > /text/a; sync")
	first := s.backup("first", "data", nil)
	s.backup("text", "text", nil)
	k.sum = s.SHA256("writer", "/dev/data")
	s.source("block", func(rs *v1alpha1.RecoverySource) {
		rs.Spec.From.Volume, rs.Spec.At.ID = "data", first.Status.Point.ID
	})
	s.source("files", func(rs *v1alpha1.RecoverySource) { rs.Spec.From.Volume = "text" })
	s.scaleController(0)
	s.atEnd(func() { s.scaleController(2) })
	k.cfg = s.shippedRights()
	return k
}
