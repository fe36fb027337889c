package feeds

import (
	"bufio"
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	batchv1 "k8s.io/api/batch/v1"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/client-go/kubernetes/scheme"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/controller-runtime/pkg/client/fake"
	"sigs.k8s.io/controller-runtime/pkg/reconcile"

	"github.com/varve-io/varve/api/v1alpha1"
	"github.com/varve-io/varve/populator/claims"
	"github.com/varve-io/varve/populator/hold"
	"github.com/varve-io/varve/populator/metrics"
	"github.com/varve-io/varve/populator/mover"
	"github.com/varve-io/varve/populator/queue"
	"github.com/varve-io/varve/populator/store"
	"github.com/varve-io/varve/populator/store/storetest"
	"github.com/varve-io/varve/populator/stream"
)

const text = "create table shop;\n"

// pods are an application that reads, and a mover that has a stream, as package stream has them.
type pods struct {
	commands int           // that were started
	hold     chan struct{} // the command does not end before; nil for at once
	code     int
	forbid   bool
	lost     bool          // the mover's stream ends before its end
	gone     chan struct{} // the pod goes away then; nil for never
	halfway  bool          // and the mover has sent a piece by then; else the command has all of its input
	left     chan struct{} // the mover's exec has ended; nil if no test asks
}

// piece is what is sent at once of a longer stream.
const piece = 1 << 20

// errGone is what an exec says whose pod was killed.
var errGone = errors.New("command terminated with exit code 137")

func (p *pods) Stream(ctx context.Context, t hold.Target, _ []string, stdin io.Reader, stdout, stderr io.Writer) error {
	if t.Namespace == "varve" {
		if p.left != nil {
			defer close(p.left)
		}
		if p.lost {
			return nil
		}
		_, _ = io.WriteString(stdout, "varve stream 1\n")
		w := stream.NewWriter(stdout)
		if p.halfway {
			_, err := w.Write(make([]byte, piece))
			<-ctx.Done()
			return errors.Join(err, ctx.Err())
		}
		_, err1 := io.WriteString(w, text)
		return errors.Join(err1, w.End())
	}
	if p.forbid {
		return fmt.Errorf("%w: no", hold.ErrForbidden)
	}
	p.commands++
	in := bufio.NewReader(stdin)
	nonce := ""
	for {
		line, err := in.ReadString('\n')
		if err != nil {
			return err
		}
		if n, ok := strings.CutPrefix(line, "nonce="); ok {
			nonce = strings.Trim(strings.TrimSpace(n), "'")
		}
		switch word, arg, _ := strings.Cut(strings.TrimSpace(line), " "); word {
		case "d":
			n, err := strconv.ParseInt(arg, 10, 64)
			if err == nil {
				_, err = io.CopyN(io.Discard, in, n)
			}
			if err != nil {
				return err
			}
			fmt.Fprintf(stdout, "%s took %d\n", nonce, n)
			if p.halfway {
				<-p.gone
				return errGone
			}
		case "e":
			if p.gone != nil {
				<-p.gone
				return errGone
			}
			if p.hold != nil {
				select {
				case <-p.hold:
				case <-ctx.Done():
					return ctx.Err()
				}
			}
			_, _ = io.WriteString(stderr, "what it prints")
			_, err := fmt.Fprintf(stdout, "%s ended %d %d 0 none\n", nonce, p.code, len(text))
			return err
		}
	}
}

// found are the points of a store.
type found struct {
	claims.Points
	disk  bool
	bytes int64 // of the text if zero
	err   error
}

func (f found) Find(context.Context, claims.Query) (claims.Found, error) {
	return claims.Found{ID: "3f1c9a7be2d04c51", Time: time.Unix(1e9, 0), Bytes: cmp.Or(f.bytes, int64(len(text))), Stream: !f.disk}, f.err
}

func (found) Restores(context.Context, v1alpha1.StoreReference, string) (int, error) { return 1, nil }

