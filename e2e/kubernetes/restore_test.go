package kubernetes

import (
	"context"
	"errors"
	"fmt"
	"os/exec"
	"regexp"
	"strings"
	"testing"
	"time"

	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	rbacv1 "k8s.io/api/rbac/v1"
	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/kubernetes/scheme"
	"k8s.io/client-go/rest"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"github.com/varve-io/varve/api/v1alpha1"
	"github.com/varve-io/varve/e2e/csidriver"
	"github.com/varve-io/varve/e2e/framework"
)

// rollBack requests a restore of a claim.
func (s *site) rollBack(name, claim string, change func(*v1alpha1.VolumeRestore)) {
	s.T.Helper()
	vr := &v1alpha1.VolumeRestore{ObjectMeta: metav1.ObjectMeta{Namespace: s.Namespace, Name: name},
		Spec: v1alpha1.VolumeRestoreSpec{ClaimName: claim, StoreRef: v1alpha1.StoreReference{Name: mainStore}}}
	if change != nil {
		change(vr)
	}
	s.Create(vr)
}

// waitRestore waits until a restore is in a phase.
func (s *site) waitRestore(name string, phase v1alpha1.RestorePhase) *v1alpha1.VolumeRestore {
	s.T.Helper()
	vr := &v1alpha1.VolumeRestore{}
	s.Eventually(fmt.Sprintf("restore %s to be %s", name, phase), func(ctx context.Context) error {
		if err := s.Client.Get(ctx, s.Key(name), vr); err != nil {
			return err
		}
		if vr.Status.Phase != phase {
			return fmt.Errorf("it is %s at %s: %s", vr.Status.Phase, vr.Status.Step, says(vr.Status.Conditions))
		}
		return nil
	})
	return vr
}

// undo requests the undo, after which nothing is kept for long.
func (s *site) undo(name string) {
	s.T.Helper()
	patch := client.RawPatch(types.MergePatchType, []byte(`{"spec":{"undo":true,"keepOld":"1s"}}`))
	if err := s.Client.Patch(s.T.Context(), &v1alpha1.VolumeRestore{ObjectMeta: metav1.ObjectMeta{Namespace: s.Namespace, Name: name}}, patch); err != nil {
		s.T.Fatal(err)
	}
}

// uid of a claim that is bound.
func (s *site) uid(claim string) types.UID {
	s.T.Helper()
	s.WaitBound(claim)
	var pvc corev1.PersistentVolumeClaim
	if err := s.Client.Get(s.T.Context(), s.Key(claim), &pvc); err != nil {
		s.T.Fatal(err)
	}
	return pvc.UID
}

// nothingKept waits until the storage's volumes that restores kept are deleted.
func (s *site) nothingKept(uid types.UID) {
	s.T.Helper()
	s.Eventually("what was kept to be gone", func(ctx context.Context) error {
		names, err := s.names(ctx, &corev1.PersistentVolumeList{}, func(o client.Object) bool { return strings.HasSuffix(o.GetName(), string(uid)) })
		if err == nil && len(names) > 0 {
			err = errors.New(strings.Join(names, ", "))
		}
		return err
	})
}

// A claim with data is rolled back under its name and UID, once no pod uses it; undo brings
// the earlier data back.
func TestSwap(t *testing.T) {
	t.Parallel()
	for _, mode := range []corev1.PersistentVolumeMode{framework.Block, framework.Filesystem} {
		t.Run(string(mode), func(t *testing.T) {
			t.Parallel()
			s := newSite(t)
			class := s.Driver(csidriver.Options{AttachRequired: true, DetachDelay: detach}).Class()
			s.CreateClaim(framework.Claim{Name: "data", Class: class, Mode: mode, Size: "64Mi"})
			write, read := "dd if=/dev/urandom of=/dev/data bs=1M count=8 2>/dev/null; sync", "head -c 64M /dev/data | sha256sum"
			if mode == framework.Filesystem {
				write, read = "dd if=/dev/urandom of=/data/file bs=1M count=8 2>/dev/null; sync", "sha256sum < /data/file"
			}
			run := func(name string) string {
				s.RunPod(framework.Pod{Name: name, Claims: map[string]corev1.PersistentVolumeMode{"data": mode}})
				return s.Exec(name, read)
			}
			s.RunPod(framework.Pod{Name: "writer", Claims: map[string]corev1.PersistentVolumeMode{"data": mode}})
			s.Exec("writer", write)
			before := s.Exec("writer", read)
			s.backup("first", "data", nil)
			s.Exec("writer", write)
			after := s.Exec("writer", read)
			uid := s.uid("data")
			s.rollBack("back", "data", nil)
			s.waitRestore("back", v1alpha1.RestoreWaiting) // written, and a pod uses the claim
			if got := s.Exec("writer", read); got != after {
				t.Error("the claim was changed while a pod used it")
			}
			s.deletePod("writer")
			vr := s.waitRestore("back", v1alpha1.RestoreSucceeded)
			if vr.Status.OldVolume == "" || vr.Status.KeepUntil == nil || time.Until(vr.Status.KeepUntil.Time) < 23*time.Hour {
				t.Errorf("kept: %q until %v", vr.Status.OldVolume, vr.Status.KeepUntil)
			}
			if got := run("reader"); got != before {
				t.Error("the claim does not hold the recovery point")
			}
			s.deletePod("reader")
			s.undo("back")
			s.waitRestore("back", v1alpha1.RestoreUndone)
			if got := run("again"); got != after {
				t.Error("undo did not bring back what was before")
			}
			if now := s.uid("data"); now != uid {
				t.Errorf("the claim's UID was %s and is %s", uid, now)
			}
			s.nothingKept(vr.UID)
			if err := s.nothingAt(t.Context(), vr.UID); err != nil {
				t.Error(err)
			}
			// The volume has all abilities of an ordinary one.
			s.backup("second", "data", nil)
		})
	}
}

