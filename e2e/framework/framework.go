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

// Patience is how long a test waits for any one thing. It is long because the machine
// may be busy; a test that passes hardly waits.
const Patience = 3 * time.Minute

// pollPause is between two looks at something awaited.
const pollPause = 100 * time.Millisecond

// F is what one test has of the cluster.
type F struct {
	T         *testing.T
	Cluster   *cluster.Cluster
	Config    *rest.Config // the administrator's
	Client    client.WithWatch
	Clientset kubernetes.Interface
	Namespace string // the test's own
}

// New gives a test its namespace. What it made is deleted when it ends; if it failed,
// evidence is collected before.
func New(t *testing.T) *F {
	t.Helper()
	if why := os.Getenv(envWhyNot); why != "" {
		t.Skip(why)
	}
	c, err := cluster.Open(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	cfg, err := clientcmd.BuildConfigFromFlags("", c.Kubeconfig())
	if err != nil {
		t.Fatal(err)
	}
	cfg.QPS, cfg.Burst = 200, 400
	if err := addKinds(); err != nil {
		t.Fatal(err)
	}
	cl, err := client.NewWithWatch(cfg, client.Options{Scheme: scheme.Scheme})
	if err != nil {
		t.Fatal(err)
	}
	cs, err := kubernetes.NewForConfig(cfg)
	if err != nil {
		t.Fatal(err)
	}
	f := &F{T: t, Cluster: c, Config: cfg, Client: cl, Clientset: cs, Namespace: namespaceFor(t)}
	f.Create(&corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: f.Namespace, Labels: map[string]string{
		"pod-security.kubernetes.io/enforce": "privileged"}}})
	t.Cleanup(func() {
		if t.Failed() {
			f.collect()
		}
		f.clear()
	})
	// Pods are refused until the namespace's account is there.
	f.Eventually("the namespace's service account", func(ctx context.Context) error {
		return f.Client.Get(ctx, f.Key("default"), &corev1.ServiceAccount{})
	})
	return f
}

// addKinds makes snapshots known to client-go's scheme, once: tests run in parallel.
var addKinds = sync.OnceValue(func() error {
	return errors.Join(snapshotv1.AddToScheme(scheme.Scheme), groupsnapshotv1.AddToScheme(scheme.Scheme))
})

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

// Delete deletes an object and waits until it is gone.
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

// Eventually asks until the answer is nil, and ends the test after Patience with the
// last answer.
func (f *F) Eventually(what string, ask func(context.Context) error) {
	f.T.Helper()
	if err := f.Await(f.T.Context(), what, ask); err != nil {
		f.T.Fatal(err)
	}
}

// Await is Eventually for those who handle the error themselves.
func (f *F) Await(ctx context.Context, what string, ask func(context.Context) error) error {
	ctx, cancel := context.WithTimeout(ctx, Patience)
	defer cancel()
	var last error // that is not about the time being over
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
		case <-time.After(pollPause):
		}
	}
}

// clear deletes what the test made, in an order in which drivers can let go, and
// fails the test if volumes stay.
func (f *F) clear() {
	ctx, cancel := context.WithTimeout(context.Background(), Patience)
	defer cancel()
	var errs []error
	for _, kinds := range []string{
		"deployments,statefulsets,daemonsets,jobs,cronjobs",
		"pods",
		// A pending claim holds the snapshot it comes from, and a snapshot being taken
		// its claim: they go together.
		"persistentvolumeclaims,volumesnapshots.snapshot.storage.k8s.io,volumegroupsnapshots.groupsnapshot.storage.k8s.io",
	} {
		_, err := f.Cluster.Kubectl(ctx, nil, "delete", kinds, "--all", "-n", f.Namespace, "--ignore-not-found", "--grace-period=1", "--wait=false")
		errs = append(errs, err, f.Await(ctx, kinds+" to be gone", func(ctx context.Context) error {
			left, err := f.Cluster.Kubectl(ctx, nil, "get", kinds, "-n", f.Namespace, "-o", "name")
			if err == nil && left != "" {
				err = fmt.Errorf("left: %s", strings.Join(strings.Fields(left), ", "))
			}
			return err
		}))
	}
	errs = append(errs, f.Await(ctx, "the namespace's volumes to be gone", func(ctx context.Context) error {
		var pvs corev1.PersistentVolumeList
		if err := f.Client.List(ctx, &pvs); err != nil {
			return err
		}
		for _, pv := range pvs.Items {
			if r := pv.Spec.ClaimRef; r != nil && r.Namespace == f.Namespace && pv.Spec.PersistentVolumeReclaimPolicy == corev1.PersistentVolumeReclaimDelete {
				return fmt.Errorf("volume %s of claim %s is still there", pv.Name, r.Name)
			}
		}
		var contents snapshotv1.VolumeSnapshotContentList
		if err := f.Client.List(ctx, &contents); err != nil {
			return err
		}
		for _, c := range contents.Items {
			if c.Spec.VolumeSnapshotRef.Namespace == f.Namespace && c.Spec.DeletionPolicy == snapshotv1.VolumeSnapshotContentDelete {
				return fmt.Errorf("content %s of snapshot %s is still there", c.Name, c.Spec.VolumeSnapshotRef.Name)
			}
		}
		return nil
	}))
	_, err := f.Cluster.Kubectl(ctx, nil, "delete", "namespace", f.Namespace, "--ignore-not-found", "--wait=false")
	if err := errors.Join(append(errs, err)...); err != nil {
		f.T.Errorf("clear namespace %s: %v", f.Namespace, err)
	}
}
