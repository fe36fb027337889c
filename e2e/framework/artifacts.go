package framework

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"time"

	corev1 "k8s.io/api/core/v1"
	"sigs.k8s.io/controller-runtime/pkg/client"
)

// collect keeps the evidence of a failed test: every object but Secrets, events and
// pod logs of its namespace, the cluster's storage objects, and the logs of all the
// cluster's processes. It goes below $VARVE_E2E_ARTIFACTS, else artifacts in the
// package's directory.
func (f *F) collect() {
	root := os.Getenv("VARVE_E2E_ARTIFACTS")
	if root == "" {
		root = "artifacts"
	}
	dir := filepath.Join(root, f.Namespace)
	if err := f.Collect(dir); err != nil {
		f.T.Logf("collect evidence: %v", err)
	}
	if abs, err := filepath.Abs(dir); err == nil {
		f.T.Logf("evidence is in %s", abs)
	}
}

// Collect writes the evidence into dir. What is unavailable is left out and named in the
// error.
func (f *F) Collect(dir string) error {
	// The test may have ended because of its context.
	ctx, cancel := context.WithTimeout(context.Background(), 2*time.Minute)
	defer cancel()
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return err
	}
	var errs []error
	save := func(name string, args ...string) {
		out, err := f.Cluster.Kubectl(ctx, nil, args...)
		errs = append(errs, err)
		if out != "" {
			errs = append(errs, os.WriteFile(filepath.Join(dir, name), []byte(out+"\n"), 0o644))
		}
	}
	kinds, err := f.Cluster.Kubectl(ctx, nil, "api-resources", "--namespaced", "--verbs=list", "-o", "name")
	errs = append(errs, err)
	for kind := range strings.FieldsSeq(kinds) {
		if kind == "secrets" || strings.HasPrefix(kind, "events") {
			continue
		}
		if names, err := f.Cluster.Kubectl(ctx, nil, "get", kind, "-n", f.Namespace, "-o", "name"); err == nil && names != "" {
			save(kind+".yaml", "get", kind, "-n", f.Namespace, "-o", "yaml")
		}
	}
	save("events.txt", "get", "events", "-n", f.Namespace, "--sort-by=.lastTimestamp", "-o", "wide")
	save("storage.yaml", "get", "nodes,pv,storageclasses,csidrivers,csinodes,volumeattachments,volumesnapshotcontents,volumesnapshotclasses,snapshotmetadataservices", "-o", "yaml")
	var pods corev1.PodList
	errs = append(errs, f.Client.List(ctx, &pods, client.InNamespace(f.Namespace)))
	for _, p := range pods.Items {
		for _, c := range append(p.Spec.InitContainers, p.Spec.Containers...) {
			save(fmt.Sprintf("%s.%s.log", p.Name, c.Name), "logs", "-n", f.Namespace, p.Name, "-c", c.Name)
			for _, s := range p.Status.ContainerStatuses {
				if s.Name == c.Name && s.RestartCount > 0 {
					save(fmt.Sprintf("%s.%s.previous.log", p.Name, c.Name), "logs", "--previous", "-n", f.Namespace, p.Name, "-c", c.Name)
				}
			}
		}
	}
	for _, n := range f.Cluster.Nodes {
		errs = append(errs, copyTree(filepath.Dir(f.Cluster.Log(n, "kubelet")), filepath.Join(dir, n.Name)))
	}
	return errors.Join(errs...)
}

func copyTree(from, to string) error {
	return filepath.WalkDir(from, func(p string, e fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		rel, err := filepath.Rel(from, p)
		if err != nil {
			return err
		}
		if e.IsDir() {
			return os.MkdirAll(filepath.Join(to, rel), 0o755)
		}
		b, err := os.ReadFile(p)
		if err != nil {
			return err
		}
		return os.WriteFile(filepath.Join(to, rel), b, 0o644)
	})
}