// scaleRights binds the role that lets the controller scale in the test's namespace, by the
// command from its message.
func (s *site) scaleRights(message string) {
	s.T.Helper()
	command := regexp.MustCompile(`kubectl create rolebinding [^;"]+`).FindString(message)
	if command == "" {
		s.T.Fatalf("no command in %q", message)
	}
	if _, err := s.Cluster.Kubectl(s.T.Context(), nil, strings.Fields(command)[1:]...); err != nil {
		s.T.Fatal(err)
	}
}

// waitReason waits until a restore waits for a reason, and returns the message.
func (s *site) waitReason(name, reason string) (message string) {
	s.T.Helper()
	s.Eventually(fmt.Sprintf("restore %s to say %s", name, reason), func(ctx context.Context) error {
		var vr v1alpha1.VolumeRestore
		if err := s.Client.Get(ctx, s.Key(name), &vr); err != nil {
			return err
		}
		c := meta.FindStatusCondition(vr.Status.Conditions, v1alpha1.ConditionComplete)
		if c == nil || c.Reason != reason {
			return fmt.Errorf("it is %s at %s: %s", vr.Status.Phase, vr.Status.Step, says(vr.Status.Conditions))
		}
		message = c.Message
		return nil
	})
	return message
}

// A StatefulSet whose pods use the claim is scaled down and up again by the restore, once the
// controller may; its other replica's claim keeps its data. While Argo CD manages it, it is
// not scaled.
func TestScaleDown(t *testing.T) {
	t.Parallel()
	s := newSite(t)
	class := s.Driver(csidriver.Options{AttachRequired: true, DetachDelay: detach}).Class()
	s.source("layers", func(rs *v1alpha1.RecoverySource) { rs.Spec.IfNone = v1alpha1.IfNoneEmpty })
	s.Create(s.statefulSet("app", class, "layers", 2, `[ -e /data/id ] || hostname > /data/id; sync`))
	s.waitReplicas("app", 2)
	s.backup("first", "data-app-0", nil)
	for _, pod := range []string{"app-0", "app-1"} {
		s.Exec(pod, "echo spoilt > /data/id; sync")
	}
	annotate := func(value string) {
		t.Helper()
		patch := client.RawPatch(types.MergePatchType, fmt.Appendf(nil, `{"metadata":{"annotations":{"argocd.argoproj.io/tracking-id":%s}}}`, value))
		if err := s.Client.Patch(t.Context(), &appsv1.StatefulSet{ObjectMeta: metav1.ObjectMeta{Namespace: s.Namespace, Name: "app"}}, patch); err != nil {
			t.Fatal(err)
		}
	}
	annotate(`"shop:apps/StatefulSet:shop/app"`)
	s.rollBack("back", "data-app-0", func(vr *v1alpha1.VolumeRestore) {
		vr.Spec.ScaleDown, vr.Spec.KeepOld = true, &metav1.Duration{Duration: time.Second}
	})
	s.scaleRights(s.waitReason("back", v1alpha1.ReasonScaleForbidden))
	if said := s.waitReason("back", v1alpha1.ReasonScaleFought); !strings.Contains(said, "StatefulSet app is managed by Argo CD") {
		t.Errorf("it says %q", said)
	}
	annotate("null")
	vr := s.waitRestore("back", v1alpha1.RestoreSucceeded)
	s.waitReplicas("app", 2)
	for pod, want := range map[string]string{"app-0": "app-0", "app-1": "spoilt"} {
		if got := strings.TrimSpace(s.Exec(pod, "cat /data/id")); got != want {
			t.Errorf("the claim of %s has %q, want %q", pod, got, want)
		}
	}
	s.waitSaid("data-app-0", v1alpha1.ReasonScaledDown, "StatefulSet app is scaled from 2 to 0")
	s.nothingKept(vr.UID)
}

