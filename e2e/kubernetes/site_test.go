package kubernetes

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"github.com/go-logr/logr"
	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/client-go/kubernetes/scheme"
	"sigs.k8s.io/controller-runtime/pkg/client"
	ctrllog "sigs.k8s.io/controller-runtime/pkg/log"

	"github.com/varve-io/varve/api/v1alpha1"
	"github.com/varve-io/varve/e2e/cluster"
	"github.com/varve-io/varve/e2e/framework"
)

func TestMain(m *testing.M) {
	if err := v1alpha1.AddToScheme(scheme.Scheme); err != nil {
		panic(err)
	}
	// Tests mostly wait for the cluster: run more than there are processors.
	if err := flag.Set("test.parallel", "6"); err != nil {
		panic(err)
	}
	ctrllog.SetLogger(logr.Discard()) // of the controllers that run in this process
	framework.Main(m)
}

const (
	varveNamespace = "varve-system"
	controllerName = "varve-controller"
	// shippedImage is the image that the manifests run; the image under test gets that name.
	shippedImage = "ghcr.io/varve-io/varve:0.1.0"
	mainStore    = "main"
	password     = "layers of sediment"
)

var (
	deploy    = filepath.Join("..", "..", "deploy")
	manifests = filepath.Join(deploy, "varve.yaml")
)

// site is a test's part of a cluster in which Varve is installed.
type site struct {
	*framework.F
	collected *bool
}

// newSite installs Varve if no test did so before.
func newSite(t *testing.T) *site {
	t.Helper()
	s := &site{framework.New(t), new(bool)}
	s.atEnd(func() {})
	install(s)
	return s
}

// atEnd runs something when the test ends. If the test failed, evidence is kept first.
func (s *site) atEnd(do func()) {
	s.T.Helper()
	s.T.Cleanup(func() {
		if s.T.Failed() && !*s.collected {
			*s.collected = true
			s.collectVarve()
		}
		do()
	})
}

var installation sync.Mutex // tests run in parallel
var installed bool

// install applies the manifests as shipped, and makes the store that most tests use.
// Varve stays installed: the cluster ends with the run.
func install(s *site) {
	s.T.Helper()
	image := s.VarveImage()
	installation.Lock()
	defer installation.Unlock()
	if installed {
		return
	}
	ctx := s.T.Context()
	if err := s.Cluster.TagImage(ctx, image, shippedImage); err != nil {
		s.T.Fatal(err)
	}
	text, err := os.ReadFile(manifests)
	if err != nil {
		s.T.Fatal(err)
	}
	if n := strings.Count(string(text), shippedImage); n != 2 {
		s.T.Fatalf("%s names %s %d times, not as image and as what movers run", manifests, shippedImage, n)
	}
	// An earlier run may have left another image under the same name.
	s.Delete(&appsv1.Deployment{ObjectMeta: metav1.ObjectMeta{Namespace: varveNamespace, Name: controllerName}})
	if _, err := s.Cluster.Kubectl(ctx, strings.NewReader(string(text)), "apply", "--server-side", "--force-conflicts", "-f", "-"); err != nil {
		s.T.Fatal(err)
	}
	if _, err := s.Cluster.Kubectl(ctx, nil, "wait", "--for=condition=Established", "--timeout="+framework.Patience.String(), "crd", "--all"); err != nil {
		s.T.Fatal(err)
	}
	if _, err := s.Cluster.Kubectl(ctx, nil, "apply", "--server-side", "--force-conflicts", "-f", admissionPolicy(s)); err != nil {
		s.T.Fatal(err)
	}
	s.waitController()
	s.store(mainStore, s.bucket("varve-"+strings.ToLower(s.Namespace[len(s.Namespace)-6:])), nil)
	installed = true
}

// admissionPolicy returns the file with the policy for the API version that the cluster serves.
func admissionPolicy(s *site) string {
	s.T.Helper()
	kind := schema.GroupKind{Group: "admissionregistration.k8s.io", Kind: "MutatingAdmissionPolicy"}
	served, err := s.Client.RESTMapper().RESTMapping(kind, "v1", "v1beta1")
	if err != nil {
		s.T.Fatal(err)
	}
	return filepath.Join(deploy, "varve-admission-"+served.GroupVersionKind.Version+".yaml")
}

