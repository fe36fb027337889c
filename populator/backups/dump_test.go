package backups

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"strings"
	"sync"
	"testing"
	"time"

	batchv1 "k8s.io/api/batch/v1"
	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/controller-runtime/pkg/client/interceptor"

	"github.com/varve-io/varve/api/v1alpha1"
	"github.com/varve-io/varve/populator/hold"
	"github.com/varve-io/varve/populator/mover"
	"github.com/varve-io/varve/populator/report"
	"github.com/varve-io/varve/populator/store"
	"github.com/varve-io/varve/populator/stream"
)

// dumpPods are an application that prints, and a mover that reads, as package stream has them.
type dumpPods struct {
	prints string
	code   int
	short  bool          // it reports more bytes than it printed
	wait   chan struct{} // the command ends after it; nil for at once
	forbid bool
	deaf   bool        // the mover has no socket
	read   chan string // the mover's input, and how it ended

	mu  sync.Mutex
	got map[string]string // the same, by the mover's pod
}

func (p *dumpPods) Stream(ctx context.Context, t hold.Target, _ []string, stdin io.Reader, stdout, stderr io.Writer) error {
	if t.Namespace == "varve" && p.deaf {
		p.read <- "nothing"
		return errors.New("no socket")
	}
	if t.Namespace == "varve" {
		if _, err := io.WriteString(stdout, "varve stream 1\n"); err != nil {
			return err
		}
		text, err := io.ReadAll(stream.NewReader(stdin))
		if err != nil {
			text = []byte("cut")
		}
		p.mu.Lock()
		p.got[t.Pod] = string(text)
		p.mu.Unlock()
		p.read <- string(text)
		return nil
	}
	if p.forbid {
		return fmt.Errorf("%w: no", hold.ErrForbidden)
	}
	nonce := ""
	for in := bufio.NewScanner(stdin); in.Scan(); {
		if n, ok := strings.CutPrefix(in.Text(), "nonce="); ok {
			nonce = strings.Trim(n, "'")
		}
		if in.Text() == "# varve: end of the program" {
			break
		}
	}
	go func() { _, _ = io.Copy(io.Discard, stdin) }()
	if _, err := io.WriteString(stdout, p.prints); err != nil {
		return err
	}
	if p.wait != nil {
		select {
		case <-p.wait:
		case <-ctx.Done():
			return ctx.Err()
		}
	}
	n := len(p.prints)
	if p.short {
		n++
	}
	_, err := fmt.Fprintf(stderr, "what it says\n%s ended %d 0 %d none\n", nonce, p.code, n)
	return err
}

// dumpTest is a run with a dump in a cluster.
type dumpTest struct {
	*line
	p      *dumpPods
	events *told
	kill   func() // ends the process
}

func newDump(t *testing.T, p *dumpPods, vb *v1alpha1.VolumeBackup, objects ...client.Object) *dumpTest {
	t.Helper()
	p.read, p.got = make(chan string, 10), map[string]string{}
	d := &dumpTest{line: newLine(t, append(objects, vb,
		&corev1.Secret{ObjectMeta: metav1.ObjectMeta{Namespace: "varve", Name: "main"}, Data: map[string][]byte{store.KeyPassword: []byte("secret")}})...), p: p, events: &told{}}
	d.b.Events = report.NewEvents(d.events)
	var bs v1alpha1.BackupStore
	if err := d.c.Get(t.Context(), client.ObjectKey{Name: "main"}, &bs); err != nil {
		t.Fatal(err)
	}
	bs.Spec.CredentialsSecretRef = corev1.LocalObjectReference{Name: "main"}
	if err := d.c.Update(t.Context(), &bs); err != nil {
		t.Fatal(err)
	}
	d.process("first")
	return d
}

// process is another incarnation of the controller; the previous one is killed.
func (d *dumpTest) process(name string) {
	if d.kill != nil {
		d.kill()
	}
	ctx, cancel := context.WithCancel(context.Background())
	streams, ended := &stream.Streams{Exec: d.p}, make(chan struct{})
	go func() { _ = streams.Start(ctx); close(ended) }()
	d.kill = func() { cancel(); <-ended }
	d.t.Cleanup(d.kill)
	d.b.Streams, d.b.Process = streams, name
}

// mover is the Job of an attempt, once there is one.
func (d *dumpTest) mover(attempt int) *batchv1.Job {
	d.t.Helper()
	for end := time.Now().Add(5 * time.Minute); ; time.Sleep(2 * time.Millisecond) {
		var job batchv1.Job
		vb := d.look("run")
		if d.c.Get(d.t.Context(), client.ObjectKey{Namespace: "varve", Name: dumpJobName("run", 0, int32(attempt))}, &job) == nil {
			return &job
		}
		d.now = d.now.Add(time.Minute) // the time until the next attempt
		if time.Now().After(end) || vb.Status.CompletionTime != nil {
			d.t.Fatalf("there is no mover: it is at %q, %+v, %v", vb.Status.Step, vb.Status.Dumps, vb.Status.Conditions)
		}
	}
}