// After a snapshot, the differences are written to a claim's own volume while no pod uses it. A
// new pod stops the writing, and the volume is reported as inconsistent until the restore has
// ended.
func TestDelta(t *testing.T) {
	t.Parallel()
	s := newSite(t)
	d := s.Driver(csidriver.Options{AttachRequired: true, DetachDelay: detach})
	s.CreateClaim(framework.Claim{Name: "data", Class: d.Class(), Mode: framework.Filesystem, Size: "64Mi"})
	run := func(pod, command string) string {
		s.RunPod(framework.Pod{Name: pod, Claims: map[string]corev1.PersistentVolumeMode{"data": framework.Filesystem}})
		defer s.deletePod(pod)
		return s.Exec(pod, command)
	}
	before := run("writer", "dd if=/dev/urandom of=/data/file bs=1M count=8 2>/dev/null; sync; sha256sum < /data/file")
	s.backup("first", "data", nil)
	spoilt := run("vandal", "dd if=/dev/urandom of=/data/file bs=64k count=1 seek=9 conv=notrunc 2>/dev/null; sync; sha256sum < /data/file")
	uid, volume := s.uid("data"), s.WaitBound("data")
	// While a pod keeps it waiting, the recovery point cannot be deleted.
	s.RunPod(framework.Pod{Name: "user", Claims: map[string]corev1.PersistentVolumeMode{"data": framework.Filesystem}})
	s.rollBack("back", "data", func(vr *v1alpha1.VolumeRestore) { vr.Spec.Mode = v1alpha1.RestoreDelta })
	s.waitReason("back", v1alpha1.ReasonClaimInUse)
	var bs v1alpha1.BackupStore
	if err := s.Client.Get(t.Context(), client.ObjectKey{Name: mainStore}, &bs); err != nil {
		t.Fatal(err)
	}
	varve, env, _ := s.connect(*bs.Spec.Storage.S3)
	// The controller says that it waits even if the store takes long to keep the point.
	s.Eventually("the lease of the restore", func(ctx context.Context) error {
		list := exec.CommandContext(ctx, varve, "list", "-o", "json", s.Namespace+"/data")
		list.Env = env
		out, err := list.CombinedOutput()
		if err == nil && !strings.Contains(string(out), "restore of claim "+s.Namespace+"/data") {
			err = fmt.Errorf("varve list shows none: %s", out)
		}
		return err
	})
	forget := exec.Command(varve, "forget", "--yes", s.Namespace+"/data@latest")
	forget.Env = env
	if out, err := forget.CombinedOutput(); err == nil || !strings.Contains(string(out), "restore of claim "+s.Namespace+"/data") {
		t.Errorf("varve forget of the point that a restore waits to write: %v\n%s", err, out)
	}
	s.deletePod("user")
	vr := s.waitRestore("back", v1alpha1.RestoreSucceeded)
	if c := meta.FindStatusCondition(vr.Status.Conditions, v1alpha1.ConditionInconsistent); c == nil || c.Status != metav1.ConditionFalse || vr.Status.Snapshot == "" {
		t.Errorf("conditions: %s; snapshot %q", says(vr.Status.Conditions), vr.Status.Snapshot)
	}
	if got := run("reader", "sha256sum < /data/file"); got != before {
		t.Error("the claim does not hold the recovery point")
	}
	now := s.WaitBound("data")
	if s.uid("data") != uid || now.UID != volume.UID || now.Spec.CSI.VolumeHandle != volume.Spec.CSI.VolumeHandle {
		t.Error("the claim or its volume is another one")
	}
	// The snapshot has the earlier data.
	s.CreateClaim(framework.Claim{Name: "saved", Class: d.Class(), Mode: framework.Filesystem, Size: "64Mi", Snapshot: vr.Status.Snapshot})
	s.RunPod(framework.Pod{Name: "saved", Claims: map[string]corev1.PersistentVolumeMode{"saved": framework.Filesystem}})
	if got := s.Exec("saved", "sha256sum < /saved/file"); got != spoilt {
		t.Error("the snapshot does not have what was before")
	}
	if err := s.nothingAt(t.Context(), vr.UID); err != nil {
		t.Error(err)
	}
}