func (s *site) waitController() {
	s.T.Helper()
	s.Eventually("the controller", func(ctx context.Context) error {
		var d appsv1.Deployment
		if err := s.Client.Get(ctx, client.ObjectKey{Namespace: varveNamespace, Name: controllerName}, &d); err != nil {
			return err
		}
		if d.Status.ObservedGeneration < d.Generation || d.Status.ReadyReplicas != *d.Spec.Replicas || d.Status.UpdatedReplicas != *d.Spec.Replicas {
			return fmt.Errorf("%d of %d are ready", d.Status.ReadyReplicas, *d.Spec.Replicas)
		}
		return nil
	})
}

// scaleController sets how many controllers run and waits for that.
func (s *site) scaleController(replicas int32) {
	s.T.Helper()
	d := &appsv1.Deployment{ObjectMeta: metav1.ObjectMeta{Namespace: varveNamespace, Name: controllerName}}
	patch := client.RawPatch("application/merge-patch+json", fmt.Appendf(nil, `{"spec":{"replicas":%d}}`, replicas))
	if err := s.Client.Patch(context.WithoutCancel(s.T.Context()), d, patch); err != nil {
		s.T.Fatal(err)
	}
	err := s.Await(context.WithoutCancel(s.T.Context()), "the controllers", func(ctx context.Context) error {
		pods, err := s.controllers(ctx)
		if err != nil {
			return err
		}
		ready := 0
		for _, p := range pods {
			for _, c := range p.Status.Conditions {
				if c.Type == corev1.PodReady && c.Status == corev1.ConditionTrue {
					ready++
				}
			}
		}
		if len(pods) != int(replicas) || ready != len(pods) {
			return fmt.Errorf("there are %d, %d of them ready, want %d", len(pods), ready, replicas)
		}
		return nil
	})
	if err != nil {
		s.T.Error(err)
	}
}

func (s *site) controllers(ctx context.Context) ([]corev1.Pod, error) {
	var pods corev1.PodList
	err := s.Client.List(ctx, &pods, client.InNamespace(varveNamespace), client.MatchingLabels{"app.kubernetes.io/component": "controller"})
	return pods.Items, err
}

// s3Address is the address of the cluster's S3 server, host:port, for pods and this process.
func (s *site) s3Address() string {
	s.T.Helper()
	ip, err := s.Cluster.Kubectl(s.T.Context(), nil, "get", "service", "s3", "-n", cluster.SystemNamespace, "-o", "jsonpath={.spec.clusterIP}")
	if err != nil {
		s.T.Fatal(err)
	}
	return ip + ":7070"
}

// bucket makes a bucket in the cluster's S3 server.
func (s *site) bucket(name string) v1alpha1.S3Storage {
	s.T.Helper()
	return s.bucketAt(s.s3Address(), name)
}

func (s *site) bucketAt(address, name string) v1alpha1.S3Storage {
	s.T.Helper()
	s.Eventually("bucket "+name, func(ctx context.Context) error {
		_, err := s.Cluster.Exec(ctx, s.Cluster.Control(), cluster.NetworkOnly, nil, "curl", "-sS", "--fail", "--max-time", "5",
			"--aws-sigv4", "aws:amz:us-east-1:s3", "--user", cluster.S3AccessKey+":"+cluster.S3SecretKey,
			"-H", "x-amz-content-sha256: UNSIGNED-PAYLOAD", "-X", "PUT", "http://"+address+"/"+name)
		return err
	})
	return v1alpha1.S3Storage{Bucket: name, Endpoint: address, Region: "us-east-1", DisableTLS: true}
}

// store makes a BackupStore over a bucket, with its Secret, and waits until it is
// ready. Like the installation, it stays.
func (s *site) store(name string, bucket v1alpha1.S3Storage, change func(*v1alpha1.BackupStore)) {
	s.T.Helper()
	s.createStore(name, bucket, change)
	s.Eventually("store "+name, func(ctx context.Context) error {
		var bs v1alpha1.BackupStore
		if err := s.Client.Get(ctx, client.ObjectKey{Name: name}, &bs); err != nil {
			return err
		}
		return ready(bs.Status.Conditions, v1alpha1.ConditionReady)
	})
}

