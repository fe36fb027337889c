package kubernetes

import (
	"context"
	"errors"
	"fmt"
	"os"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	authenticationv1 "k8s.io/api/authentication/v1"
	batchv1 "k8s.io/api/batch/v1"
	corev1 "k8s.io/api/core/v1"
	storagev1 "k8s.io/api/storage/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/rest"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"github.com/varve-io/varve/api/v1alpha1"
	"github.com/varve-io/varve/e2e/cluster"
	"github.com/varve-io/varve/e2e/csidriver"
	"github.com/varve-io/varve/e2e/framework"
	"github.com/varve-io/varve/populator"
	"github.com/varve-io/varve/populator/backups"
	"github.com/varve-io/varve/populator/claims"
	"github.com/varve-io/varve/populator/mover"
	"github.com/varve-io/varve/populator/step"
)

// shippedRights is a client's configuration with a token of the controller's account:
// what the manifests allow and no more.
func (s *site) shippedRights() *rest.Config {
	s.T.Helper()
	seconds := int64(7200)
	tr, err := s.Clientset.CoreV1().ServiceAccounts(varveNamespace).CreateToken(s.T.Context(), controllerName,
		&authenticationv1.TokenRequest{Spec: authenticationv1.TokenRequestSpec{ExpirationSeconds: &seconds}}, metav1.CreateOptions{})
	if err != nil {
		s.T.Fatal(err)
	}
	cfg := rest.AnonymousClientConfig(s.Config)
	cfg.BearerToken, cfg.QPS, cfg.Burst = tr.Status.Token, 200, 400

	return cfg
}

var errKilled = errors.New("the process was killed here")

// point is a place at which a process can die: before or after a write.
type point struct {
	step, verb, kind string
	after            bool
}

func (p point) String() string {
	when := "before"
	if p.after {
		when = "after"
	}

	return fmt.Sprintf("%s %s %s in %q", when, p.verb, p.kind, p.step)
}

// incarnation is one life of the controller, in this process.
type incarnation struct {
	killed chan struct{} // closed when it is to die
	stop   func() error  // ends what is left of it and waits
}

// live starts a controller that dies at the first write that dies says yes to. From
// then on none of its writes comes through.
func (s *site) live(cfg *rest.Config, dies func(point) bool) *incarnation {
	s.T.Helper()
	inc := &incarnation{killed: make(chan struct{})}
	var mu sync.Mutex
	dead := false
	hook := func(_ context.Context, w step.Write) error {
		mu.Lock()
		defer mu.Unlock()
		if dead {
			return errKilled
		}
		if w.Kind == "BackupStore" || !dies(point{w.Step, w.Verb, w.Kind, w.After}) {
			return nil
		}
		dead = true
		close(inc.killed)

		return errKilled
	}
	mgr, err := populator.New(cfg, populator.Options{
		Pods: mover.Pods{Namespace: varveNamespace, Image: shippedImage, PullPolicy: corev1.PullIfNotPresent, ServiceAccount: "varve-mover"},
		Dir:  s.T.TempDir(), Workers: 4, VerifyUnchanged: 0.001, MetricsAddress: "0", HealthAddress: "0", Hook: hook, Registry: prometheus.NewRegistry(),
	})
	if err != nil {
		s.T.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan error, 1)
	go func() { ended <- mgr.Start(ctx) }()
	inc.stop = func() error {
		cancel()

		return <-ended
	}

	return inc
}

// uid and id are parts of names that differ from run to run.
var volatile = regexp.MustCompile(`[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}|[0-9a-f]{16}|[0-9a-f]{10}`)

// alike is an inventory in which names that only differ by what is random are the same.
func (inv inventory) alike() inventory {
	out := inventory{}
	for kind, names := range inv {
		seen := map[string]int{}
		for _, n := range names {
			n = volatile.ReplaceAllString(n, "*")
			seen[n]++
			out[kind] = append(out[kind], fmt.Sprintf("%s (%d)", n, seen[n]))
		}
	}

	return out
}

// job is work for the controller, and how to tell that it came to its end.
type job struct {
	start func()
	ended func(context.Context) error
}

// backupJob is a backup of claim data, by delta; it is to end in a phase. What it is read from is
// of a class that would keep it.
func (k *killer) backupJob(name string, want v1alpha1.BackupPhase) job {
	return job{func() {
		k.startBackup(name, "data", func(vb *v1alpha1.VolumeBackup) {
			vb.Spec.BackupVolume = &v1alpha1.BackupVolume{StorageClassName: k.retaining}
		})
	}, func(ctx context.Context) error {
		var vb v1alpha1.VolumeBackup
		if err := k.Client.Get(ctx, k.Key(name), &vb); err != nil {
			return err
		}
		if vb.Status.Phase != want || vb.Status.CompletionTime == nil {
			return fmt.Errorf("backup is %s at %s: %s", vb.Status.Phase, vb.Status.Step, says(vb.Status.Conditions))
		}

		return nil
	}}
}

