package backups

import (
	"testing"
	"time"

	batchv1 "k8s.io/api/batch/v1"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"github.com/varve-io/varve/api/v1alpha1"
	"github.com/varve-io/varve/populator/mover"
	"github.com/varve-io/varve/populator/store"
)

// After a loss the dump is repeated: of bytes without an error, of the process that forwards them,
// of a mover. A point that a mover made before the process ended counts.
func TestDumpAgain(t *testing.T) {
	t.Parallel()
	lost := mover.Result{Reason: v1alpha1.ReasonMoverFailed, Message: "the stream was cut at 4", Again: true}
	for name, lose := range map[string]func(d *dumpTest, job *batchv1.Job){
		"bytes": func(d *dumpTest, job *batchv1.Job) {
			d.p.short = true
			d.runs(job)
			if got := d.reads(); got != "cut" {
				d.t.Errorf("the mover read %q", got)
			}
			d.ends(job, lost)
			d.p.short = false
		},
		"the process": func(d *dumpTest, job *batchv1.Job) {
			d.p.wait = make(chan struct{})
			d.runs(job)
			for d.look("run").Status.Dumps[0].State != v1alpha1.DumpRunning {
				time.Sleep(time.Millisecond)
			}
			d.process("second")
			if got := <-d.p.read; got != "cut" {
				d.t.Errorf("the mover read %q", got)
			}
			for range 3 {
				if s := d.look("run").Status.Dumps[0]; s.Holder != "first" || s.Attempts != 1 {
					d.t.Errorf("another process makes it its own: %+v", s)
				}
			}
			d.ends(job, lost)
			close(d.p.wait)
			d.p.wait = nil
		},
		"the mover": func(d *dumpTest, job *batchv1.Job) {
			d.runs(job)
			if got := d.reads(); got != "rows" {
				d.t.Errorf("the mover read %q", got)
			}
			d.ends(job, mover.Result{Reason: v1alpha1.ReasonRepositoryUnreachable, Message: "no answer", Again: true})
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			d := newDump(t, &dumpPods{prints: "rows"}, hooked(dumpHook(v1alpha1.HookFail)), readyPod("a", "data"))
			lose(d, d.mover(1))
			job := d.mover(2)
			d.runs(job)
			if got := d.reads(); got != "rows" {
				t.Errorf("the second mover read %q", got)
			}
			d.process("third")
			d.ends(job, mover.Result{OK: true, Point: aPoint})
			if s := d.at("Cut").Status.Dumps[0]; s.State != v1alpha1.DumpSucceeded || s.Attempts != 2 || s.Message != "" {
				t.Errorf("%+v", s)
			}
		})
	}
}

// A mover that has written the point, but was lost with its result: the next one finds the point and reads no
// stream, so the command does not run again.
func TestDumpWhoseResultWasLost(t *testing.T) {
	t.Parallel()
	d := newDump(t, &dumpPods{prints: "rows"}, hooked(dumpHook(v1alpha1.HookFail)), readyPod("a", "data"))
	job := d.mover(1)
	d.runs(job)
	if got := d.reads(); got != "rows" {
		t.Errorf("the mover read %q", got)
	}
	d.process("second")
	d.pod(job, corev1.PodStatus{Phase: corev1.PodFailed, Reason: "NodeLost"})
	d.p.deaf = true
	job = d.mover(2)
	d.runs(job)
	if got := d.reads(); got != "nothing" {
		t.Errorf("the second mover read %q", got)
	}
	d.look("run")
	d.ends(job, mover.Result{OK: true, Point: aPoint})
	if s := d.at("Cut").Status.Dumps[0]; s.State != v1alpha1.DumpSucceeded || s.Attempts != 2 || s.Point == nil || s.Point.ID != aPoint.ID || s.ExitCode == nil || *s.ExitCode != 0 || s.Bytes != 4 {
		t.Errorf("%+v", s)
	}
}

// Between the movers of dumps, and after the last, a run may have no object in Varve's namespace by which
// the copy of a tenant's credentials would be found: then there is none.
func TestDumpLeavesNoSecret(t *testing.T) {
	t.Parallel()
	vb := hooked(dumpHook(v1alpha1.HookFail))
	vb.Spec.StoreRef.Kind = v1alpha1.StoreKindRepository
	st := &v1alpha1.Repository{ObjectMeta: metav1.ObjectMeta{Namespace: "shop", Name: "main"}, Status: v1alpha1.RepositoryStatus{UniqueID: "1"},
		Spec: v1alpha1.RepositorySpec{CredentialsSecretRef: corev1.LocalObjectReference{Name: "theirs"}}}
	theirs := &corev1.Secret{ObjectMeta: metav1.ObjectMeta{Namespace: "shop", Name: "theirs"}, Data: map[string][]byte{store.KeyPassword: []byte("secret")}}
	d := newDump(t, &dumpPods{prints: "rows"}, vb, readyPod("a", "data"), st, theirs)
	secret := client.ObjectKey{Namespace: "varve", Name: secretName("run")}
	for i, res := range []mover.Result{
		{Reason: v1alpha1.ReasonMoverFailed, Message: "no answer", Again: true},
		{OK: true, Point: aPoint},
	} {
		job := d.mover(i + 1)
		if err := d.c.Get(t.Context(), secret, &corev1.Secret{}); err != nil {
			t.Fatal(err)
		}
		d.runs(job)
		d.reads()
		d.ends(job, res)
		for end := time.Now().Add(5 * time.Minute); d.c.Get(t.Context(), client.ObjectKeyFromObject(job), &batchv1.Job{}) == nil; d.look("run") {
			if d.now = d.now.Add(time.Minute); time.Now().After(end) {
				t.Fatal("its mover is left")
			}
		}
		if err := d.c.Get(t.Context(), secret, &corev1.Secret{}); !apierrors.IsNotFound(err) {
			t.Errorf("after attempt %d: %v", i+1, err)
		}
	}
}
