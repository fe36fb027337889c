package framework_test

import (
	"context"
	"fmt"
	"strings"
	"testing"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/resource"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"github.com/varve-io/varve/e2e/framework"
)

func fsPod(f *framework.F, name, claim string) {
	f.T.Helper()
	f.RunPod(framework.Pod{Name: name, Claims: map[string]corev1.PersistentVolumeMode{claim: framework.Filesystem}})
}

// A file system volume is restored, cloned, read as a raw disk, and grown.
func TestFilesystems(t *testing.T) {
	t.Parallel()
	for _, c := range []struct{ fs, class, size, larger, magic, offset string }{
		{"ext4", "e2e-wffc", "64Mi", "128Mi", "53ef", "1080"},
		{"xfs", "e2e-xfs", "320Mi", "400Mi", "5846", "0"}, // "XF"
	} {
		t.Run(c.fs, func(t *testing.T) {
			t.Parallel()
			f := framework.New(t)
			f.CreateClaim(framework.Claim{Name: "data", Class: c.class, Mode: framework.Filesystem, Size: c.size})
			fsPod(f, "writer", "data")
			if got := f.Exec("writer", `awk '$2 == "/data" {print $3}' /proc/mounts`); got != c.fs {
				t.Fatalf("the volume has %s, want %s", got, c.fs)
			}
			f.Exec("writer", "head -c 300000 /dev/urandom > /data/a; sync")
			sum := f.SHA256("writer", "/data/a")
			blocks := func(pod string) (kib int64) {
				if _, err := fmt.Sscan(f.Exec(pod, "df -k /data | awk 'NR==2 {print $2}'"), &kib); err != nil {
					t.Fatal(err)
				}
				return kib
			}
			before := blocks("writer")
			snap := f.Snapshot("s", "data", "")
			f.Exec("writer", "echo later > /data/b; sync")
			f.Delete(&corev1.Pod{ObjectMeta: meta(f, "writer")})

			f.CreateClaim(framework.Claim{Name: "restored", Class: c.class, Mode: framework.Filesystem, Size: c.size, Snapshot: "s"})
			fsPod(f, "reader", "restored")
			if got := f.SHA256("reader", "/restored/a"); got != sum {
				t.Errorf("the restored file differs")
			}
			if got := f.Exec("reader", "ls /restored"); strings.Contains(got, "b") {
				t.Errorf("the snapshot has what was written later: %s", got)
			}
			f.Delete(&corev1.Pod{ObjectMeta: meta(f, "reader")})

			f.CreateClaim(framework.Claim{Name: "clone", Class: c.class, Mode: framework.Filesystem, Size: c.size, Volume: "data"})
			fsPod(f, "cloned", "clone")
			if got := f.Exec("cloned", "cat /clone/b"); got != "later" {
				t.Errorf("the clone has %q", got)
			}
			f.Delete(&corev1.Pod{ObjectMeta: meta(f, "cloned")})

			f.AllowModeChange(snap)
			f.CreateClaim(framework.Claim{Name: "raw", Mode: framework.Block, Size: c.size, Snapshot: "s"})
			f.RunPod(framework.Pod{Name: "rawreader", Claims: map[string]corev1.PersistentVolumeMode{"raw": framework.Block}})
			if got := f.Exec("rawreader", "dd if=/dev/raw bs=1 skip="+c.offset+` count=2 2>/dev/null | hexdump -e '2/1 "%02x"'`); got != c.magic {
				t.Errorf("the raw disk has magic %s, want %s", got, c.magic)
			}

			grow(f, "data", c.larger)
			fsPod(f, "grown", "data")
			var pvc corev1.PersistentVolumeClaim
			f.Eventually("the claim's new size", func(ctx context.Context) error {
				if err := f.Client.Get(ctx, f.Key("data"), &pvc); err != nil {
					return err
				}
				if got := pvc.Status.Capacity[corev1.ResourceStorage]; got.Cmp(resource.MustParse(c.larger)) != 0 {
					return fmt.Errorf("it is %s", got.String())
				}
				return nil
			})
			if got := f.SHA256("grown", "/data/a"); got != sum {
				t.Errorf("the file differs after growing")
			}
			want, had := resource.MustParse(c.larger), resource.MustParse(c.size)
			if got, least := blocks("grown")-before, (want.Value()-had.Value())>>10*9/10; got < least {
				t.Errorf("the file system grew by %d KiB, want at least %d", got, least)
			}
		})
	}
}

func grow(f *framework.F, claim, size string) {
	f.T.Helper()
	var pvc corev1.PersistentVolumeClaim
	if err := f.Client.Get(f.T.Context(), f.Key(claim), &pvc); err != nil {
		f.T.Fatal(err)
	}
	old := pvc.DeepCopy()
	pvc.Spec.Resources.Requests[corev1.ResourceStorage] = resource.MustParse(size)
	if err := f.Client.Patch(f.T.Context(), &pvc, client.MergeFrom(old)); err != nil {
		f.T.Fatal(err)
	}
	// The volume grows while no pod has it, the file system when the next pod gets it.
	f.Eventually("the volume to grow", func(ctx context.Context) error {
		var pv corev1.PersistentVolume
		if err := f.Client.Get(ctx, client.ObjectKey{Name: pvc.Spec.VolumeName}, &pv); err != nil {
			return err
		}
		if got := pv.Spec.Capacity[corev1.ResourceStorage]; got.Cmp(resource.MustParse(size)) != 0 {
			return fmt.Errorf("it has %s", got.String())
		}
		return nil
	})
}

// Members of a group snapshot are of one moment: a counter written to two volumes in
// turn is never further on the second.
func TestGroupSnapshot(t *testing.T) {
	t.Parallel()
	f := framework.New(t)
	both := map[string]corev1.PersistentVolumeMode{"one": framework.Filesystem, "two": framework.Filesystem}
	for name := range both {
		pvc := f.CreateClaim(framework.Claim{Name: name, Mode: framework.Filesystem, Size: "32Mi"})
		old := pvc.DeepCopy()
		pvc.Labels = map[string]string{"group": "g"}
		if err := f.Client.Patch(t.Context(), pvc, client.MergeFrom(old)); err != nil {
			t.Fatal(err)
		}
	}
	f.RunPod(framework.Pod{Name: "writer", Claims: both})
	f.Exec("writer", `(i=0; while :; do i=$((i+1)); echo $i > /one/n.new; sync; mv /one/n.new /one/n; sync; echo $i > /two/n.new; sync; mv /two/n.new /two/n; sync; done) >/dev/null 2>&1 &
while [ ! -s /two/n ]; do usleep 1000; done`)
	f.GroupSnapshot("g", "e2e", map[string]string{"group": "g"})
	for _, name := range []string{"one", "two"} {
		snap := f.GroupMember("g", name)
		f.CreateClaim(framework.Claim{Name: "r-" + name, Mode: framework.Filesystem, Size: "32Mi", Snapshot: snap})
	}
	f.RunPod(framework.Pod{Name: "reader", Claims: map[string]corev1.PersistentVolumeMode{"r-one": framework.Filesystem, "r-two": framework.Filesystem}})
	var one, two int
	if _, err := fmt.Sscan(f.Exec("reader", "cat /r-one/n /r-two/n"), &one, &two); err != nil {
		t.Fatal(err)
	}
	if two > one || one > two+1 {
		t.Fatalf("volume one was at %d when two was at %d", one, two)
	}
}