// restoreJob is a claim to be filled: one in Block mode is given the volume that was
// written, one in Filesystem mode another one, by the swap.
func (s *site) restoreJob(c framework.Claim, source string) job {
	return job{func() { s.restoreClaim(restored{Claim: c, Source: source}) }, func(ctx context.Context) error {
		var pvc corev1.PersistentVolumeClaim
		if err := s.Client.Get(ctx, s.Key(c.Name), &pvc); err != nil {
			return err
		}
		if pvc.Status.Phase != corev1.ClaimBound || len(pvc.Finalizers) != 1 {
			return fmt.Errorf("claim %s is %s with %v; %s", c.Name, pvc.Status.Phase, pvc.Finalizers, s.LastEvent(ctx, c.Name))
		}

		return s.nothingAt(ctx, pvc.UID)
	}}
}

// nothingAt is nil if no VolumePopulation is about a claim.
func (s *site) nothingAt(ctx context.Context, claim types.UID) error {
	var pop v1alpha1.VolumePopulation
	err := s.Client.Get(ctx, client.ObjectKey{Namespace: varveNamespace, Name: claims.PopulationName(claim)}, &pop)
	if err == nil {
		return fmt.Errorf("there is a VolumePopulation at %q", pop.Status.Step)
	}

	return client.IgnoreNotFound(err)
}

// deletedJob is a claim that is deleted while its volume is being made.
func (s *site) deletedJob(c framework.Claim, source string) job {
	var pvc *corev1.PersistentVolumeClaim
	deleted := false

	return job{func() { pvc = s.restoreClaim(restored{Claim: c, Source: source}) }, func(ctx context.Context) error {
		if !deleted {
			prime := client.ObjectKey{Namespace: varveNamespace, Name: claims.PrimePrefix + string(pvc.UID)}
			if err := s.Client.Get(ctx, prime, &corev1.PersistentVolumeClaim{}); err != nil {
				return err
			}
			if err := s.Client.Delete(ctx, pvc); err != nil {
				return err
			}
			deleted = true
		}
		if err := s.Client.Get(ctx, s.Key(c.Name), &corev1.PersistentVolumeClaim{}); err == nil {
			return fmt.Errorf("claim %s is still there", c.Name)
		} else if client.IgnoreNotFound(err) != nil {
			return err
		}

		return s.nothingAt(ctx, pvc.UID)
	}}
}

// through runs jobs to their ends by one incarnation after another, each of which dies
// where dies says. It returns where they died.
func (s *site) through(ctx context.Context, cfg *rest.Config, jobs []job, dies func(point) bool) (died []point, err error) {
	var mu sync.Mutex
	note := func(p point) bool {
		mu.Lock()
		defer mu.Unlock()
		if !dies(p) {
			return false
		}
		died = append(died, p)

		return true
	}
	for _, j := range jobs {
		j.start()
	}
	for {
		inc := s.live(cfg, note)
		var last error
		again := false
		for !again {
			last = nil
			for _, j := range jobs {
				last = errors.Join(last, j.ended(ctx))
			}
			if last == nil {
				break
			}
			select {
			case <-inc.killed:
				again = true
			case <-ctx.Done():
				return died, errors.Join(last, ctx.Err(), inc.stop())
			case <-time.After(50 * time.Millisecond):
			}
		}
		if !again {
			return died, inc.stop()
		}
		_ = inc.stop() // it was killed: whatever it says
	}
}