func (s *site) createStore(name string, bucket v1alpha1.S3Storage, change func(*v1alpha1.BackupStore)) {
	s.T.Helper()
	secret := &corev1.Secret{ObjectMeta: metav1.ObjectMeta{Namespace: varveNamespace, Name: "store-" + name},
		StringData: map[string]string{"password": password, "accessKeyID": cluster.S3AccessKey, "secretAccessKey": cluster.S3SecretKey}}
	bs := &v1alpha1.BackupStore{ObjectMeta: metav1.ObjectMeta{Name: name}, Spec: v1alpha1.BackupStoreSpec{RepositorySpec: v1alpha1.RepositorySpec{
		Storage: v1alpha1.Storage{S3: &bucket}, CredentialsSecretRef: corev1.LocalObjectReference{Name: secret.Name}, ClusterName: "e2e"}}}
	if change != nil {
		change(bs)
	}
	s.Delete(&v1alpha1.BackupStore{ObjectMeta: bs.ObjectMeta})
	s.Delete(&corev1.Secret{ObjectMeta: secret.ObjectMeta})
	s.Create(secret)
	s.Create(bs)
}

// ready returns nil if a condition is true, else its message.
func ready(conditions []metav1.Condition, kind string) error {
	c := meta.FindStatusCondition(conditions, kind)
	if c == nil {
		return fmt.Errorf("it has no condition %s", kind)
	}
	if c.Status != metav1.ConditionTrue {
		return fmt.Errorf("%s is %s: %s: %s", kind, c.Status, c.Reason, c.Message)
	}
	return nil
}

// in returns the test's part of another namespace, which is deleted when the test ends.
func (s *site) in(namespace string) *site {
	s.T.Helper()
	ns := &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: namespace}}
	s.Create(ns)
	f := *s.F
	f.Namespace = namespace
	s.atEnd(func() {
		ctx, cancel := context.WithTimeout(context.Background(), framework.Patience)
		defer cancel()
		if err := client.IgnoreNotFound(f.Client.Delete(ctx, ns)); err != nil {
			f.T.Error(err)
		}
		if err := f.Await(ctx, "namespace "+namespace+" to be gone", func(ctx context.Context) error {
			err := f.Client.Get(ctx, client.ObjectKey{Name: namespace}, &corev1.Namespace{})
			if err == nil {
				return errors.New("it is still there")
			}
			return client.IgnoreNotFound(err)
		}); err != nil {
			f.T.Error(err)
		}
	})
	f.Eventually("the namespace's service account", func(ctx context.Context) error {
		return f.Client.Get(ctx, f.Key("default"), &corev1.ServiceAccount{})
	})
	return &site{&f, s.collected}
}

// collectVarve keeps the evidence of Varve's namespace beside the test's own.
func (s *site) collectVarve() {
	root := os.Getenv("VARVE_E2E_ARTIFACTS")
	if root == "" {
		root = "artifacts"
	}
	f := *s.F
	f.Namespace = varveNamespace
	if err := f.Collect(filepath.Join(root, s.Namespace, varveNamespace)); err != nil {
		s.T.Logf("collect evidence of Varve: %v", err)
	}
	ctx := context.Background()
	for _, kind := range []string{"backupstores.varve.io", "volumebackups.varve.io", "recoverysources.varve.io", "volumepopulations.varve.io", "volumerestores.varve.io", "dumprestores.varve.io", "volumereplacements.varve.io"} {
		out, err := s.Cluster.Kubectl(ctx, nil, "get", kind, "-A", "-o", "yaml")
		if err == nil {
			err = os.WriteFile(filepath.Join(root, s.Namespace, varveNamespace, kind+".yaml"), []byte(out), 0o644)
		}
		if err != nil && !apierrors.IsNotFound(err) {
			s.T.Logf("collect evidence of Varve: %v", err)
		}
	}
}