type quiet struct{ warned []string }

func (*quiet) Normal(client.Object, string, string, ...any) {}
func (q *quiet) Warning(_ client.Object, reason, format string, args ...any) {
	q.warned = append(q.warned, reason+": "+fmt.Sprintf(format, args...))
}

// world is a cluster with one DumpRestore.
type world struct {
	t *testing.T
	c client.Client
	r *Reconciler
	p *pods

	leases storetest.Leases
}

func newWorld(t *testing.T, p *pods, f found, objects ...client.Object) *world {
	t.Helper()
	s := runtime.NewScheme()
	if err := errors.Join(scheme.AddToScheme(s), v1alpha1.AddToScheme(s)); err != nil {
		t.Fatal(err)
	}
	app := &corev1.Pod{ObjectMeta: metav1.ObjectMeta{Namespace: "shop", Name: "db-0", UID: "db-0", Labels: map[string]string{"app": "db"}},
		Spec:   corev1.PodSpec{Containers: []corev1.Container{{Name: "db"}}},
		Status: corev1.PodStatus{Conditions: []corev1.PodCondition{{Type: corev1.PodReady, Status: corev1.ConditionTrue}}}}
	dr := &v1alpha1.DumpRestore{ObjectMeta: metav1.ObjectMeta{Namespace: "shop", Name: "run", UID: "run"}, Spec: v1alpha1.DumpRestoreSpec{
		StoreRef: v1alpha1.StoreReference{Name: "main"}, From: v1alpha1.RecoveryFrom{Volume: "data.sql"},
		Into: v1alpha1.DumpRestoreInto{Command: "psql", PodSelector: metav1.LabelSelector{MatchLabels: map[string]string{"app": "db"}}}}}
	bs := &v1alpha1.BackupStore{ObjectMeta: metav1.ObjectMeta{Name: "main"}, Spec: v1alpha1.BackupStoreSpec{RepositorySpec: v1alpha1.RepositorySpec{
		ClusterName: "e2e", Storage: v1alpha1.Storage{S3: &v1alpha1.S3Storage{Bucket: "b"}}, CredentialsSecretRef: corev1.LocalObjectReference{Name: "main"}}}}
	secret := &corev1.Secret{ObjectMeta: metav1.ObjectMeta{Namespace: "varve", Name: "main"}, Data: map[string][]byte{store.KeyPassword: []byte("secret")}}
	ns := &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: "shop"}}
	c := fake.NewClientBuilder().WithScheme(s).WithObjects(append(objects, app, dr, bs, secret, ns)...).
		WithStatusSubresource(&v1alpha1.DumpRestore{}, &corev1.Pod{}, &batchv1.Job{}).Build()
	count, err := metrics.New(prometheus.NewRegistry())
	if err != nil {
		t.Fatal(err)
	}
	w := &world{t: t, c: c, p: p}
	w.r = &Reconciler{
		Client: c, Live: c, Points: f, Leases: &w.leases, Stores: &store.Stores{Client: c, Secrets: c, Namespace: "varve", Connections: store.NewConnections()},
		Pods: mover.Pods{Namespace: "varve", Image: "varve"}, Queue: queue.New(1, nil), Events: &quiet{}, Metrics: count, Now: time.Now,
		Wake: func(*v1alpha1.DumpRestore) {},
	}
	w.process("first")
	return w
}

// process is another life of the controller.
func (w *world) process(name string) {
	w.r.Process, w.r.Streams = name, &stream.Streams{Exec: w.p}
}

func (w *world) look() *v1alpha1.DumpRestore {
	w.t.Helper()
	key := client.ObjectKey{Namespace: "shop", Name: "run"}
	_, _ = w.r.Reconcile(w.t.Context(), reconcile.Request{NamespacedName: key})
	var dr v1alpha1.DumpRestore
	if err := w.c.Get(w.t.Context(), key, &dr); err != nil {
		if apierrors.IsNotFound(err) {
			return nil
		}
		w.t.Fatal(err)
	}
	return &dr
}

