package kubernetes

import (
	"context"
	"regexp"
	"strings"
	"testing"

	corev1 "k8s.io/api/core/v1"
	storagev1 "k8s.io/api/storage/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"github.com/varve-io/varve/api/v1alpha1"
	"github.com/varve-io/varve/e2e/csidriver"
	"github.com/varve-io/varve/e2e/framework"
)

// A storage class whose Secrets are named after the claim: they are read once an
// administrator allows it, and in the end the volume has the user's own.
func TestSecretsOfClaims(t *testing.T) {
	t.Parallel()
	s := newSite(t)
	const token = "of the layers"
	d := s.Driver(csidriver.Options{RequiredSecret: token})
	var shared storagev1.StorageClass
	s.Eventually("the driver's class", func(ctx context.Context) error {
		return s.Client.Get(ctx, client.ObjectKey{Name: d.Class()}, &shared)
	})
	own := shared.DeepCopy()
	own.ObjectMeta = metav1.ObjectMeta{Name: d.Class() + "-own"}
	for k := range own.Parameters {
		switch {
		case strings.HasSuffix(k, "-secret-name"):
			own.Parameters[k] = "${pvc.name}-key"
		case strings.HasSuffix(k, "-secret-namespace"):
			own.Parameters[k] = "${pvc.namespace}"
		}
	}
	s.Create(own)
	s.atEnd(func() {
		if err := s.Client.Delete(context.Background(), own); err != nil {
			t.Error(err)
		}
	})
	for _, claim := range []string{"data", "back"} {
		s.Create(&corev1.Secret{ObjectMeta: metav1.ObjectMeta{Namespace: s.Namespace, Name: claim + "-key"}, StringData: map[string]string{"token": token}})
	}
	s.CreateClaim(framework.Claim{Name: "data", Class: own.Name, Mode: framework.Filesystem, Size: "32Mi"})
	s.filePod("writer", "data")
	s.Exec("writer", "echo layer > /data/a; sync")
	s.backup("first", "data", func(vb *v1alpha1.VolumeBackup) {
		vb.Spec.BackupVolume = &v1alpha1.BackupVolume{StorageClassName: shared.Name}
	})
	s.source("latest", func(rs *v1alpha1.RecoverySource) { rs.Spec.From.Volume = "data" })
	s.restoreClaim(restored{Claim: framework.Claim{Name: "back", Class: own.Name, Mode: framework.Filesystem, Size: "32Mi"}, Source: "latest"})
	said := s.waitEvent("back", v1alpha1.ReasonTenantSecrets)
	s.pending("back")
	command := regexp.MustCompile(`kubectl (create rolebinding \S+ -n \S+ --clusterrole=\S+ --serviceaccount=\S+)`).FindStringSubmatch(said)
	if command == nil {
		t.Fatalf("no command in %q", said)
	}
	if _, err := s.Cluster.Kubectl(t.Context(), nil, strings.Fields(command[1])...); err != nil {
		t.Fatal(err)
	}
	pv := s.WaitBound("back")
	if ref := pv.Spec.CSI.NodeStageSecretRef; ref == nil || ref.Name != "back-key" || ref.Namespace != s.Namespace {
		t.Errorf("the volume is staged with %v", ref)
	}
	s.filePod("reader", "back")
	if got := s.Exec("reader", "cat /back/a"); got != "layer" {
		t.Errorf("the file has %q", got)
	}
}

// Volumes that only one node reaches: they are read on their node, and filled on the node
// of the first pod that uses them.
func TestVolumesOfOneNode(t *testing.T) {
	s := newSite(t) // alone, since another node is added and stays
	nodes := s.Nodes(2)
	if err := s.Cluster.TagImage(t.Context(), s.VarveImage(), shippedImage); err != nil {
		t.Fatal(err)
	}
	class := s.Driver(csidriver.Options{NodeLocal: true}).Class() + "-wffc"
	s.CreateClaim(framework.Claim{Name: "data", Class: class, Mode: framework.Block, Size: "32Mi"})
	s.RunPod(framework.Pod{Name: "writer", Node: nodes[1].Name, Claims: map[string]corev1.PersistentVolumeMode{"data": framework.Block}})
	s.Exec("writer", "dd if=/dev/urandom of=/dev/data bs=1M count=20 2>/dev/null; sync")
	sum := s.SHA256("writer", "/dev/data")
	s.backup("first", "data", nil)
	s.source("latest", func(rs *v1alpha1.RecoverySource) { rs.Spec.From.Volume = "data" })
	for i, name := range []string{"here", "there"} {
		s.restoreClaim(restored{Claim: framework.Claim{Name: name, Class: class, Mode: framework.Block, Size: "32Mi"}, Source: "latest"})
		s.waitEvent(name, v1alpha1.ReasonPopulating)
		s.RunPod(framework.Pod{Name: name, Node: nodes[i].Name, Claims: map[string]corev1.PersistentVolumeMode{name: framework.Block}})
		if got := s.SHA256(name, "/dev/"+name); got != sum {
			t.Errorf("what came back on node %s is not what was backed up", nodes[i].Name)
		}
	}
}
