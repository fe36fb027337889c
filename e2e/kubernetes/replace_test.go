package kubernetes

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	ctrl "sigs.k8s.io/controller-runtime"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"github.com/varve-io/varve/api/v1alpha1"
	"github.com/varve-io/varve/e2e/csidriver"
	"github.com/varve-io/varve/e2e/framework"
	"github.com/varve-io/varve/populator/replace"
	"github.com/varve-io/varve/populator/step"
)

// swapper replaces the volume of one claim repeatedly, by the library itself and in the
// test's namespace, which the installed controller ignores.
type swapper struct {
	*site
	claim string
	next  string                        // the PersistentVolume that is put under the claim next
	prime *corev1.PersistentVolumeClaim // to which that is bound at first
	n     int
}

// newSwapper makes a claim and a second volume, each with a file that identifies it.
func newSwapper(s *site, claim, class string) *swapper {
	s.T.Helper()
	w := &swapper{site: s, claim: claim}
	other := claim + "-other"
	s.CreateClaim(framework.Claim{Name: claim, Class: class, Mode: framework.Filesystem, Size: "32Mi"})
	w.prime = s.CreateClaim(framework.Claim{Name: other, Class: class, Mode: framework.Filesystem, Size: "32Mi"})
	s.RunPod(framework.Pod{Name: claim, Claims: map[string]corev1.PersistentVolumeMode{claim: framework.Filesystem, other: framework.Filesystem}})
	w.next = s.WaitBound(other).Name
	s.Exec(claim, fmt.Sprintf("echo %s > /%s/id; echo %s > /%s/id; sync", s.WaitBound(claim).Spec.CSI.VolumeHandle, claim, s.WaitBound(other).Spec.CSI.VolumeHandle, other))
	s.deletePod(claim)
	return w
}

// begin makes the VolumeReplacement of the next round.
func (w *swapper) begin(ctx context.Context) (*v1alpha1.VolumeReplacement, error) {
	var pvc corev1.PersistentVolumeClaim
	var old, source corev1.PersistentVolume
	if err := w.Client.Get(ctx, w.Key(w.claim), &pvc); err != nil {
		return nil, err
	}
	if err := errors.Join(w.Client.Get(ctx, client.ObjectKey{Name: pvc.Spec.VolumeName}, &old), w.Client.Get(ctx, client.ObjectKey{Name: w.next}, &source)); err != nil {
		return nil, err
	}
	m, err := replace.Member(&pvc, &old, replace.Manifest(&source, old.Name), corev1.PersistentVolumeReclaimDelete, source.Name)
	if err != nil {
		return nil, err
	}
	w.n++
	m.Keep = fmt.Sprintf("%s-%s-kept-%d", w.Namespace, w.claim, w.n)
	if w.prime != nil {
		m.SourceClaim = &v1alpha1.ClaimReference{Namespace: w.Namespace, Name: w.prime.Name, UID: w.prime.UID}
	}
	r := &v1alpha1.VolumeReplacement{ObjectMeta: metav1.ObjectMeta{Namespace: w.Namespace, Name: fmt.Sprintf("%s-%d", w.claim, w.n)},
		Spec: v1alpha1.VolumeReplacementSpec{Volumes: []v1alpha1.ReplacedVolume{m}, KeepFor: &metav1.Duration{Duration: time.Hour}}}
	w.next, w.prime = m.Keep, nil
	return r, w.Client.Create(ctx, r)
}

// events of the library go to the test's log.
type logged struct{ t *testing.T }

func (l logged) Normal(o client.Object, reason, format string, args ...any) {
	l.t.Logf("%s: %s: %s", o.GetName(), reason, fmt.Sprintf(format, args...))
}

func (l logged) Warning(o client.Object, reason, format string, args ...any) {
	l.Normal(o, reason, format, args...)
}

// reconciler is one incarnation of the library; hook is called for its writes.
func (w *swapper) reconciler(hook step.Hook) *replace.Reconciler {
	c := step.Observe(w.Client, hook)
	return &replace.Reconciler{Client: c, Live: c, Namespace: w.Namespace, Events: logged{w.T}, Now: time.Now, Sleep: func(ctx context.Context, d time.Duration) bool {
		select {
		case <-ctx.Done():
			return false
		case <-time.After(d):
			return true
		}
	}}
}