// until looks until it is as is says; movers run as soon as there is one.
func (w *world) until(what string, is func(*v1alpha1.DumpRestore) bool) *v1alpha1.DumpRestore {
	w.t.Helper()
	for end := time.Now().Add(5 * time.Minute); ; time.Sleep(2 * time.Millisecond) {
		dr := w.look()
		if is(dr) {
			return dr
		}
		// Until the mover gives its stream, it may have no lease of its own.
		if one := w.r.Streams.Get(stream.Key{Run: "run", Name: streamName}); one != nil && dr.Status.Phase == v1alpha1.DumpRestoreRunning && dr.Status.CompletionTime == nil {
			if st := one.State(); !st.Begun && !st.Ended && len(w.leases.Held("run")) == 0 {
				w.t.Fatal("nothing keeps the recovery point of a mover that has not begun")
			}
		}
		var jobs batchv1.JobList
		if err := w.c.List(w.t.Context(), &jobs); err != nil {
			w.t.Fatal(err)
		}
		for _, j := range jobs.Items {
			pod := &corev1.Pod{ObjectMeta: metav1.ObjectMeta{Namespace: "varve", Name: j.Name, Labels: map[string]string{batchv1.JobNameLabel: j.Name}},
				Spec: corev1.PodSpec{NodeName: "node"}, Status: corev1.PodStatus{Phase: corev1.PodRunning}}
			if err := w.c.Create(w.t.Context(), pod); err != nil && !apierrors.IsAlreadyExists(err) {
				w.t.Fatal(err)
			}
		}
		if time.Now().After(end) {
			w.t.Fatalf("waited for %s: %+v", what, dr)
		}
	}
}

func ended(dr *v1alpha1.DumpRestore) bool {
	return dr == nil || dr.Status.CompletionTime != nil && len(dr.Finalizers) == 0
}

func failure(dr *v1alpha1.DumpRestore) string {
	c := meta.FindStatusCondition(dr.Status.Conditions, v1alpha1.ConditionFailed)
	if c == nil {
		return "nothing"
	}
	return c.Reason + ": " + c.Message
}

// left are the objects of movers.
func (w *world) left() int {
	w.t.Helper()
	var jobs batchv1.JobList
	if err := w.c.List(w.t.Context(), &jobs); err != nil {
		w.t.Fatal(err)
	}
	return len(jobs.Items)
}

// The command is fed once, and what it came to is in the status.
func TestDumpRestore(t *testing.T) {
	other := func(name string) *corev1.Pod {
		return &corev1.Pod{ObjectMeta: metav1.ObjectMeta{Namespace: "shop", Name: name, Labels: map[string]string{"app": "db"}},
			Spec:   corev1.PodSpec{Containers: []corev1.Container{{Name: "db"}}},
			Status: corev1.PodStatus{Conditions: []corev1.PodCondition{{Type: corev1.PodReady, Status: corev1.ConditionTrue}}}}
	}
	for name, tc := range map[string]struct {
		p        pods
		f        found
		objects  []client.Object
		failure  string // empty if it succeeds
		commands int
	}{
		"whole":          {commands: 1},
		"a status":       {p: pods{code: 3}, failure: "FeedFailed: pod db-0: the command failed with status 3", commands: 1},
		"forbidden":      {p: pods{forbid: true}, failure: "HookForbidden: the controller may not exec in pods of namespace shop"},
		"a disk":         {f: found{disk: true}, failure: "InvalidSpec: volume data.sql holds disks"},
		"no point":       {f: found{err: &claims.RefusedError{Reason: v1alpha1.ReasonNoRecoveryPoint, Message: "none"}}, failure: "NoRecoveryPoint: none"},
		"two pods":       {objects: []client.Object{other("db-1")}, failure: "InvalidSpec: one pod is fed, and these are ready: db-0, db-1"},
		"the mover ends": {p: pods{lost: true}, failure: "MoverFailed: attempt 5 of 5"},
	} {
		t.Run(name, func(t *testing.T) {
			w := newWorld(t, &tc.p, tc.f, tc.objects...)
			dr := w.until("its end", ended)
			w.look()
			if w.p.commands != tc.commands || w.left() != 0 || w.leases.Objects() != 0 {
				t.Errorf("%d commands ran; %d movers and %d leases are left", w.p.commands, w.left(), w.leases.Objects())
			}
			if tc.failure != "" {
				if got := failure(dr); dr.Status.Phase != v1alpha1.DumpRestoreFailed || !strings.HasPrefix(got, tc.failure) {
					t.Errorf("%s, %s", dr.Status.Phase, got)
				}
				return
			}
			if s := dr.Status; s.Phase != v1alpha1.DumpRestoreSucceeded || s.Bytes != int64(len(text)) || s.ExitCode == nil || *s.ExitCode != 0 || s.Pod != "db-0" || !meta.IsStatusConditionTrue(s.Conditions, v1alpha1.ConditionComplete) {
				t.Errorf("%+v", s)
			}
		})
	}
}

