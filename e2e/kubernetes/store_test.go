package kubernetes

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	batchv1 "k8s.io/api/batch/v1"
	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"github.com/varve-io/varve/api/v1alpha1"
	"github.com/varve-io/varve/e2e/cluster"
	"github.com/varve-io/varve/e2e/framework"
)

// A tenant's own Repository: its Secret is read once an administrator has run the command
// in the condition, and movers' copies of it are deleted.
func TestTenantRepository(t *testing.T) {
	t.Parallel()
	s := newSite(t)
	bucket := s.bucket("own-" + s.Namespace[len(s.Namespace)-6:])
	s.Create(&corev1.Secret{ObjectMeta: metav1.ObjectMeta{Namespace: s.Namespace, Name: "keys"},
		StringData: map[string]string{"password": password, "accessKeyID": cluster.S3AccessKey, "secretAccessKey": cluster.S3SecretKey}})
	own := &v1alpha1.Repository{ObjectMeta: metav1.ObjectMeta{Namespace: s.Namespace, Name: "own"}, Spec: v1alpha1.RepositorySpec{
		Storage: v1alpha1.Storage{S3: &bucket}, CredentialsSecretRef: corev1.LocalObjectReference{Name: "keys"}, ClusterName: "e2e"}}
	s.Create(own)
	var said string
	s.Eventually("the command that lets the Secret be read", func(ctx context.Context) error {
		if err := s.Client.Get(ctx, s.Key("own"), own); err != nil {
			return err
		}
		c := meta.FindStatusCondition(own.Status.Conditions, v1alpha1.ConditionReady)
		if c == nil || c.Reason != v1alpha1.ReasonCredentialsMissing {
			return errors.New(says(own.Status.Conditions))
		}
		if said = regexp.MustCompile(`kubectl create rolebinding [^;"]+`).FindString(c.Message); said == "" {
			t.Fatalf("no command in %q", c.Message)
		}
		return nil
	})
	t.Log(said)
	if _, err := s.Cluster.Kubectl(t.Context(), nil, strings.Fields(said)[1:]...); err != nil {
		t.Fatal(err)
	}
	s.Eventually("the Repository", func(ctx context.Context) error {
		if err := s.Client.Get(ctx, s.Key("own"), own); err != nil {
			return err
		}
		return ready(own.Status.Conditions, v1alpha1.ConditionReady)
	})
	ref := v1alpha1.StoreReference{Kind: v1alpha1.StoreKindRepository, Name: "own"}
	s.CreateClaim(framework.Claim{Name: "data", Mode: framework.Block, Size: "64Mi"})
	s.blockPod("writer", "data")
	s.Exec("writer", fill)
	sum := s.SHA256("writer", "/dev/data")
	run := s.backup("first", "data", func(vb *v1alpha1.VolumeBackup) { vb.Spec.StoreRef = ref })
	s.source("latest", func(rs *v1alpha1.RecoverySource) { rs.Spec.StoreRef, rs.Spec.From.Volume = ref, "data" })
	pvc := s.restoreClaim(restored{Claim: framework.Claim{Name: "back", Mode: framework.Block, Size: "64Mi"}, Source: "latest"})
	s.WaitBound("back")
	s.blockPod("reader", "back")
	if got := s.SHA256("reader", "/dev/back"); got != sum {
		t.Error("what came back is not what was backed up")
	}
	s.Eventually("nothing of the runs to be left", func(ctx context.Context) error {
		return errors.Join(s.copies(ctx, string(run.UID)), s.copies(ctx, string(pvc.UID)))
	})
}

// copies returns nil if Varve's namespace has no Secret and no Job of a run.
func (s *site) copies(ctx context.Context, uid string) error {
	var left []string
	for _, list := range []client.ObjectList{&corev1.SecretList{}, &batchv1.JobList{}} {
		names, err := s.names(ctx, list, func(o client.Object) bool {
			labels := fmt.Sprint(o.GetLabels())
			return o.GetNamespace() == varveNamespace && (strings.Contains(o.GetName(), uid) || strings.Contains(labels, uid))
		})
		if err != nil {
			return err
		}
		left = append(left, names...)
	}
	if len(left) > 0 {
		return fmt.Errorf("left: %s", strings.Join(left, ", "))
	}
	return nil
}

// installWith installs the chart with other values, until the test ends.
func (s *site) installWith(values string) {
	s.T.Helper()
	dir := s.T.TempDir()
	file, out := filepath.Join(dir, "values.yaml"), filepath.Join(dir, "varve.yaml")
	if err := os.WriteFile(file, []byte(values), 0o600); err != nil {
		s.T.Fatal(err)
	}
	chart, err := filepath.Abs(filepath.Join("..", "..", "deploy", "helm", "varve"))
	if err != nil {
		s.T.Fatal(err)
	}
	cmd := exec.CommandContext(s.T.Context(), "go", "run", "./cmd/render", "-chart", chart, "-values", file, "-o", out)
	cmd.Dir = filepath.Join("..", "chart")
	if said, err := cmd.CombinedOutput(); err != nil {
		s.T.Fatalf("%v\n%s", err, said)
	}
	apply := func(ctx context.Context, manifest string) error {
		_, err := s.Cluster.Kubectl(ctx, nil, "apply", "--server-side", "--force-conflicts", "-f", manifest)
		if err != nil {
			return err
		}
		_, err = s.Cluster.Kubectl(ctx, nil, "rollout", "status", "-n", varveNamespace, "deployment/"+controllerName, "--timeout="+framework.Patience.String())
		return err
	}
	s.atEnd(func() {
		if err := apply(context.Background(), manifests); err != nil {
			s.T.Error(err)
		}
	})
	if err := apply(s.T.Context(), out); err != nil {
		s.T.Fatal(err)
	}
}

