package framework_test

import (
	"context"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"

	corev1 "k8s.io/api/core/v1"

	"github.com/varve-io/varve/e2e/cluster"
	"github.com/varve-io/varve/e2e/framework"
)

func read(t *testing.T, elem ...string) string {
	t.Helper()
	b, err := os.ReadFile(filepath.Join(elem...))
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}

// grep returns the first file below dir that contains s.
func grep(t *testing.T, dir, s string) (found string) {
	t.Helper()
	err := filepath.WalkDir(dir, func(p string, e fs.DirEntry, err error) error {
		if err == nil && !e.IsDir() && strings.Contains(read(t, p), s) {
			found = p
			return fs.SkipAll
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return found
}

// The sidecars may do only their work.
func TestSidecarsAreNotAdministrators(t *testing.T) {
	t.Parallel()
	f := framework.New(t)
	for account, may := range map[string][]string{
		"csi-provisioner":       {"create persistentvolumes", "list storageclasses.storage.k8s.io"},
		"csi-attacher":          {"patch volumeattachments.storage.k8s.io"},
		"csi-resizer":           {"patch persistentvolumes"},
		"csi-snapshotter":       {"update volumesnapshotcontents.snapshot.storage.k8s.io"},
		"snapshot-controller":   {"create volumesnapshotcontents.snapshot.storage.k8s.io"},
		"csi-snapshot-metadata": {"create tokenreviews.authentication.k8s.io"},
	} {
		can := func(verbAndKind string) string {
			args := append([]string{"--kubeconfig", f.Cluster.Path(account + ".kubeconfig"), "auth", "can-i", "-n", f.Namespace}, strings.Fields(verbAndKind)...)
			out, _ := f.Cluster.Kubectl(t.Context(), nil, args...) // no is an exit status too
			return out
		}
		for _, m := range may {
			if got := can(m); got != "yes" {
				t.Errorf("%s cannot %s: %s", account, m, got)
			}
		}
		for _, never := range []string{"create pods", "delete namespaces", "create clusterrolebindings.rbac.authorization.k8s.io", "update secrets"} {
			if got := can(never); got != "no" {
				t.Errorf("%s can %s: %s", account, never, got)
			}
		}
	}
}

// The S3 server keeps its data and refuses access without the key.
func TestS3(t *testing.T) {
	t.Parallel()
	f := framework.New(t)
	ip, err := f.Cluster.Kubectl(t.Context(), nil, "get", "service", "s3", "-n", cluster.SystemNamespace, "-o", "jsonpath={.spec.clusterIP}")
	if err != nil {
		t.Fatal(err)
	}
	bucket := "http://" + ip + ":7070/" + f.Namespace
	curl := func(user, stdin string, args ...string) (string, error) {
		args = append([]string{"curl", "-sS", "--fail", "--aws-sigv4", "aws:amz:us-east-1:s3", "--user", user, "-H", "x-amz-content-sha256: UNSIGNED-PAYLOAD"}, args...)
		return f.Cluster.Exec(t.Context(), f.Cluster.Control(), cluster.NetworkOnly, strings.NewReader(stdin), args...)
	}
	const user = cluster.S3AccessKey + ":" + cluster.S3SecretKey
	if _, err := curl(user, "", "-X", "PUT", bucket); err != nil {
		t.Fatal(err)
	}
	if _, err := curl(user, "", "-X", "PUT", "--data-binary", "a layer of sediment", bucket+"/varve"); err != nil {
		t.Fatal(err)
	}
	if got, err := curl(user, "", bucket+"/varve"); err != nil || got != "a layer of sediment" {
		t.Fatalf("got %q, %v", got, err)
	}
	if got, err := curl("nobody:nothing", "", bucket+"/varve"); err == nil {
		t.Fatalf("a stranger got %q", got)
	}
	f.RunPod(framework.Pod{Name: "p"})
	// By name, from a pod: DNS, the service, and a refusal by S3 itself.
	f.Eventually("S3 by name", func(ctx context.Context) error {
		_, err := f.TryExec(ctx, "p", nil, "wget -S -O - "+cluster.S3Endpoint+"/ 2>&1 | grep -q '403'")
		return err
	})
}

// A pod that is not root reads a raw device only if the runtime changes its owner.
func TestDeviceOwnership(t *testing.T) { // alone: it restarts the container runtime
	f := framework.New(t)
	f.CreateClaim(framework.Claim{Name: "data", Mode: framework.Block, Size: "8Mi"})
	user := int64(65532)
	run := func(name string) error {
		f.RunPod(framework.Pod{Name: name, Claims: map[string]corev1.PersistentVolumeMode{"data": framework.Block}, Change: func(p *corev1.Pod) {
			p.Spec.SecurityContext = &corev1.PodSecurityContext{RunAsUser: &user, RunAsGroup: &user}
		}})
		_, err := f.TryExec(t.Context(), name, nil, "head -c 1 /dev/data > /dev/null")
		f.Delete(&corev1.Pod{ObjectMeta: meta(f, name)})
		return err
	}
	f.DeviceOwnership(false)
	if err := run("refused"); err == nil || !contains(err.Error(), "Permission denied") {
		t.Errorf("switched off: got %v, want a refusal", err)
	}
	f.DeviceOwnership(true)
	if err := run("allowed"); err != nil {
		t.Errorf("switched on: %v", err)
	}
}
