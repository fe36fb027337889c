package kubernetes

import (
	"context"
	"fmt"
	"os/exec"
	"strings"
	"testing"

	corev1 "k8s.io/api/core/v1"
	rbacv1 "k8s.io/api/rbac/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes/scheme"
	"k8s.io/client-go/rest"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"github.com/varve-io/varve/api/v1alpha1"
	"github.com/varve-io/varve/e2e/framework"
)

func (s *site) startFeed(name string, spec v1alpha1.DumpRestoreSpec) {
	s.T.Helper()
	s.Create(&v1alpha1.DumpRestore{ObjectMeta: metav1.ObjectMeta{Namespace: s.Namespace, Name: name}, Spec: spec})
}

// feed makes a DumpRestore that has to succeed. On a busy machine a controller may lose its lease
// in the middle; then another one is made, as users are told.
func (s *site) feed(name string, spec v1alpha1.DumpRestoreSpec) *v1alpha1.DumpRestore {
	s.T.Helper()
	for try := 1; ; try++ {
		one := fmt.Sprintf("%s-%d", name, try)
		s.startFeed(one, spec)
		dr := s.endOfFeed(one)
		if dr.Status.Phase == v1alpha1.DumpRestoreSucceeded {
			return dr
		}
		if said := says(dr.Status.Conditions); try == 3 || !strings.Contains(said, v1alpha1.ReasonFeedLost+": the controller was restarted") {
			s.T.Fatalf("DumpRestore %s is %s: %s", one, dr.Status.Phase, said)
		}
	}
}

// endOfFeed waits until a DumpRestore has ended.
func (s *site) endOfFeed(name string) *v1alpha1.DumpRestore {
	s.T.Helper()
	dr := &v1alpha1.DumpRestore{}
	s.Eventually("DumpRestore "+name, func(ctx context.Context) error {
		if err := s.Client.Get(ctx, s.Key(name), dr); err != nil {
			return err
		}
		if dr.Status.CompletionTime == nil {
			return fmt.Errorf("it is %s, %s", dr.Status.Phase, says(dr.Status.Conditions))
		}
		return nil
	})
	return dr
}