// A repository on a claim of Varve's, which the installation names, and its maintenance.
func TestStoreOnClaim(t *testing.T) {
	s := newSite(t) // alone: the controller is installed otherwise
	shelf := s.Namespace
	claim := &corev1.PersistentVolumeClaim{ObjectMeta: metav1.ObjectMeta{Namespace: varveNamespace, Name: shelf}, Spec: corev1.PersistentVolumeClaimSpec{
		AccessModes: []corev1.PersistentVolumeAccessMode{corev1.ReadWriteOnce},
		Resources:   corev1.VolumeResourceRequirements{Requests: corev1.ResourceList{corev1.ResourceStorage: quantity("1Gi")}}}}
	s.Create(claim)
	s.atEnd(func() { // after the installation is what it was
		if err := s.Client.Delete(context.Background(), claim); err != nil {
			t.Error(err)
		}
	})
	// The claim belongs to one node; an NFS export would be for all.
	node := fmt.Sprintf("{kubernetes.io/hostname: %s}", s.Cluster.Control().Name)
	s.installWith("storeVolumes: [" + shelf + "]\nmover: {nodeSelector: " + node + "}\n" +
		"controller: {nodeSelector: " + node + ", extraArgs: [--maintain-every=5s]}\n")
	bs := &v1alpha1.BackupStore{ObjectMeta: metav1.ObjectMeta{Name: shelf}, Spec: v1alpha1.BackupStoreSpec{RepositorySpec: v1alpha1.RepositorySpec{
		Storage:              v1alpha1.Storage{Volume: &v1alpha1.VolumeStorage{ClaimName: shelf, Path: "cluster-a"}},
		CredentialsSecretRef: corev1.LocalObjectReference{Name: "store-" + shelf}, ClusterName: "e2e"}}}
	secret := &corev1.Secret{ObjectMeta: metav1.ObjectMeta{Namespace: varveNamespace, Name: "store-" + shelf}, StringData: map[string]string{"password": password}}
	s.Create(secret)
	s.Create(bs)
	s.atEnd(func() {
		for _, o := range []client.Object{bs, secret} {
			if err := client.IgnoreNotFound(s.Client.Delete(context.Background(), o)); err != nil {
				t.Error(err)
			}
		}
	})
	s.Eventually("the store", func(ctx context.Context) error {
		if err := s.Client.Get(ctx, client.ObjectKeyFromObject(bs), bs); err != nil {
			return err
		}
		return ready(bs.Status.Conditions, v1alpha1.ConditionReady)
	})
	to := func(vb *v1alpha1.VolumeBackup) { vb.Spec.StoreRef.Name = shelf }
	s.CreateClaim(framework.Claim{Name: "data", Mode: framework.Block, Size: "64Mi"})
	s.blockPod("writer", "data")
	s.Exec("writer", fill)
	s.backup("first", "data", to)
	s.Exec("writer", "dd if=/dev/urandom of=/dev/data bs=4096 count=3 seek=3000 conv=notrunc 2>/dev/null; sync")
	sum := s.SHA256("writer", "/dev/data")
	if p := s.backup("second", "data", to).Status.Point; p.Source != "csi-delta" {
		t.Errorf("the second point is by %s because of %v", p.Source, p.Fallbacks)
	}
	s.source("latest", func(rs *v1alpha1.RecoverySource) { rs.Spec.StoreRef.Name, rs.Spec.From.Volume = shelf, "data" })
	s.restoreClaim(restored{Claim: framework.Claim{Name: "back", Mode: framework.Block, Size: "64Mi"}, Source: "latest"})
	s.WaitBound("back")
	s.blockPod("reader", "back")
	if got := s.SHA256("reader", "/dev/back"); got != sum {
		t.Error("what came back is not what was backed up")
	}
	s.Eventually("maintenance", func(ctx context.Context) error {
		if err := s.Client.Get(ctx, client.ObjectKeyFromObject(bs), bs); err != nil {
			return err
		}
		// A failure sets an earlier time, so that the next attempt comes sooner.
		if m := bs.Status.LastMaintenance; m == nil || m.Before(&bs.CreationTimestamp) {
			return fmt.Errorf("the last was at %v; %s", m, s.storeEvents(ctx, shelf))
		}
		return nil
	})
	// A deleted store's maintenance does not stay.
	uid := string(bs.UID)
	s.Delete(bs)
	s.Eventually("maintenance of the deleted store to be gone", func(ctx context.Context) error { return s.copies(ctx, uid) })
}

// storeEvents returns the events about a store, which has no namespace.
func (s *site) storeEvents(ctx context.Context, name string) string {
	out, err := s.Cluster.Kubectl(ctx, nil, "get", "events", "-A", "--field-selector", "involvedObject.name="+name, "-o", `jsonpath={range .items[*]}{.reason}: {.message}{"\n"}{end}`)
	if err != nil {
		return err.Error()
	}
	return out
}
