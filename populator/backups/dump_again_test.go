package backups

import (
	"testing"
	"time"

	batchv1 "k8s.io/api/batch/v1"
	corev1 "k8s.io/api/core/v1"

	"github.com/varve-io/varve/api/v1alpha1"
	"github.com/varve-io/varve/populator/mover"
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
