package populate_test

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"io"
	"os"
	"os/exec"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes"
	"sigs.k8s.io/controller-runtime/pkg/client"
)

func shell(ctx context.Context, script string, args ...string) (string, error) {
	out, err := exec.CommandContext(ctx, "bash", append([]string{"-euc", script, "sh"}, args...)...).CombinedOutput()

	return string(out), err
}

// eventSink writes events through a clientset, whatever their namespace.
type eventSink struct{ cs kubernetes.Interface }

func (s eventSink) Create(e *corev1.Event) (*corev1.Event, error) {
	return s.cs.CoreV1().Events(e.Namespace).Create(context.Background(), e, metav1.CreateOptions{})
}

func (s eventSink) Update(e *corev1.Event) (*corev1.Event, error) {
	return s.cs.CoreV1().Events(e.Namespace).Update(context.Background(), e, metav1.UpdateOptions{})
}

func (s eventSink) Patch(old *corev1.Event, data []byte) (*corev1.Event, error) {
	return s.cs.CoreV1().Events(old.Namespace).Patch(context.Background(), old.Name, "application/strategic-merge-patch+json", data, metav1.PatchOptions{})
}

// names of a list's objects.
func names(l client.ObjectList) ([]string, error) {
	items, err := meta.ExtractList(l)
	if err != nil {
		return nil, err
	}
	var out []string
	for _, i := range items {
		o, err := meta.Accessor(i)
		if err != nil {
			return nil, err
		}
		out = append(out, fmt.Sprintf("%T %s", i, o.GetName()))
	}

	return out, nil
}

// sha256File is the hash of so many bytes of a file, in hex; all of them if n is 0.
func sha256File(path string, n int64) (string, error) {
	f, err := os.Open(path)
	if err != nil {
		return "", err
	}
	defer f.Close()
	var r io.Reader = f
	if n > 0 {
		r = io.LimitReader(f, n)
	}
	h := sha256.New()
	if _, err := io.Copy(h, r); err != nil {
		return "", err
	}

	return hex.EncodeToString(h.Sum(nil)), nil
}