// pod returns a mover's current pod.
func (d *dumpTest) pod(job *batchv1.Job, status corev1.PodStatus) {
	d.t.Helper()
	pod := &corev1.Pod{ObjectMeta: metav1.ObjectMeta{Namespace: "varve", Name: job.Name, Labels: map[string]string{batchv1.JobNameLabel: job.Name}}, Status: status}
	if err := errors.Join(client.IgnoreNotFound(d.c.Delete(d.t.Context(), pod)), d.c.Create(d.t.Context(), pod)); err != nil {
		d.t.Fatal(err)
	}
}

func (d *dumpTest) runs(job *batchv1.Job) {
	d.t.Helper()
	d.pod(job, corev1.PodStatus{Phase: corev1.PodRunning})
}

func (d *dumpTest) ends(job *batchv1.Job, r mover.Result) {
	d.t.Helper()
	d.pod(job, corev1.PodStatus{Phase: corev1.PodSucceeded, ContainerStatuses: []corev1.ContainerStatus{{
		State: corev1.ContainerState{Terminated: &corev1.ContainerStateTerminated{Message: string(r.Encode())}}}}})
}

// reads reconciles the run until its mover has read a stream.
func (d *dumpTest) reads() string {
	d.t.Helper()
	for end := time.Now().Add(5 * time.Minute); ; time.Sleep(2 * time.Millisecond) {
		vb := d.look("run")
		select {
		case text := <-d.p.read:
			return text
		default:
		}
		if time.Now().After(end) {
			d.t.Fatalf("no stream came: it is at %q, %+v, %v", vb.Status.Step, vb.Status.Dumps, vb.Status.Conditions)
		}
	}
}

// at reconciles the run until it is at a step, or in a phase.
func (d *dumpTest) at(want string) *v1alpha1.VolumeBackup {
	d.t.Helper()
	for end := time.Now().Add(5 * time.Minute); ; time.Sleep(2 * time.Millisecond) {
		vb := d.look("run")
		if vb.Status.Step == want || string(vb.Status.Phase) == want {
			return vb
		}
		if time.Now().After(end) {
			d.t.Fatalf("it is at %q, not %s: %+v, %v", vb.Status.Step, want, vb.Status.Dumps, vb.Status.Conditions)
		}
	}
}

func dumpHook(onError v1alpha1.HookOnError) v1alpha1.Hook {
	return v1alpha1.Hook{Name: "sql", Dump: &v1alpha1.HookDump{Command: "pg_dump"}, OnError: onError}
}

func readyPod(name, claim string) *corev1.Pod {
	p := appPod(name, nil, claim)
	p.Status.Conditions = []corev1.PodCondition{{Type: corev1.PodReady, Status: corev1.ConditionTrue}}
	return p
}

var aPoint = &v1alpha1.PointSummary{ID: strings.Repeat("a", 32), SizeBytes: 4, Kind: "full"}

// The output of the command goes to a mover, whose point is in the status; the snapshot comes
// afterwards.
func TestDumpIsStored(t *testing.T) {
	t.Parallel()
	d := newDump(t, &dumpPods{prints: "rows"}, hooked(dumpHook(v1alpha1.HookFail)), readyPod("a", "data"), appPod("starting", nil, "data"), readyPod("b", "other"))
	job := d.mover(1)
	task, err := mover.ReadTask(func(name string) (string, bool) {
		for _, e := range job.Spec.Template.Spec.Containers[0].Env {
			if e.Name == name {
				return e.Value, true
			}
		}
		return "", false
	})
	if err != nil || task.Dump == nil || task.Dump.Volume.String() != "shop/data.sql" || task.Dump.Claim.NamespaceUID != "namespace" || task.Dump.Run != "run" || task.Dump.Group != nil {
		t.Fatalf("the task is %+v, %v", task.Dump, err)
	}
	d.runs(job)
	if got := d.reads(); got != "rows" {
		t.Errorf("the mover read %q", got)
	}
	vb := d.look("run")
	if s := vb.Status.Dumps[0]; s.State != v1alpha1.DumpRunning || s.Pod != "a" || s.Holder != "first" || s.Container != "app" || vb.Status.Phase != v1alpha1.BackupReading {
		t.Errorf("%s, %+v", vb.Status.Phase, s)
	}
	d.ends(job, mover.Result{OK: true, Point: aPoint})
	vb = d.at("Cut")
	if s := vb.Status.Dumps[0]; s.State != v1alpha1.DumpSucceeded || s.Point == nil || s.Point.ID != aPoint.ID || s.Bytes != 4 || s.ExitCode == nil || *s.ExitCode != 0 || s.Volume != "data.sql" {
		t.Errorf("%+v", s)
	}
	if vb.Status.Hold != nil || condition(vb) != "none" {
		t.Errorf("a dump is no hold: %+v, %s", vb.Status.Hold, condition(vb))
	}
}