// carry runs a replacement to its end; after an error of the hook another incarnation continues.
func (w *swapper) carry(ctx context.Context, name string, hook step.Hook) error {
	ctx, cancel := context.WithTimeout(ctx, framework.Patience)
	defer cancel()
	r := w.reconciler(hook)
	for {
		res, err := r.Reconcile(ctx, ctrl.Request{NamespacedName: w.Key(name)})
		if errors.Is(err, errKilled) {
			r = w.reconciler(hook)

			continue
		}
		if err != nil && ctx.Err() == nil {
			w.T.Logf("%s: %v", name, err)
			res.RequeueAfter = 200 * time.Millisecond
		}
		var o v1alpha1.VolumeReplacement
		if err := w.Client.Get(ctx, w.Key(name), &o); err != nil {
			return fmt.Errorf("replacement %s: %w", name, err)
		}
		if replace.Ended(&o) && len(o.Finalizers) == 0 {
			if o.Status.Step != replace.StepDone {
				return fmt.Errorf("replacement %s ended at %s: %s", name, o.Status.Step, says(o.Status.Conditions))
			}
			return nil
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("replacement %s is at %s: %s", name, o.Status.Step, says(o.Status.Conditions))
		case <-time.After(res.RequeueAfter):
		}
	}
}

// end deletes what is kept, also in the storage.
func (w *swapper) end() {
	pv := &corev1.PersistentVolume{ObjectMeta: metav1.ObjectMeta{Name: w.next}}
	patch := client.RawPatch("application/merge-patch+json", []byte(`{"spec":{"persistentVolumeReclaimPolicy":"Delete"}}`))
	if err := client.IgnoreNotFound(w.Client.Patch(context.Background(), pv, patch)); err != nil {
		w.T.Error(err)
	}
}

// races is how many pods race a replacement.
func races(t *testing.T) int {
	t.Helper()
	text := os.Getenv("VARVE_E2E_RACES")
	if text == "" {
		return 20
	}
	n, err := strconv.Atoi(text)
	if err != nil || n < 1 {
		t.Fatalf("VARVE_E2E_RACES is %q, not a number", text)
	}
	return n
}

// A pod is created within 300 ms before to 100 ms after the moment at which a claim's
// PersistentVolume is deleted to be replaced. It runs on the volume that its claim names, ends
// when it is deleted, and the claim has its new volume in the end.
func TestReplaceRaced(t *testing.T) {
	t.Parallel()
	s := newSite(t)
	// With attachments the deleted object stays until the pod has ended; without, only the
	// check after Lost finds the pod.
	classes := []string{s.Driver(csidriver.Options{AttachRequired: true, DetachDelay: detach}).Class(), s.Driver(csidriver.Options{}).Class()}
	const lanes = 4
	total := races(t)
	var wait sync.WaitGroup
	var mu sync.Mutex
	putBack, seen := 0, map[string]int{}
	for lane := range lanes {
		w := newSwapper(s, fmt.Sprintf("data-%d", lane), classes[lane%2])
		s.atEnd(w.end)
		wait.Go(func() {
			for i := lane; i < total; i += lanes {
				// Spread over the range, and within each part of it at random.
				offset := -300*time.Millisecond + time.Duration((float64(i)+rand.Float64())*float64(400*time.Millisecond)/float64(total))
				back, which, err := w.race(t.Context(), offset)
				mu.Lock()
				if back {
					putBack++
				}
				seen[which]++
				mu.Unlock()
				if err != nil {
					t.Errorf("pod at %v: %v", offset, err)
					return
				}
			}
		})
	}
	wait.Wait()
	t.Logf("%d pods; the old volume was put back %d times; they ran on %v", total, putBack, seen)
}

