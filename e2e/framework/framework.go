package framework

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"os"
	"regexp"
	"strings"
	"sync"
	"testing"
	"time"

	groupsnapshotv1 "github.com/kubernetes-csi/external-snapshotter/client/v8/apis/volumegroupsnapshot/v1"
	snapshotv1 "github.com/kubernetes-csi/external-snapshotter/client/v8/apis/volumesnapshot/v1"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/kubernetes/scheme"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/clientcmd"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"github.com/varve-io/varve/e2e/cluster"
)

// Patience is how long a test waits for any one event. It is long because the machine may
// be busy; a passing test hardly waits.
const Patience = 6 * time.Minute

// The pause between two checks of something awaited is a tenth of the time waited, within these.
const shortPause, longPause = 20 * time.Millisecond, 500 * time.Millisecond

// F is one test's part of the cluster.
type F struct {
	T         *testing.T
	Cluster   *cluster.Cluster
	Config    *rest.Config // the administrator's
	Client    client.WithWatch
	Clientset kubernetes.Interface
	Namespace string // the test's own
}

// New creates a test's namespace. What the test made is deleted at its end; if it failed,
// evidence is collected first.
func New(t *testing.T) *F {
	t.Helper()
	if why := os.Getenv(envWhyNot); why != "" {
		t.Skip(why)
	}
	c, err := cluster.Open(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	cl, err := clientsOf(c.Kubeconfig())
	if err != nil {
		t.Fatal(err)
	}
	f := &F{T: t, Cluster: c, Config: rest.CopyConfig(cl.config), Client: cl.client, Clientset: cl.clientset, Namespace: namespaceFor(t)}
	f.Create(&corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: f.Namespace, Labels: map[string]string{
		"pod-security.kubernetes.io/enforce": "privileged"}}})
	t.Cleanup(func() {
		if t.Failed() {
			f.collect()
		}
		f.clear()
	})
	// Pods are refused until the namespace's account exists.
	f.Eventually("the namespace's service account", func(ctx context.Context) error {
		return f.Client.Get(ctx, f.Key("default"), &corev1.ServiceAccount{})
	})
	return f
}

// clients are the administrator's.
type clients struct {
	config    *rest.Config
	client    client.WithWatch
	clientset kubernetes.Interface
}

var made struct {
	sync.Mutex // tests run in parallel
	of         map[string]*clients
}

// clientsOf makes clients once for all tests, so that the kinds are listed once.
func clientsOf(kubeconfig string) (*clients, error) {
	made.Lock()
	defer made.Unlock()
	if c := made.of[kubeconfig]; c != nil {
		return c, nil
	}
	cfg, err := clientcmd.BuildConfigFromFlags("", kubeconfig)
	if err != nil {
		return nil, err
	}
	cfg.QPS, cfg.Burst = 1000, 2000
	if err := errors.Join(snapshotv1.AddToScheme(scheme.Scheme), groupsnapshotv1.AddToScheme(scheme.Scheme)); err != nil {
		return nil, err
	}
	cl, err := client.NewWithWatch(cfg, client.Options{Scheme: scheme.Scheme})
	if err != nil {
		return nil, err
	}
	cs, err := kubernetes.NewForConfig(cfg)
	if err != nil {
		return nil, err
	}
	c := &clients{cfg, cl, cs}
	made.of = map[string]*clients{kubeconfig: c}
	return c, nil
}

var notName = regexp.MustCompile(`[^a-z0-9]+`)

func random() string {
	b := make([]byte, 3)
	_, _ = rand.Read(b) // never fails (crypto/rand)
	return hex.EncodeToString(b)
}

func namespaceFor(t *testing.T) string {
	n := notName.ReplaceAllString(strings.ToLower(strings.TrimPrefix(t.Name(), "Test")), "-")
	return strings.Trim(n[:min(len(n), 40)], "-") + "-" + random()
}

// Key names an object in the test's namespace.
func (f *F) Key(name string) client.ObjectKey {
	return client.ObjectKey{Namespace: f.Namespace, Name: name}
}

// Create creates an object or ends the test.
func (f *F) Create(o client.Object) {
	f.T.Helper()
	if err := f.Client.Create(f.T.Context(), o); err != nil {
		f.T.Fatalf("create %T %s: %v", o, o.GetName(), err)
	}
}

// Delete deletes an object and waits for its end.
func (f *F) Delete(o client.Object) {
	f.T.Helper()
	if err := client.IgnoreNotFound(f.Client.Delete(f.T.Context(), o, client.PropagationPolicy(metav1.DeletePropagationBackground))); err != nil {
		f.T.Fatalf("delete %T %s: %v", o, o.GetName(), err)
	}
	f.Eventually(fmt.Sprintf("%T %s to be gone", o, o.GetName()), func(ctx context.Context) error {
		return gone(f.Client.Get(ctx, client.ObjectKeyFromObject(o), o))
	})
}

func gone(err error) error {
	if err == nil {
		return errors.New("it is still there")
	}
	if apierrors.IsNotFound(err) {
		return nil
	}
	return err
}

// Eventually polls until the result is nil, and ends the test after Patience with the
// last result.
func (f *F) Eventually(what string, ask func(context.Context) error) {
	f.T.Helper()
	if err := f.Await(f.T.Context(), what, ask); err != nil {
		f.T.Fatal(err)
	}
}

// Await is Eventually for callers that handle the error.
func (f *F) Await(ctx context.Context, what string, ask func(context.Context) error) error {
	ctx, cancel := context.WithTimeout(ctx, Patience)
	defer cancel()
	start := time.Now()
	var last error // that is not the timeout itself
	for {
		err := ask(ctx)
		if err == nil {
			return nil
		}
		if deadline, ok := ctx.Deadline(); last == nil || ok && time.Until(deadline) > time.Second {
			last = err
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("wait for %s: %w", what, errors.Join(last, ctx.Err()))
		case <-time.After(min(max(time.Since(start)/10, shortPause), longPause)):
		}
	}
}

// notYet says why something is not as awaited. The newest event is only read when the error is
// printed, which is rare: events are many, and the API server does not cache them.
type notYet struct {
	f    *F
	name string
	said string
}

func (e notYet) Error() string {
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	return e.said + "; " + e.f.LastEvent(ctx, e.name)
}

// NotYet is the error for something that an object's events may explain.
func (f *F) NotYet(name, format string, args ...any) error {
	return notYet{f, name, fmt.Sprintf(format, args...)}
}