// A failed dump ends the run before it takes a snapshot; or the run continues without it, and
// says so.
func TestDumpFails(t *testing.T) {
	t.Parallel()
	for _, tc := range []struct {
		name, reason, says string
		prints             string
		code               int
		forbid             bool
		pods               []client.Object
		noMover            bool
	}{
		{name: "the command", reason: v1alpha1.ReasonHookFailed, says: "status 1; it printed: what it says", prints: "half", code: 1, pods: []client.Object{readyPod("a", "data")}},
		{name: "nothing is printed", reason: v1alpha1.ReasonHookFailed, says: "printed nothing", pods: []client.Object{readyPod("a", "data")}},
		{name: "no right", reason: v1alpha1.ReasonHookForbidden, says: "create rolebinding varve-hooks", forbid: true, pods: []client.Object{readyPod("a", "data")}},
		{name: "no pod", reason: v1alpha1.ReasonNoPod, says: "no ready pod mounts claim data", pods: []client.Object{appPod("a", nil, "data")}, noMover: true},
		{name: "two pods", reason: v1alpha1.ReasonInvalidSpec, says: "these are ready: a, b", pods: []client.Object{readyPod("a", "data"), readyPod("b", "data")}, noMover: true},
	} {
		for _, onError := range []v1alpha1.HookOnError{v1alpha1.HookFail, v1alpha1.HookContinue} {
			t.Run(tc.name+", "+string(onError), func(t *testing.T) {
				t.Parallel()
				d := newDump(t, &dumpPods{prints: tc.prints, code: tc.code, forbid: tc.forbid}, hooked(dumpHook(onError)), tc.pods...)
				if !tc.noMover {
					d.runs(d.mover(1))
					if got := d.reads(); got != "cut" {
						t.Errorf("the mover read %q", got)
					}
				}
				var said string
				if onError == v1alpha1.HookContinue {
					d.at("Cut")
					said = strings.Join(d.events.all, "\n")
					if !strings.Contains(said, tc.reason+": the run continues without the dump of hook sql") {
						t.Errorf("the events say %q", said)
					}
				} else {
					vb := d.at(string(v1alpha1.BackupFailed))
					c := meta.FindStatusCondition(vb.Status.Conditions, v1alpha1.ConditionFailed)
					if c == nil || c.Reason != tc.reason {
						t.Errorf("it failed for %+v", c)
					} else {
						said = c.Message
					}
				}
				if !strings.Contains(said, tc.says) {
					t.Errorf("it does not say %q: %s", tc.says, said)
				}
				vb := d.look("run")
				if s := vb.Status.Dumps[0]; s.State != v1alpha1.DumpFailed || s.Point != nil || !strings.Contains(s.Message, tc.says) {
					t.Errorf("%+v", s)
				}
			})
		}
	}
}

// The process is killed before and after each write of the step: in the end there is one point, by a
// mover that read all.
func TestDumpKilledAtEachWrite(t *testing.T) {
	t.Parallel()
	died := errors.New("the process was killed here")
	for _, after := range []bool{false, true} {
		for n, more := 0, true; more; n++ {
			d := newDump(t, &dumpPods{prints: "rows"}, hooked(dumpHook(v1alpha1.HookFail)), readyPod("a", "data"))
			writes := 0
			write := func(do func() error) error {
				writes++
				if writes != n+1 {
					return do()
				}
				if after {
					if err := do(); err != nil {
						t.Error(err)
					}
				}
				return died
			}
			d.b.Client = interceptor.NewClient(d.c, interceptor.Funcs{
				Create: func(ctx context.Context, c client.WithWatch, o client.Object, opts ...client.CreateOption) error {
					return write(func() error { return c.Create(ctx, o, opts...) })
				},
				Delete: func(ctx context.Context, c client.WithWatch, o client.Object, opts ...client.DeleteOption) error {
					return write(func() error { return c.Delete(ctx, o, opts...) })
				},
				SubResourceUpdate: func(ctx context.Context, c client.Client, sub string, o client.Object, opts ...client.SubResourceUpdateOption) error {
					return write(func() error { return c.SubResource(sub).Update(ctx, o, opts...) })
				},
			})
			killed := false
			var vb *v1alpha1.VolumeBackup
			for end := time.Now().Add(5 * time.Minute); ; time.Sleep(time.Millisecond) {
				if vb = d.look("run"); writes > n && !killed {
					killed = true
					d.process("second")
				}
				if vb.Status.Step == "Cut" {
					break
				}
				if time.Now().After(end) || vb.Status.CompletionTime != nil {
					t.Fatalf("write %d, after it %v: it is at %q: %+v, %v", n, after, vb.Status.Step, vb.Status.Dumps, vb.Status.Conditions)
				}
				d.movers()
				d.now = d.now.Add(10 * time.Second)
			}
			s := vb.Status.Dumps[0]
			d.p.mu.Lock()
			read := d.p.got[dumpJobName("run", 0, s.Attempts)]
			d.p.mu.Unlock()
			if s.State != v1alpha1.DumpSucceeded || s.Point == nil || read != "rows" || s.Point.ID != fmt.Sprintf("%032d", s.Attempts) {
				t.Errorf("write %d, after it %v: %+v, of a mover that read %q", n, after, s, read)
			}
			if more = killed; !more && n < 5 {
				t.Errorf("there were %d writes only", n)
			}
		}
	}
}