// A command that may have been started is not started again: not by another process, whenever the first was
// killed.
func TestDumpRestoreIsNotRepeated(t *testing.T) {
	w := newWorld(t, &pods{hold: make(chan struct{})}, found{})
	w.until("the command", func(dr *v1alpha1.DumpRestore) bool { return dr.Status.Bytes == int64(len(text)) })
	w.process("second")
	dr := w.until("its end", ended)
	if got := failure(dr); !strings.HasPrefix(got, "FeedLost: the controller was restarted") || w.p.commands != 1 || w.left() != 0 {
		t.Errorf("%s; %d commands", got, w.p.commands)
	}
	close(w.p.hold)
}

// The point of one that waits for its turn is kept. If it was deleted before, that is said at once.
func TestQueuedDumpRestoreKeepsItsPoint(t *testing.T) {
	w := newWorld(t, &pods{}, found{})
	w.r.Queue.Start(queue.Ticket{ID: "other"})
	dr := w.until("its turn", func(dr *v1alpha1.DumpRestore) bool { return dr.Status.Phase == v1alpha1.DumpRestoreStarting })
	for range 3 {
		w.look()
	}
	if held := w.leases.Held("run"); !slices.Equal(held, []string{dr.Status.PointID}) || w.left() > 0 {
		t.Errorf("kept: %v", held)
	}
	w.r.Queue.Done("other")
	if dr := w.until("its end", ended); dr.Status.Phase != v1alpha1.DumpRestoreSucceeded {
		t.Errorf("%+v", dr.Status)
	}

	w = newWorld(t, &pods{}, found{})
	w.r.Queue.Start(queue.Ticket{ID: "other"})
	w.leases.Delete(dr.Status.PointID)
	if got := failure(w.until("its end", ended)); !strings.HasPrefix(got, v1alpha1.ReasonNoRecoveryPoint+": ") {
		t.Error(got)
	}
}

// Deleting it ends the stream, and leaves nothing.
func TestDumpRestoreIsDeleted(t *testing.T) {
	w := newWorld(t, &pods{hold: make(chan struct{})}, found{})
	dr := w.until("the command", func(dr *v1alpha1.DumpRestore) bool { return dr.Status.Bytes == int64(len(text)) })
	one := w.r.Streams.Get(stream.Key{Run: "run", Name: streamName})
	if err := w.c.Delete(t.Context(), dr); err != nil {
		t.Fatal(err)
	}
	w.until("its end", ended)
	close(w.p.hold)
	for !one.State().Ended {
		time.Sleep(time.Millisecond)
	}
	if w.left() != 0 || !w.r.Queue.Start(queue.Ticket{ID: "other"}) {
		t.Error("its mover, or its place, is left")
	}
}