// Whatever of those that feed a command is killed: the command sees no end of its input, is killed, and is not
// started again. A user without the right to exec has no command run.
func TestDumpRestoreFaults(t *testing.T) {
	s := newSite(t) // not in parallel: it kills the controllers and the kubelet
	s.mayExec()
	name := s.Namespace
	bucket := s.bucket("feeds-" + name[len(name)-6:])
	s.store(name, bucket, nil)
	pod := s.RunPod(framework.Pod{Name: "app", Claims: map[string]corev1.PersistentVolumeMode{}})
	s.Exec("app", "true")
	pod.Labels = map[string]string{"app": "app"}
	if err := s.Client.Patch(t.Context(), pod, client.RawPatch("application/merge-patch+json", []byte(`{"metadata":{"labels":{"app":"app"}}}`))); err != nil {
		t.Fatal(err)
	}
	// 200 MiB that do not repeat: more than all buffers on the way.
	const size = 200 << 20
	varve, env, _ := s.connect(bucket)
	cmd := exec.Command("sh", "-c", fmt.Sprintf(`head -c %d /dev/urandom | tee "$2" | "$0" backup - --cluster e2e --volume "$1" --expect-bytes %d`, size, size), varve, name+"/data.sql", t.TempDir()+"/copy")
	cmd.Env = env
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	sum, err := exec.Command("sha256sum", cmd.Args[len(cmd.Args)-1]).Output()
	if err != nil {
		t.Fatal(err)
	}
	spec := func(command string) v1alpha1.DumpRestoreSpec {
		return v1alpha1.DumpRestoreSpec{StoreRef: v1alpha1.StoreReference{Name: name}, From: v1alpha1.RecoveryFrom{Volume: "data.sql"},
			Into: v1alpha1.DumpRestoreInto{Command: command, PodSelector: metav1.LabelSelector{MatchLabels: map[string]string{"app": "app"}}}}
	}
	dr := s.feed("whole", spec(`sha256sum >/tmp/sum`))
	if got := s.Exec("app", "cat /tmp/sum"); !strings.HasPrefix(got, strings.Fields(string(sum))[0]) || dr.Status.Bytes != size {
		t.Errorf("of %s came %s, %+v", sum, got, dr.Status)
	}
	t.Logf("200 MiB took %v", dr.Status.CompletionTime.Sub(dr.Status.StartTime.Time))
	// A command that stops reading for longer than a WebSocket may stand still.
	s.feed("slow", spec(`dd bs=1000 count=1 >/dev/null 2>&1; sleep 90; cat >/dev/null`))

	for _, fault := range []string{"controller", "kubelet", "deletion"} {
		s.Exec("app", "rm -f /tmp/begun /tmp/committed")
		s.startFeed(fault, spec(`echo begun >>/tmp/begun; dd bs=1000 count=1 >/dev/null 2>&1; until [ -e /tmp/go ]; do sleep 0.1; done; cat >/dev/null && echo >/tmp/committed`))
		s.Eventually("the command", func(context.Context) error { _, err := s.ReadFile(pod, "/tmp/begun"); return err })
		switch fault {
		case "controller":
			s.killControllers()
		case "kubelet":
			s.KillKubelet(pod)()
		case "deletion":
			s.Delete(&v1alpha1.DumpRestore{ObjectMeta: metav1.ObjectMeta{Namespace: name, Name: fault}})
		}
		if fault != "deletion" {
			dr := s.endOfFeed(fault)
			if said := says(dr.Status.Conditions); dr.Status.Phase != v1alpha1.DumpRestoreFailed || !strings.Contains(said, "Feed") || !strings.Contains(said, "start from an empty database") {
				t.Errorf("%s: it is %s and says %s", fault, dr.Status.Phase, said)
			}
		}
		s.Exec("app", "touch /tmp/go")
		s.Eventually("the command to be killed", func(context.Context) error {
			if left := s.Exec("app", `for f in /proc/[0-9]*/cmdline; do grep -q 'tmp/committed' "$f" 2>/dev/null && [ "${f%/cmdline}" != "/proc/$$" ] && echo "$f"; done; true`); strings.TrimSpace(left) != "" {
				return fmt.Errorf("there are %s", left)
			}
			return nil
		})
		if begun := s.Exec("app", "cat /tmp/begun; rm -f /tmp/go; ls /tmp/committed 2>&1 || true"); strings.Count(begun, "begun") != 1 || !strings.Contains(begun, "No such file") {
			t.Errorf("%s: %s", fault, begun)
		}
	}

	user := "restorer@" + name
	s.Create(&rbacv1.Role{ObjectMeta: metav1.ObjectMeta{Namespace: name, Name: "restorer"}, Rules: []rbacv1.PolicyRule{{
		APIGroups: []string{v1alpha1.GroupVersion.Group}, Resources: []string{"dumprestores", "backuppolicies"}, Verbs: []string{"create", "update", "patch", "get"}}}})
	s.Create(&rbacv1.RoleBinding{ObjectMeta: metav1.ObjectMeta{Namespace: name, Name: "restorer"},
		RoleRef: rbacv1.RoleRef{APIGroup: rbacv1.GroupName, Kind: "Role", Name: "restorer"}, Subjects: []rbacv1.Subject{{APIGroup: rbacv1.GroupName, Kind: "User", Name: user}}})
	cfg := rest.CopyConfig(s.Config)
	cfg.Impersonate = rest.ImpersonationConfig{UserName: user, Groups: []string{"system:authenticated"}}
	as, err := client.New(cfg, client.Options{Scheme: scheme.Scheme})
	if err != nil {
		t.Fatal(err)
	}
	s.Eventually("the admission policies", func(ctx context.Context) error {
		for _, o := range []client.Object{
			&v1alpha1.DumpRestore{ObjectMeta: metav1.ObjectMeta{Namespace: name, Name: "steal"}, Spec: spec("cat")},
			&v1alpha1.BackupPolicy{ObjectMeta: metav1.ObjectMeta{Namespace: name, Name: "steal"}, Spec: v1alpha1.BackupPolicySpec{
				StoreRef: v1alpha1.StoreReference{Name: name}, Schedule: v1alpha1.Schedule{Cron: "@daily"},
				Hooks: []v1alpha1.Hook{{Name: "out", Dump: &v1alpha1.HookDump{Command: "cat /etc/shadow"}}}}},
		} {
			if err := as.Create(ctx, o); err == nil || !strings.Contains(err.Error(), "may not create pods/exec") {
				return fmt.Errorf("a user who may not exec has a command run by a %T: %w", o, err)
			}
		}
		return nil
	})
}