// race replaces the claim's volume while a pod is created at an offset from the deletion.
func (w *swapper) race(ctx context.Context, offset time.Duration) (putBack bool, which string, err error) {
	r, err := w.begin(ctx)
	if err != nil {
		return false, "", err
	}
	ctx, cancel := context.WithTimeout(ctx, framework.Patience)
	defer cancel()
	old := r.Spec.Volumes[0].Old
	pod := fmt.Sprintf("%s-%d", w.claim, w.n)
	var once sync.Once
	created := make(chan error, 1)
	create := func() {
		created <- w.Client.Create(ctx, w.racer(pod))
	}
	hook := func(ctx context.Context, wr step.Write) error {
		if wr.Kind == "PersistentVolume" && wr.Step == "putback/BackCreate" && wr.After {
			putBack = true
		}
		if wr.Step != "replace/Delete" || wr.Verb != "delete" || wr.After != (offset >= 0) {
			return nil
		}
		once.Do(func() {
			if offset < 0 {
				create()
				time.Sleep(-offset)
				return
			}
			go func() {
				time.Sleep(offset)
				create()
			}()
		})
		return nil
	}
	done := make(chan error, 1)
	go func() { done <- w.carry(ctx, r.Name, hook) }()
	if err := <-created; err != nil {
		return putBack, "", fmt.Errorf("create the pod: %w", err)
	}
	if which, err = w.runs(ctx, pod, old); err != nil {
		return putBack, which, err
	}
	if err := w.Client.Delete(ctx, &corev1.Pod{ObjectMeta: metav1.ObjectMeta{Namespace: w.Namespace, Name: pod}}); err != nil {
		return putBack, which, err
	}
	if err := w.Await(ctx, "pod "+pod+" to end", func(ctx context.Context) error {
		err := w.Client.Get(ctx, w.Key(pod), &corev1.Pod{})
		if err == nil {
			return w.NotYet(pod, "it is stuck")
		}
		return client.IgnoreNotFound(err)
	}); err != nil {
		return putBack, which, err
	}
	return putBack, which, <-done
}

// runs waits until a pod runs and checks that it has the volume that its claim names. While the claim is Lost there is no
// volume of the name, and the pod may be seen to run just then: it must have the one that is there next.
func (w *swapper) runs(ctx context.Context, pod, old string) (which string, err error) {
	err = w.Await(ctx, "pod "+pod, func(ctx context.Context) error {
		var p corev1.Pod
		if err := w.Client.Get(ctx, w.Key(pod), &p); err != nil {
			return err
		}
		if p.Status.Phase != corev1.PodRunning {
			return w.NotYet(pod, "it is %s", p.Status.Phase)
		}
		return nil
	})
	if err != nil {
		return "", err
	}
	id, err := w.TryExec(ctx, pod, nil, "cat /data/id")
	if err != nil {
		return "", err
	}
	var pv corev1.PersistentVolume
	err = w.Await(ctx, "the volume of claim "+w.claim, func(ctx context.Context) error {
		var pvc corev1.PersistentVolumeClaim
		if err := w.Client.Get(ctx, w.Key(w.claim), &pvc); err != nil {
			return err
		}
		return w.Client.Get(ctx, client.ObjectKey{Name: pvc.Spec.VolumeName}, &pv)
	})
	if err != nil {
		return "", err
	}
	which = "the new volume"
	if strings.Contains(old, `"volumeHandle":"`+strings.TrimSpace(id)+`"`) {
		which = "the old volume"
	}
	if strings.TrimSpace(id) != pv.Spec.CSI.VolumeHandle {
		return which, fmt.Errorf("the pod runs on %s (%s), and its claim names %s", strings.TrimSpace(id), which, pv.Spec.CSI.VolumeHandle)
	}
	return which, nil
}

// racer is a pod that reads which volume it has.
func (w *swapper) racer(name string) *corev1.Pod {
	return w.PodOf(framework.Pod{Name: name, Claims: map[string]corev1.PersistentVolumeMode{w.claim: framework.Filesystem}, Change: func(p *corev1.Pod) {
		p.Spec.Containers[0].VolumeMounts[0].MountPath = "/data"
	}})
}