// movers are the nodes and what runs there: a Job gets a pod, and its pod ends by what it read.
func (d *dumpTest) movers() {
	d.t.Helper()
	var jobs batchv1.JobList
	if err := d.c.List(d.t.Context(), &jobs, client.InNamespace("varve")); err != nil {
		d.t.Fatal(err)
	}
	for i := range jobs.Items {
		job := &jobs.Items[i]
		var attempt int
		if _, err := fmt.Sscanf(job.Name, "varve-run-d0-%d", &attempt); err != nil {
			continue
		}
		d.p.mu.Lock()
		text, ended := d.p.got[job.Name]
		d.p.mu.Unlock()
		var pod corev1.Pod
		switch err := d.c.Get(d.t.Context(), client.ObjectKeyFromObject(job), &pod); {
		case err != nil:
			d.runs(job)
		case pod.Status.Phase != corev1.PodRunning:
		case ended && text == "rows":
			d.ends(job, mover.Result{OK: true, Point: &v1alpha1.PointSummary{ID: fmt.Sprintf("%032d", attempt), SizeBytes: 4, Kind: "full"}})
		case ended, d.b.Process == "second" && d.b.Streams.Get(stream.Key{Run: "run", Name: job.Name}) == nil && d.look("run").Status.Dumps[0].Holder == "first":
			// No stream comes: it waits for a while, and gives up.
			d.ends(job, mover.Result{Reason: v1alpha1.ReasonMoverFailed, Message: "the stream was cut", Again: true})
		}
	}
}

// It is not retried forever.
func TestDumpIsGivenUp(t *testing.T) {
	t.Parallel()
	d := newDump(t, &dumpPods{prints: "rows"}, hooked(dumpHook(v1alpha1.HookFail)), readyPod("a", "data"))
	for i := range mover.MaxAttempts {
		job := d.mover(i + 1)
		d.runs(job)
		d.reads()
		d.ends(job, mover.Result{Reason: v1alpha1.ReasonMoverFailed, Message: "no answer", Again: true})
	}
	vb := d.at(string(v1alpha1.BackupFailed))
	if c := meta.FindStatusCondition(vb.Status.Conditions, v1alpha1.ConditionFailed); c == nil || !strings.Contains(c.Message, fmt.Sprintf("attempt %d of %d: no answer", mover.MaxAttempts, mover.MaxAttempts)) {
		t.Errorf("it failed for %+v", c)
	}
}

// A dump is a member of its group in the record of every point; the first run makes it.
func TestDumpOfGroup(t *testing.T) {
	t.Parallel()
	g := &v1alpha1.RunGroup{Name: "shop", ID: strings.Repeat("1", 32), Time: metav1.Now(), Members: []v1alpha1.GroupMember{{ClaimName: "data", Run: "run"}, {ClaimName: "more", Run: "other"}}}
	vb := hooked(dumpHook(v1alpha1.HookFail), aHook("app", nil))
	vb.Spec.Group = g
	other := vb.DeepCopy()
	other.Name, other.UID, other.Spec.ClaimName = "other", "other", "more"
	d := newDump(t, &dumpPods{prints: "rows"}, vb, other, readyPod("a", "data"))
	job := d.mover(1)
	var st store.Store
	r := &run{Reconciler: d.b, vb: other}
	if got := r.group(&st); fmt.Sprint(got.Members) != "[shop/data shop/more shop/shop.sql]" {
		t.Errorf("the members are %v", got.Members)
	}
	if got := (&run{Reconciler: d.b, vb: other}).leads(); got {
		t.Error("both lead")
	}
	if types.UID(job.Labels[mover.LabelRun]) != "run" {
		t.Errorf("the mover is of %v", job.Labels)
	}
}
