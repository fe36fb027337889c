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
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/rest"

	"github.com/varve-io/varve/api/v1alpha1"
	"github.com/varve-io/varve/e2e/csidriver"
	"github.com/varve-io/varve/e2e/framework"
	"github.com/varve-io/varve/populator"
	"github.com/varve-io/varve/populator/backups"
	"github.com/varve-io/varve/populator/claims"
	"github.com/varve-io/varve/populator/mover"
	"github.com/varve-io/varve/populator/replace"
	"github.com/varve-io/varve/populator/restores"
	"github.com/varve-io/varve/populator/step"
)

// shippedRights is a client's configuration with a token of the controller's account:
// only what the manifests allow.
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
	killed chan struct{} // closed when it must die
	stop   func() error  // ends the rest of it and waits
}

// live starts a controller that dies at the first write for which dies returns true. From
// then on none of its writes succeeds.
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

// alike is an inventory in which names that differ only in random parts are the same.
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

// through runs jobs to their ends by one incarnation after another, each of which dies
// where dies says. It returns the points where they died.
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
			// Checks are many requests, and slow a controller down that is killed at its next write.
			select {
			case <-inc.killed:
				again = true
				continue
			case <-ctx.Done():
				return died, errors.Join(last, ctx.Err(), inc.stop())
			case <-time.After(250 * time.Millisecond):
			}
			last = nil
			for _, j := range jobs {
				last = errors.Join(last, j.ended(ctx))
			}
			if last == nil {
				break
			}
		}
		if !again {
			return died, inc.stop()
		}
		_ = inc.stop() // it was killed: any result
	}
}

// The controller is killed before and after each write of each step, of backups, restores
// and their cancellation, and the end is the same as without kills: nothing left over,
// nothing lost.
//
// It is killed at all writes in turn while one backup and two restores run, and then, in
// separate runs, at one write of each of the three: in all such runs and both before and after each write, or in as many as
// VARVE_E2E_KILLS says, and before or after each write, a new share each day.
func TestKilledAtEachWrite(t *testing.T) {
	k := newKiller(t) // alone: the controller is this process
	all := k.worked(everywhere())
	t.Logf("killed %d times", len(all))

	// A driver that no longer accepts Block volumes: the backup fails, and the restore
	// gets no volume and is deleted.
	k.SetDriver(k.driver, csidriver.Options{AttachRequired: true, NoBlock: true})
	undone := k.run(everywhere(), func(n int) []job {
		return []job{
			k.backupJob(fmt.Sprintf("run-%d", n), v1alpha1.BackupFailed),
			k.deletedJob(framework.Claim{Name: fmt.Sprintf("block-%d", n), Class: k.class, Mode: framework.Block, Size: "64Mi"}, "block"),
			k.rollBackJob(fmt.Sprintf("roll-%d", n), true),
		}
	}, nil)
	t.Logf("killed %d times while it undid things", len(undone))

	// One that makes devices shorter than it reports: a larger volume is made.
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
	lists := map[string][]string{backups.Unheld.Name: backups.Unheld.Names()}
	lists[backups.Abandon.Name] = append(lists[backups.Abandon.Name], backups.Abandon.Names()...)
	for _, l := range claims.Lists() {
		lists[l.Name] = append(lists[l.Name], l.Names()...)
	}
	lists[replace.Lists()[0].Name] = replace.Lists()[0].Names() // the other needs a pod that comes in between: TestReplaceRaced
	for _, l := range restores.Lists() {
		if l.Name != "restore-delta" { // see the package's own test
			lists[l.Name] = l.Names()
		}
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

// chosen are the points for kills in separate runs: together one of a backup, one of what
// all restores do and one of how they hand over.
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
	day := today()
	var out [][]point
	for i := range n {
		out = append(out, runs[(day*n+i)%len(runs)])
	}
	t.Logf("%d of %d runs of their own follow, as VARVE_E2E_KILLS is %q and the day %d", n, len(runs), share, day)
	return out
}