// A tenant can roll back only its own claims, to points that could fill a new claim, and can
// scale nothing that it may not scale.
func TestRestoreTenant(t *testing.T) {
	t.Parallel()
	s := newSite(t)
	other := s.in(s.Namespace + "-other")
	other.CreateClaim(framework.Claim{Name: "secret", Mode: framework.Block, Size: "64Mi"})
	other.blockPod("writer", "secret")
	other.Exec("writer", "echo secret > /dev/secret; sync")
	other.backup("first", "secret", nil)
	s.CreateClaim(framework.Claim{Name: "data", Mode: framework.Block, Size: "64Mi"})
	s.WaitBound("data")
	// Another namespace's points are not granted.
	s.rollBack("steal", "data", func(vr *v1alpha1.VolumeRestore) {
		vr.Spec.From = v1alpha1.RecoveryFrom{Namespace: other.Namespace, Volume: "secret"}
	})
	vr := s.waitRestore("steal", v1alpha1.RestoreFailed)
	if c := meta.FindStatusCondition(vr.Status.Conditions, v1alpha1.ConditionFailed); c == nil || c.Reason != v1alpha1.ReasonNotGranted {
		t.Errorf("it says %s", says(vr.Status.Conditions))
	}
	// Another namespace's claim cannot even be named.
	s.rollBack("reach", "secret", nil)
	vr = s.waitRestore("reach", v1alpha1.RestoreFailed)
	if c := meta.FindStatusCondition(vr.Status.Conditions, v1alpha1.ConditionFailed); c == nil || c.Reason != v1alpha1.ReasonClaimNotFound {
		t.Errorf("it says %s", says(vr.Status.Conditions))
	}
	// A user who may make VolumeRestores but not scale.
	user := "restorer@" + s.Namespace
	s.Create(&rbacv1.Role{ObjectMeta: metav1.ObjectMeta{Namespace: s.Namespace, Name: "restorer"}, Rules: []rbacv1.PolicyRule{{
		APIGroups: []string{v1alpha1.GroupVersion.Group}, Resources: []string{"volumerestores"}, Verbs: []string{"create", "patch", "get"}}}})
	s.Create(&rbacv1.RoleBinding{ObjectMeta: metav1.ObjectMeta{Namespace: s.Namespace, Name: "restorer"},
		RoleRef: rbacv1.RoleRef{APIGroup: rbacv1.GroupName, Kind: "Role", Name: "restorer"}, Subjects: []rbacv1.Subject{{APIGroup: rbacv1.GroupName, Kind: "User", Name: user}}})
	cfg := rest.CopyConfig(s.Config)
	cfg.Impersonate = rest.ImpersonationConfig{UserName: user, Groups: []string{"system:authenticated"}}
	as, err := client.New(cfg, client.Options{Scheme: scheme.Scheme})
	if err != nil {
		t.Fatal(err)
	}
	scaling := func(name string, scale bool) error {
		return as.Create(t.Context(), &v1alpha1.VolumeRestore{ObjectMeta: metav1.ObjectMeta{Namespace: s.Namespace, Name: name},
			Spec: v1alpha1.VolumeRestoreSpec{ClaimName: "absent", StoreRef: v1alpha1.StoreReference{Name: mainStore}, ScaleDown: scale}})
	}
	s.Eventually("the admission policy", func(context.Context) error {
		if err := scaling("scaling-"+fmt.Sprint(time.Now().UnixNano()), true); err == nil || !strings.Contains(err.Error(), "scaleDown needs the right") {
			return fmt.Errorf("a user who may not scale has Varve scale: %w", err)
		}
		return nil
	})
	if err := scaling("plain", false); err != nil {
		t.Error(err)
	}
	patch := client.RawPatch(types.MergePatchType, []byte(`{"spec":{"scaleDown":true}}`))
	if err := as.Patch(t.Context(), &v1alpha1.VolumeRestore{ObjectMeta: metav1.ObjectMeta{Namespace: s.Namespace, Name: "plain"}}, patch); err == nil {
		t.Error("a user who may not scale has Varve scale, by a patch")
	}
	s.Create(&v1alpha1.VolumeRestore{ObjectMeta: metav1.ObjectMeta{Namespace: s.Namespace, Name: "scaled"},
		Spec: v1alpha1.VolumeRestoreSpec{ClaimName: "absent", StoreRef: v1alpha1.StoreReference{Name: mainStore}, ScaleDown: true}})
	patch = client.RawPatch(types.MergePatchType, []byte(`{"spec":{"undo":true}}`))
	if err := as.Patch(t.Context(), &v1alpha1.VolumeRestore{ObjectMeta: metav1.ObjectMeta{Namespace: s.Namespace, Name: "scaled"}}, patch); err == nil {
		t.Error("a user who may not scale has Varve scale, by the undo of another's restore")
	}
	// No spec can be changed to another claim.
	patch = client.RawPatch(types.MergePatchType, []byte(`{"spec":{"claimName":"data"}}`))
	if err := as.Patch(t.Context(), &v1alpha1.VolumeRestore{ObjectMeta: metav1.ObjectMeta{Namespace: s.Namespace, Name: "plain"}}, patch); err == nil {
		t.Error("a restore was turned to another claim")
	}
}
