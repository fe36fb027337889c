package kubernetes

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"os"
	"regexp"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	authenticationv1 "k8s.io/api/authentication/v1"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/rest"

	"github.com/varve-io/varve/api/v1alpha1"
	"github.com/varve-io/varve/e2e/csidriver"
	"github.com/varve-io/varve/e2e/framework"
	"github.com/varve-io/varve/populator"
	"github.com/varve-io/varve/populator/backups"
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

// jobs are a backup by delta, a restore whose volume is re-bound, and one whose volume
// is swapped for one in Filesystem mode; n tells runs apart.
func (s *site) jobs(n int) []job {
	backup := fmt.Sprintf("run-%d", n)
	block, files := fmt.Sprintf("block-%d", n), fmt.Sprintf("files-%d", n)
	bound := func(name string) func(context.Context) error {
		return func(ctx context.Context) error {
			var pvc corev1.PersistentVolumeClaim
			if err := s.Client.Get(ctx, s.Key(name), &pvc); err != nil {
				return err
			}
			if pvc.Status.Phase != corev1.ClaimBound || len(pvc.Finalizers) != 1 {
				return fmt.Errorf("claim %s is %s with %v; %s", name, pvc.Status.Phase, pvc.Finalizers, s.LastEvent(ctx, name))
			}

			return nil
		}
	}

	return []job{
		{func() { s.startBackup(backup, "data", nil) }, func(ctx context.Context) error {
			var vb v1alpha1.VolumeBackup
			if err := s.Client.Get(ctx, s.Key(backup), &vb); err != nil {
				return err
			}
			if vb.Status.Phase != v1alpha1.BackupSucceeded {
				return fmt.Errorf("backup is %s at %s: %s", vb.Status.Phase, vb.Status.Step, says(vb.Status.Conditions))
			}

			return nil
		}},
		{func() {
			s.restoreClaim(restored{Claim: framework.Claim{Name: block, Mode: framework.Block, Size: "64Mi"}, Source: "block"})
		}, bound(block)},
		{func() {
			s.restoreClaim(restored{Claim: framework.Claim{Name: files, Mode: framework.Filesystem, Size: "32Mi"}, Source: "files"})
		}, bound(files)},
	}
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

// The controller is killed before and after each write of each step, and what is there
// in the end is what is there without that: nothing left over, nothing lost.
//
// In turn at all of them during one run; with VARVE_E2E_LONG=1 also at each of them in
// a run of its own.
func TestKilledAtEachWrite(t *testing.T) {
	s := newSite(t) // alone: the controller is this process
	d := s.Driver(csidriver.Options{})
	class := d.Class()
	s.CreateClaim(framework.Claim{Name: "data", Class: class, Mode: framework.Block, Size: "64Mi"})
	s.CreateClaim(framework.Claim{Name: "text", Class: class, Mode: framework.Filesystem, Size: "32Mi"})
	s.RunPod(framework.Pod{Name: "writer", Claims: map[string]corev1.PersistentVolumeMode{"data": framework.Block, "text": framework.Filesystem}})
	s.Exec("writer", fill+"\necho layer > /text/a; sync")
	first := s.backup("first", "data", nil)
	s.backup("text", "text", nil)
	sum := s.SHA256("writer", "/dev/data")
	s.source("block", func(rs *v1alpha1.RecoverySource) {
		rs.Spec.From.Volume, rs.Spec.At.ID = "data", first.Status.Point.ID
	})
	s.source("files", func(rs *v1alpha1.RecoverySource) { rs.Spec.From.Volume = "text" })
	s.scaleController(0)
	defer s.scaleController(2)
	cfg := s.shippedRights()

	change := func() {
		s.Exec("writer", "dd if=/dev/urandom of=/dev/data bs=4096 count=2 seek=700 conv=notrunc 2>/dev/null; sync")
	}
	// run does all jobs once and returns what that added to the cluster.
	run := func(n int, dies func(point) bool) []point {
		t.Helper()
		ctx, cancel := context.WithTimeout(t.Context(), 8*time.Minute)
		defer cancel()
		change()
		before, err := s.take(ctx, d)
		if err != nil {
			t.Fatal(err)
		}
		died, err := s.through(ctx, cfg, s.jobs(n), dies)
		if err != nil {
			t.Fatalf("killed %d times, last %v: %v", len(died), died[max(0, len(died)-3):], err)
		}
		s.RunPod(framework.Pod{Name: "reader", Claims: map[string]corev1.PersistentVolumeMode{
			fmt.Sprintf("block-%d", n): framework.Block, fmt.Sprintf("files-%d", n): framework.Filesystem}})
		if got := s.SHA256("reader", fmt.Sprintf("/dev/block-%d", n)); got != sum {
			t.Error("what came back is not what was backed up")
		}
		if got := s.Exec("reader", fmt.Sprintf("cat /files-%d/a", n)); got != "layer" {
			t.Errorf("the file that came back has %q", got)
		}
		s.deletePod("reader")
		s.deleteClaim(fmt.Sprintf("block-%d", n))
		s.deleteClaim(fmt.Sprintf("files-%d", n))
		// One base is there before and after, another one; all else is as it was.
		if err := s.Await(ctx, "the cluster to be as it was", func(ctx context.Context) error {
			after, err := s.take(ctx, d)
			if err != nil {
				return err
			}

			return before.alike().differs(after.alike())
		}); err != nil {
			t.Errorf("killed at %v: %v", died, err)
		}

		return died
	}

	done := map[point]bool{}
	all := run(0, func(p point) bool {
		if done[p] {
			return false
		}
		done[p] = true

		return true
	})
	t.Logf("killed %d times", len(all))
	steps := map[string]bool{}
	for _, p := range all {
		steps[p.step] = true
	}
	for _, name := range backups.Backup.Names() {
		if !steps["backup/"+name] {
			t.Errorf("nothing was killed in step backup/%s", name)
		}
	}
	for _, list := range []string{"populate/", "rebind/", "swap/", "finish/"} {
		if !slices.ContainsFunc(slices.Collect(maps.Keys(steps)), func(s string) bool { return strings.HasPrefix(s, list) }) {
			t.Errorf("nothing was killed in a step of %s", list)
		}
	}
	if os.Getenv("VARVE_E2E_LONG") == "" {
		return
	}
	for i, p := range all {
		killed := false
		run(i+1, func(now point) bool {
			if killed || now != p {
				return false
			}
			killed = true

			return true
		})
	}
}
