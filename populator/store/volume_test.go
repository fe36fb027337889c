package store

import (
	"context"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"sigs.k8s.io/controller-runtime/pkg/client/fake"

	"github.com/varve-io/varve/api/v1alpha1"
)

// asOther runs this test again, in a process of another user of the volume's group, as a
// mover is to the controller.
const asOther = "VARVE_TEST_VOLUME_DIR"

var onVolume = Settings{Storage: v1alpha1.Storage{Volume: &v1alpha1.VolumeStorage{ClaimName: "nfs", Path: "a/b"}}, ClusterName: "here"}

// write writes a block to an open repository, which makes files and directories, and reads it.
func write(ctx context.Context, t *testing.T, repo *Open, text string) {
	t.Helper()
	w, err := repo.NewWriter(ctx, "test")
	if err != nil {
		t.Fatal(err)
	}
	defer w.Close()
	if _, err := w.WriteBlock(ctx, []byte(text)); err != nil {
		t.Fatalf("write as user %d: %v", os.Getuid(), err)
	}
	if err := w.Flush(ctx); err != nil {
		t.Fatalf("write as user %d: %v", os.Getuid(), err)
	}
}

func TestVolumeIsSharedWithMovers(t *testing.T) {
	creds := Credentials{KeyPassword: []byte("secret")}
	if dir := os.Getenv(asOther); dir != "" {
		unix.Umask(VolumeUmask)
		repo, err := onVolume.Open(t.Context(), OpenOptions{Credentials: creds, VolumeDir: filepath.Join(dir, "nfs"), Dir: filepath.Join(dir, "scratch")})
		if err != nil {
			t.Fatalf("open as user %d: %v", os.Getuid(), err)
		}
		defer repo.Close(context.WithoutCancel(t.Context()))
		write(t.Context(), t, repo, "theirs")
		return
	}
	if os.Getuid() != 0 {
		t.Skip("needs root, to run as two users")
	}
	defer unix.Umask(unix.Umask(VolumeUmask))
	dir := t.TempDir()
	if err := os.Chmod(filepath.Dir(dir), 0o755); err != nil { // of the whole test's directories
		t.Fatal(err)
	}
	for name, mode := range map[string]os.FileMode{"": 0o755, "nfs": os.ModeSetgid | 0o770, "scratch": 0o777} {
		if err := os.MkdirAll(filepath.Join(dir, name), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.Chmod(filepath.Join(dir, name), mode); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.Chown(filepath.Join(dir, "nfs"), 0, VolumeGroup); err != nil {
		t.Fatal(err)
	}
	s := runtime.NewScheme()
	if err := corev1.AddToScheme(s); err != nil {
		t.Fatal(err)
	}
	c := fake.NewClientBuilder().WithScheme(s).WithObjects(&corev1.Secret{ObjectMeta: metav1.ObjectMeta{Namespace: "varve", Name: "creds"}, Data: creds}).Build()
	stores := &Stores{Client: c, Secrets: c, Namespace: "varve", VolumesDir: dir}
	stores.Dir, stores.ConfigDir = t.TempDir(), t.TempDir()
	repo, err := stores.Ensure(t.Context(), stores.FromBackupStore(&v1alpha1.BackupStore{Spec: v1alpha1.BackupStoreSpec{RepositorySpec: v1alpha1.RepositorySpec{
		Storage: onVolume.Storage, ClusterName: "here", CredentialsSecretRef: corev1.LocalObjectReference{Name: "creds"}}}}))
	if err != nil {
		t.Fatal(err)
	}
	defer repo.Close(context.WithoutCancel(t.Context()))
	for where, want := range map[string]int{stores.Dir: 0, stores.ConfigDir: 1} {
		if found, err := filepath.Glob(filepath.Join(where, "*", "repository.config")); len(found) != want || err != nil {
			t.Errorf("in %s are %v (%v), want %d", where, found, err, want)
		}
	}
	write(t.Context(), t, repo, "ours")
	other(t, dir)
	if err := repo.Refresh(t.Context()); err != nil { // what the other wrote
		t.Fatal(err)
	}
	write(t.Context(), t, repo, "ours again")
}

// other runs the test's other process: the program is copied to a place that the user can read.
func other(t *testing.T, dir string) {
	t.Helper()
	from, err := os.Open("/proc/self/exe")
	if err != nil {
		t.Fatal(err)
	}
	defer from.Close()
	program := filepath.Join(dir, "test")
	to, err := os.OpenFile(program, os.O_CREATE|os.O_WRONLY, 0o755)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := io.Copy(to, from); err != nil {
		t.Fatal(err)
	}
	if err := to.Close(); err != nil {
		t.Fatal(err)
	}
	if err := os.Chmod(program, 0o755); err != nil {
		t.Fatal(err)
	}
	cmd := exec.CommandContext(t.Context(), program, "-test.run=^TestVolumeIsSharedWithMovers$")
	cmd.Dir, cmd.Env = dir, append(os.Environ(), asOther+"="+dir, "HOME="+dir, "TMPDIR="+filepath.Join(dir, "scratch"))
	cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: 1234, Gid: VolumeGroup}}
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
}