// The library is killed before and after each write of a replacement: another incarnation
// completes it, and a pod has the new volume then.
func TestReplaceKilled(t *testing.T) {
	t.Parallel()
	s := newSite(t)
	w := newSwapper(s, "data", s.Driver(csidriver.Options{AttachRequired: true, DetachDelay: detach}).Class())
	s.atEnd(w.end)
	killed := map[point]bool{}
	for _, once := range []bool{true, false} { // at all in turn, then not at all: back
		r, err := w.begin(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		var deleted, bound time.Time
		hook := func(_ context.Context, wr step.Write) error {
			p := point{wr.Step, wr.Verb, wr.Kind, wr.After}
			if wr.Step == "replace/Delete" && wr.Verb == "delete" {
				deleted = time.Now()
			}
			if wr.Step == "replace/Release" && bound.IsZero() {
				bound = time.Now()
			}
			if !once || killed[p] {
				return nil
			}
			killed[p] = true
			return errKilled
		}
		if err := w.carry(t.Context(), r.Name, hook); err != nil {
			t.Fatal(err)
		}
		t.Logf("the claim was without a volume for %v", bound.Sub(deleted).Round(time.Millisecond))
		s.Create(w.racer("reader"))
		s.WaitReady("reader")
		which, err := w.runs(t.Context(), "reader", r.Spec.Volumes[0].Old)
		if err != nil || which != "the new volume" {
			t.Errorf("the pod has %s (%v)", which, err)
		}
		s.deletePod("reader")
	}
	steps := map[string]bool{}
	for p := range killed {
		steps[p.step] = true
	}
	for _, name := range replace.Lists()[0].Names() {
		if !steps["replace/"+name] {
			t.Errorf("nothing was killed in step %s", name)
		}
	}
	t.Logf("killed %d times", len(killed))
}

// If Varve ends permanently while the claim is Lost, the manifest that it left and the documented
// commands give the claim its new volume; if it comes back it finds that done.
func TestReplaceByHand(t *testing.T) {
	t.Parallel()
	s := newSite(t)
	w := newSwapper(s, "data", s.Driver(csidriver.Options{AttachRequired: true, DetachDelay: detach}).Class())
	s.atEnd(w.end)
	r, err := w.begin(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	gone := w.reconciler(func(_ context.Context, wr step.Write) error {
		if wr.Step == "replace/Look" {
			return errKilled
		}
		return nil
	})
	s.Eventually("the end of the library", func(ctx context.Context) error {
		_, err := gone.Reconcile(ctx, ctrl.Request{NamespacedName: s.Key(r.Name)})
		if !errors.Is(err, errKilled) {
			return fmt.Errorf("it is not at its end: %w", err)
		}
		return nil
	})
	var pvc corev1.PersistentVolumeClaim
	if err := s.Client.Get(t.Context(), s.Key("data"), &pvc); err != nil || pvc.Status.Phase != corev1.ClaimLost {
		t.Fatalf("the claim is %s (%v)", pvc.Status.Phase, err)
	}
	manifest, err := s.Cluster.Kubectl(t.Context(), nil, "get", "volumereplacement", "-n", s.Namespace, r.Name, "-o", "jsonpath={.spec.volumes[0].new}")
	if err != nil {
		t.Fatal(err)
	}
	if _, err := s.Cluster.Kubectl(t.Context(), strings.NewReader(manifest), "create", "-f", "-"); err != nil {
		t.Fatal(err)
	}
	if _, err := s.Cluster.Kubectl(t.Context(), nil, "annotate", "pvc", "-n", s.Namespace, "data", "varve.io/replaced=by-hand", "--overwrite"); err != nil {
		t.Fatal(err)
	}
	look := func() {
		t.Helper()
		s.Create(w.racer("reader"))
		s.WaitReady("reader")
		if which, err := w.runs(t.Context(), "reader", r.Spec.Volumes[0].Old); err != nil || which != "the new volume" {
			t.Errorf("the pod has %s (%v)", which, err)
		}
	}
	look()
	// A pod uses the new volume by now: the next incarnation must not consider it too early.
	if err := w.carry(t.Context(), r.Name, nil); err != nil {
		t.Fatal(err)
	}
	s.deletePod("reader")
	look()
	s.deletePod("reader")
}
