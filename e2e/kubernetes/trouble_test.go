package kubernetes

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"testing"

	batchv1 "k8s.io/api/batch/v1"
	corev1 "k8s.io/api/core/v1"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"github.com/varve-io/varve/api/v1alpha1"
	"github.com/varve-io/varve/e2e/cluster"
	"github.com/varve-io/varve/e2e/framework"
)

// nothingOf returns nil if no object of Varve's namespace, and no volume, has a UID in
// its name, labels or claim.
func (s *site) nothingOf(ctx context.Context, uid string) error {
	var left []string
	for _, list := range []client.ObjectList{&corev1.PersistentVolumeClaimList{}, &corev1.PodList{}, &batchv1.JobList{}, &corev1.SecretList{}, &v1alpha1.VolumePopulationList{}, &corev1.PersistentVolumeList{}} {
		names, err := s.names(ctx, list, func(o client.Object) bool {
			if strings.Contains(o.GetName(), uid) {
				return true
			}
			for _, v := range o.GetLabels() {
				if strings.Contains(v, uid) {
					return true
				}
			}
			pv, ok := o.(*corev1.PersistentVolume)
			return ok && pv.Spec.ClaimRef != nil && (strings.Contains(pv.Spec.ClaimRef.Name, uid) || string(pv.Spec.ClaimRef.UID) == uid)
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

// mover waits for the running pod of a mover with a role in Varve's namespace that
// belongs to an object of the test's.
func (s *site) mover(role string) *corev1.Pod {
	s.T.Helper()
	var found *corev1.Pod
	s.Eventually("a mover that runs", func(ctx context.Context) (err error) {
		if found, err = s.runningMover(ctx, role); found == nil && err == nil {
			err = errors.New("there is none")
		}
		return err
	})
	return found
}

// runningMover returns the test's mover that runs now; nil without one.
func (s *site) runningMover(ctx context.Context, role string) (*corev1.Pod, error) {
	var pods corev1.PodList
	if err := s.Client.List(ctx, &pods, client.InNamespace(varveNamespace), client.MatchingLabels{"varve.io/role": role}); err != nil {
		return nil, err
	}
	for i := range pods.Items {
		p := &pods.Items[i]
		mine := strings.Contains(p.Annotations["varve.io/owner"]+p.Annotations["varve.io/claim"], s.Namespace+"/")
		if mine && p.Status.Phase == corev1.PodRunning && p.DeletionTimestamp == nil {
			return p, nil
		}
	}
	return nil, nil
}

// waitNextMover waits until the mover of an earlier attempt has ended and another one runs, or the claim is bound. A
// restore that had a place and failed queues behind those of other tests.
func (s *site) waitNextMover(role, claim string, earlier *corev1.Pod) {
	s.T.Helper()
	for _, next := range []bool{false, true} {
		what := "the end of mover " + earlier.Name
		if next {
			what = "the mover after " + earlier.Name
		}
		s.Eventually(what, func(ctx context.Context) error {
			var pvc corev1.PersistentVolumeClaim
			if err := s.Client.Get(ctx, s.Key(claim), &pvc); err != nil || pvc.Status.Phase == corev1.ClaimBound {
				return err
			}
			p, err := s.runningMover(ctx, role)
			if err != nil {
				return err
			}
			if p != nil && p.UID == earlier.UID || p == nil && next {
				return s.NotYet(claim, "it is %s", pvc.Status.Phase)
			}
			return nil
		})
	}
}

// ownStore makes an S3 server for the test and a store on it, slow enough for faults
// during its use.
func (s *site) ownStore(perSecond string, change ...func(*v1alpha1.Limits)) (server *corev1.Pod, store string) {
	s.T.Helper()
	user, yes := int64(65532), true
	// Not on a node that a test may lose.
	s.CreatePod(framework.Pod{Name: "s3", Node: s.Cluster.Control().Name, Change: func(p *corev1.Pod) {
		p.Spec.SecurityContext = &corev1.PodSecurityContext{RunAsUser: &user, RunAsGroup: &user, FSGroup: &user, RunAsNonRoot: &yes}
		p.Spec.Volumes = []corev1.Volume{{Name: "data", VolumeSource: corev1.VolumeSource{EmptyDir: &corev1.EmptyDirVolumeSource{}}}}
		c := &p.Spec.Containers[0]
		c.Image, c.Command = cluster.S3Image, nil
		c.Args = []string{"--port", ":7070", "--region", "us-east-1", "posix", "--sidecar", "/data/meta", "/data/buckets"}
		c.Env = []corev1.EnvVar{{Name: "ROOT_ACCESS_KEY", Value: cluster.S3AccessKey}, {Name: "ROOT_SECRET_KEY", Value: cluster.S3SecretKey}}
		c.VolumeMounts = []corev1.VolumeMount{{Name: "data", MountPath: "/data/buckets", SubPath: "buckets"}, {Name: "data", MountPath: "/data/meta", SubPath: "meta"}}
	}})
	server = s.WaitReady("s3")
	store = s.Namespace
	s.store(store, s.bucketAt(server.Status.PodIP+":7070", "backups"), func(bs *v1alpha1.BackupStore) {
		if perSecond != "" {
			q := quantity(perSecond)
			bs.Spec.Limits = &v1alpha1.Limits{UploadPerSecond: &q, DownloadPerSecond: &q}
		}
		for _, c := range change {
			c(bs.Spec.Limits)
		}
	})
	s.atEnd(func() {
		bs := &v1alpha1.BackupStore{}
		bs.Name = store
		if err := client.IgnoreNotFound(s.Client.Delete(context.Background(), bs)); err != nil {
			s.T.Error(err)
		}
	})
	return server, store
}

// While the repository is unreachable, a claim stays pending with that reason, and is
// filled when the repository is back.
func TestRepositoryUnreachable(t *testing.T) {
	t.Parallel()
	s := newSite(t)
	server, store := s.ownStore("")
	to := func(vb *v1alpha1.VolumeBackup) { vb.Spec.StoreRef.Name = store }
	s.CreateClaim(framework.Claim{Name: "data", Mode: framework.Block, Size: "64Mi"})
	s.blockPod("writer", "data")
	s.Exec("writer", fill)
	sum := s.SHA256("writer", "/dev/data")
	s.backup("first", "data", to)

	restore := s.CutNetwork(server)
	s.source("latest", func(rs *v1alpha1.RecoverySource) {
		rs.Spec.StoreRef.Name, rs.Spec.From.Volume = store, "data"
		rs.Spec.IfNone = v1alpha1.IfNoneEmpty // unreadable does not mean empty
	})
	s.restoreClaim(restored{Claim: framework.Claim{Name: "back", Mode: framework.Block, Size: "64Mi"}, Source: "latest"})
	t.Log(s.waitEvent("back", v1alpha1.ReasonRepositoryUnreachable))
	s.pending("back")
	restore()
	s.WaitBound("back")
	s.blockPod("reader", "back")
	if got := s.SHA256("reader", "/dev/back"); got != sum {
		t.Error("what came back is not what was backed up")
	}
}

// While a claim is filled its events report the progress. A repository that becomes
// unreachable during it costs only time.
func TestRepositoryUnreachableMidway(t *testing.T) {
	t.Parallel()
	s := newSite(t)
	// The restore takes more than a minute: another test may kill the controllers during it, and the
	// next leader must still see the mover running. Kopia's limit passes the bytes of a minute, 60
	// MiB, at once after a pause, so the disk has twice as much.
	server, store := s.ownStore("64Mi", func(l *v1alpha1.Limits) {
		slow := quantity("1Mi")
		l.DownloadPerSecond = &slow
	})
	to := func(vb *v1alpha1.VolumeBackup) { vb.Spec.StoreRef.Name = store }
	s.CreateClaim(framework.Claim{Name: "data", Mode: framework.Block, Size: "128Mi"})
	s.blockPod("writer", "data")
	s.Exec("writer", fillMore)
	sum := s.SHA256("writer", "/dev/data")
	s.backup("first", "data", to)
	s.source("latest", func(rs *v1alpha1.RecoverySource) { rs.Spec.StoreRef.Name, rs.Spec.From.Volume = store, "data" })
	s.restoreClaim(restored{Claim: framework.Claim{Name: "back", Mode: framework.Block, Size: "128Mi"}, Source: "latest"})
	t.Log(s.waitSaid("back", v1alpha1.ReasonPopulating, "% of recovery point"))
	first := s.mover("populate")
	restore := s.CutNetwork(server)
	t.Log(s.waitEvent("back", v1alpha1.ReasonRepositoryUnreachable))
	s.pending("back")
	restore()
	s.waitNextMover("populate", "back", first)
	s.WaitBound("back")
	s.blockPod("reader", "back")
	if got := s.SHA256("reader", "/dev/back"); got != sum {
		t.Error("what came back is not what was backed up")
	}
	all, err := s.events(t.Context(), "back")
	if err != nil {
		t.Fatal(err)
	}
	t.Log(all)
}

// fillMore writes 120 MiB of noise to a 128 MiB device. Kopia's limit passes the bytes of 6 s at once in a new process, so
// with 4Mi a mover has work for 24 s: however late it is seen to run, it has not ended yet.
const fillMore = "dd if=/dev/urandom of=/dev/data bs=1M count=120 2>/dev/null; sync"

// Killed movers and killed controllers cost only time.
func TestKilled(t *testing.T) {
	s := newSite(t) // alone: a hold of another test would be lost with its controller
	_, store := s.ownStore("4Mi")
	to := func(vb *v1alpha1.VolumeBackup) { vb.Spec.StoreRef.Name = store }
	s.CreateClaim(framework.Claim{Name: "data", Mode: framework.Block, Size: "128Mi"})
	s.blockPod("writer", "data")
	s.Exec("writer", fillMore)
	sum := s.SHA256("writer", "/dev/data")
	s.startBackup("first", "data", to)
	s.kill(s.mover("backup"))
	s.killControllers()
	vb := s.waitBackup("first")
	if vb.Status.Attempts < 2 {
		t.Errorf("the mover was killed, and there was %d attempt", vb.Status.Attempts)
	}
	s.source("latest", func(rs *v1alpha1.RecoverySource) { rs.Spec.StoreRef.Name, rs.Spec.From.Volume = store, "data" })
	s.restoreClaim(restored{Claim: framework.Claim{Name: "back", Mode: framework.Block, Size: "128Mi"}, Source: "latest"})
	s.kill(s.mover("populate"))
	s.pending("back")
	s.killControllers()
	s.WaitBound("back")
	s.blockPod("reader", "back")
	if got := s.SHA256("reader", "/dev/back"); got != sum {
		t.Error("what came back is not what was backed up")
	}
}

func (s *site) kill(pod *corev1.Pod) {
	s.T.Helper()
	if err := s.KillPod(pod); err != nil {
		s.T.Fatal(err)
	}
}

// killControllers kills all controllers, the leader too. One that the kubelet is yet to start again, after an
// earlier kill, is dead as it is, but there must be one to kill.
func (s *site) killControllers() {
	s.T.Helper()
	s.Eventually("a controller to kill", func(ctx context.Context) error {
		pods, err := s.controllers(ctx)
		if err != nil {
			return err
		}
		killed := 0
		for i := range pods {
			err := s.KillPod(&pods[i])
			switch {
			case err == nil:
				killed++
			case !errors.Is(err, framework.ErrNoProcess):
				return err
			}
		}
		if killed == 0 {
			return fmt.Errorf("of %d controllers: %w", len(pods), framework.ErrNoProcess)
		}
		return nil
	})
}

// A node lost during a backup: the mover goes to another node, and the point is made.
func TestNodeLoss(t *testing.T) {
	s := newSite(t) // alone: other tests' pods must not be on the node
	nodes := s.Nodes(2)
	if err := s.Cluster.TagImage(t.Context(), s.VarveImage(), shippedImage); err != nil {
		t.Fatal(err)
	}
	_, store := s.ownStore("4Mi", func(l *v1alpha1.Limits) { l.DownloadPerSecond = nil })
	to := func(vb *v1alpha1.VolumeBackup) { vb.Spec.StoreRef.Name = store }
	s.CreateClaim(framework.Claim{Name: "data", Mode: framework.Block, Size: "128Mi"})
	s.RunPod(framework.Pod{Name: "writer", Node: nodes[0].Name, Claims: map[string]corev1.PersistentVolumeMode{"data": framework.Block}})
	s.Exec("writer", fillMore)
	sum := s.SHA256("writer", "/dev/data")
	// Movers go to the second node; the controllers stay with the first.
	s.cordon(nodes[0].Name, true)
	s.startBackup("first", "data", to)
	pod := s.mover("backup")
	s.cordon(nodes[0].Name, false)
	if pod.Spec.NodeName != nodes[1].Name {
		t.Fatalf("the mover runs on %s", pod.Spec.NodeName)
	}
	s.LoseNode(nodes[1])
	// In steps, since each takes time: the node is found lost, then the mover's pod.
	s.Eventually("another attempt", func(ctx context.Context) error {
		var vb v1alpha1.VolumeBackup
		if err := s.Client.Get(ctx, s.Key("first"), &vb); err != nil {
			return err
		}
		if vb.Status.Attempts < 2 {
			return fmt.Errorf("there was %d; %s", vb.Status.Attempts, says(vb.Status.Conditions))
		}
		return nil
	})
	// The node stays lost, with the volume that the first mover read: the run ends.
	s.waitBackup("first")
	s.source("latest", func(rs *v1alpha1.RecoverySource) { rs.Spec.StoreRef.Name, rs.Spec.From.Volume = store, "data" })
	s.restoreClaim(restored{Claim: framework.Claim{Name: "back", Mode: framework.Block, Size: "128Mi"}, Source: "latest"})
	s.WaitBound("back")
	s.RunPod(framework.Pod{Name: "reader", Node: nodes[0].Name, Claims: map[string]corev1.PersistentVolumeMode{"back": framework.Block}})
	if got := s.SHA256("reader", "/dev/back"); got != sum {
		t.Error("what came back is not what was backed up")
	}
}

// cordon keeps new pods away from a node, until the test ends at the latest.
func (s *site) cordon(node string, on bool) {
	s.T.Helper()
	set := func(ctx context.Context, on bool) error {
		n := &corev1.Node{}
		n.Name = node
		return s.Client.Patch(ctx, n, client.RawPatch("application/merge-patch+json", fmt.Appendf(nil, `{"spec":{"unschedulable":%t}}`, on)))
	}
	if err := set(s.T.Context(), on); err != nil {
		s.T.Fatal(err)
	}
	if on {
		s.atEnd(func() {
			if err := set(context.Background(), false); err != nil {
				s.T.Error(err)
			}
		})
	}
}