// killer kills controllers at their work and looks at what comes of it.
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
// unless all is then as it was before but for what the jobs are to leave. look reads
// what came back; its claims are deleted afterwards.
func (k *killer) run(dies func(point) bool, jobs func(n int) []job, look func(n int), claims ...string) []point {
	k.T.Helper()
	n := k.runs
	k.runs++
	ctx, cancel := context.WithTimeout(k.T.Context(), 8*time.Minute)
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
	// One base is there before and after, another one; all else is as it was.
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

// idle is nil if nothing is going on in Varve's namespace.
func (s *site) idle(ctx context.Context) error {
	var busy []string
	for _, list := range []client.ObjectList{&batchv1.JobList{}, &corev1.PodList{}, &corev1.PersistentVolumeClaimList{}, &v1alpha1.VolumePopulationList{}} {
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

// work is a backup by delta and a restore of each kind.
func (k *killer) work(n int) []job {
	return []job{
		k.backupJob(fmt.Sprintf("run-%d", n), v1alpha1.BackupSucceeded),
		k.restoreJob(framework.Claim{Name: fmt.Sprintf("block-%d", n), Class: k.class, Mode: framework.Block, Size: "64Mi"}, "block"),
		k.restoreJob(framework.Claim{Name: fmt.Sprintf("files-%d", n), Class: k.class, Mode: framework.Filesystem, Size: "32Mi"}, "files"),
	}
}

// sees fails the test unless what came back is what was backed up.
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

// everywhere dies once at each point.
func everywhere() func(point) bool {
	done := map[point]bool{}

	return func(p point) bool {
		if done[p] {
			return false
		}
		done[p] = true

		return true
	}
}

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

// newKiller has a claim of each mode backed up, and no controller but this process.
func newKiller(t *testing.T) *killer {
	t.Helper()
	s := newSite(t)
	k := &killer{site: s, driver: s.Driver(csidriver.Options{AttachRequired: true, DetachDelay: detach})}
	k.class = k.driver.Class()
	k.retaining = s.retainingClass(k.class)
	s.CreateClaim(framework.Claim{Name: "data", Class: k.class, Mode: framework.Block, Size: "64Mi"})
	s.CreateClaim(framework.Claim{Name: "text", Class: k.class, Mode: framework.Filesystem, Size: "32Mi"})
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

// The controller is killed before and after each write of each step, of backups and
// restores and of what undoes them, and what is there in the end is what is there
// without that: nothing left over, nothing lost.
//
// It is killed at all writes in turn while one backup and two restores go on, and then,
// in runs of their own, at one write of each of the three: in all such runs, or in so
// many as VARVE_E2E_KILLS says, a new share each day.
func TestKilledAtEachWrite(t *testing.T) {
	k := newKiller(t) // alone: the controller is this process
	all := k.worked(everywhere())
	t.Logf("killed %d times", len(all))

	// A driver that takes no Block volumes any more: the backup fails, and the restore
	// gets no volume and is deleted.
	k.SetDriver(k.driver, csidriver.Options{AttachRequired: true, NoBlock: true})
	undone := k.run(everywhere(), func(n int) []job {
		return []job{
			k.backupJob(fmt.Sprintf("run-%d", n), v1alpha1.BackupFailed),
			k.deletedJob(framework.Claim{Name: fmt.Sprintf("block-%d", n), Class: k.class, Mode: framework.Block, Size: "64Mi"}, "block"),
		}
	}, nil)
	t.Logf("killed %d times while it undid things", len(undone))

	// One that makes devices shorter than it says: a larger volume is made.
	k.SetDriver(k.driver, csidriver.Options{AttachRequired: true, ShortBy: 16 << 20})
	anew := k.run(everywhere(), func(n int) []job {
		return []job{k.restoreJob(framework.Claim{Name: fmt.Sprintf("block-%d", n), Class: k.class, Mode: framework.Block, Size: "64Mi"}, "block")}
	}, func(n int) { k.sees(n, map[string]corev1.PersistentVolumeMode{"block": framework.Block}) }, "block")
	t.Logf("killed %d times while it began anew", len(anew))
	k.SetDriver(k.driver, csidriver.Options{AttachRequired: true, DetachDelay: detach})

	steps := map[string]bool{}
	for _, p := range slices.Concat(all, undone, anew) {
		steps[p.step] = true
	}
	lists := map[string][]string{backups.Backup.Name: backups.Backup.Names()}
	lists[backups.Abandon.Name] = append(lists[backups.Abandon.Name], backups.Abandon.Names()...)
	for _, l := range claims.Lists() {
		lists[l.Name] = append(lists[l.Name], l.Names()...)
	}
	for list, names := range lists {
		for _, name := range names {
			if !steps[list+"/"+name] {
				t.Errorf("nothing was killed in step %s/%s", list, name)
			}
		}
	}
	for i, points := range chosen(t, all) {
		died := k.worked(at(points...))
		t.Logf("run %d: killed at %v", i, died)
	}
}

// chosen are the points to be killed at in runs of their own: one of a backup, one of
// what all restores do and one of how they hand over, together.
func chosen(t *testing.T, all []point) [][]point {
	t.Helper()
	var kinds [3][]point
	for _, p := range all {
		switch list, _, _ := strings.Cut(p.step, "/"); list {
		case "backup":
			kinds[0] = append(kinds[0], p)
		case "rebind", "swap":
			kinds[2] = append(kinds[2], p)
		default:
			kinds[1] = append(kinds[1], p)
		}
	}
	var runs [][]point
	for i := range max(len(kinds[0]), len(kinds[1]), len(kinds[2])) {
		var run []point
		for _, points := range kinds {
			if i < len(points) {
				run = append(run, points[i])
			}
		}
		runs = append(runs, run)
	}
	share := os.Getenv("VARVE_E2E_KILLS")
	if share == "all" {
		t.Logf("all %d runs of their own follow", len(runs))

		return runs
	}
	n := 0
	if share != "" {
		var err error
		if n, err = strconv.Atoi(share); err != nil || n < 0 {
			t.Fatalf("VARVE_E2E_KILLS is %q, neither all nor a number", share)
		}
	}
	n = min(n, len(runs))
	day := int(time.Now().Unix() / int64(24*time.Hour/time.Second))
	var out [][]point
	for i := range n {
		out = append(out, runs[(day*n+i)%len(runs)])
	}
	t.Logf("%d of %d runs of their own follow, as VARVE_E2E_KILLS is %q and the day %d", n, len(runs), share, day)

	return out
}
