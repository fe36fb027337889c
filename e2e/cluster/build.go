package cluster

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"time"
)

// component is a binary of the components module.
type component struct {
	name, pkg string
	// version is set with these -X variables; %s stands for the version of module.
	module string
	xflags []string
}

const kubeVersion = "k8s.io/component-base/version"

func kube(name string) component {
	return component{name: name, pkg: "k8s.io/kubernetes/cmd/" + name, module: "k8s.io/kubernetes", xflags: []string{
		kubeVersion + ".gitVersion=%s", kubeVersion + ".gitTreeState=clean", kubeVersion + ".gitCommit=module",
		kubeVersion + ".gitMajor=1", kubeVersion + ".gitMinor=" + kubeMinor}}
}

// kubeMinor is what version negotiation in the control plane reads; it must agree
// with the module's version.
const kubeMinor = "36"

func sidecar(name, module string) component {
	return component{name: name, pkg: module + "/cmd/" + name, module: module, xflags: []string{"main.version=%s"}}
}

func containerd(name string) component {
	const m = "github.com/containerd/containerd/v2"
	return component{name: name, pkg: m + "/cmd/" + name, module: m, xflags: []string{m + "/version.Version=%s"}}
}

const (
	snapshotterModule = "github.com/kubernetes-csi/external-snapshotter/v8"
	provisionerModule = "github.com/kubernetes-csi/external-provisioner/v6"
	resizerModule     = "github.com/kubernetes-csi/external-resizer/v2"
	attacherModule    = "github.com/kubernetes-csi/external-attacher/v4"
	metadataModule    = "github.com/kubernetes-csi/external-snapshot-metadata"
)

// components in an order that shows the progress of a cold build well.
var components = []component{
	{name: "etcd", pkg: "go.etcd.io/etcd/server/v3"},
	kube("kube-apiserver"), kube("kube-controller-manager"), kube("kube-scheduler"), kube("kubelet"), kube("kube-proxy"), kube("kubectl"),
	containerd("containerd"), containerd("containerd-shim-runc-v2"), containerd("ctr"),
	{name: "coredns", pkg: "./cmd/coredns"},
	sidecar("csi-provisioner", provisionerModule), sidecar("csi-attacher", attacherModule), sidecar("csi-resizer", resizerModule),
	sidecar("csi-snapshotter", snapshotterModule), sidecar("snapshot-controller", snapshotterModule),
	sidecar("csi-snapshot-metadata", metadataModule),
	{name: "versitygw", pkg: "github.com/versity/versitygw/cmd/versitygw"},
}

// upstreamManifests are taken from the modules beside the binaries, so that the sidecars
// have the definitions and the rights that upstream ships.
var upstreamManifests = []struct{ module, glob, prefix string }{
	{snapshotterModule[:len(snapshotterModule)-len("/v8")] + "/client/v8", "config/crd/*.yaml", "crd-"},
	{metadataModule + "/client", "config/crd/*.yaml", "crd-"},
	{provisionerModule, "deploy/kubernetes/rbac.yaml", "rbac-provisioner-"},
	{attacherModule, "deploy/kubernetes/rbac.yaml", "rbac-attacher-"},
	{resizerModule, "deploy/kubernetes/rbac.yaml", "rbac-resizer-"},
	{snapshotterModule, "deploy/kubernetes/csi-snapshotter/rbac-csi-snapshotter.yaml", ""},
	{snapshotterModule, "deploy/kubernetes/snapshot-controller/rbac-snapshot-controller.yaml", ""},
	{metadataModule, "deploy/snapshot-metadata-cluster-role.yaml", "rbac-"},
	{metadataModule, "deploy/snapshot-metadata-client-cluster-role.yaml", "rbac-"},
}

// buildTags begin with those of the Makefile, and the compiler's flags are its too: libraries that Varve has in the same
// version are compiled once for both.
const (
	buildTags     = "timetzdata,disable_grpc_modules,no_btrfs,no_aufs,no_devmapper,no_zfs"
	compilerFlags = "all=-dwarf=false"
)

// Builder makes the cluster's binaries from the e2e module's sources.
type Builder struct {
	// Source is the e2e module's directory.
	Source string
	Log    *slog.Logger
}

// FindSource returns the e2e module's directory, searched from the working directory up.
func FindSource() (string, error) {
	wd, err := os.Getwd()
	if err != nil {
		return "", err
	}
	for d := wd; ; d = filepath.Dir(d) {
		for _, c := range []string{d, filepath.Join(d, "e2e")} {
			if _, err := os.Stat(filepath.Join(c, "cluster", "components", "go.mod")); err == nil {
				return c, nil
			}
		}
		if d == filepath.Dir(d) {
			return "", fmt.Errorf("no e2e module at or above %s", wd)
		}
	}
}

// Dir returns the directory for this version of the components. Its name depends on
// everything that a build depends on.
func (b Builder) Dir() (string, error) {
	cache, err := CacheDir()
	if err != nil {
		return "", err
	}
	h := sha256.New() // writing to it never fails
	_, _ = fmt.Fprintln(h, runtime.Version(), runtime.GOARCH, buildTags, compilerFlags, components, upstreamManifests)
	root := filepath.Join(b.Source, "cluster", "components")
	err = filepath.WalkDir(root, func(p string, e fs.DirEntry, err error) error {
		if err != nil || e.IsDir() {
			return err
		}
		f, err := os.Open(p)
		if err != nil {
			return err
		}
		defer func() { _ = f.Close() }()
		_, _ = fmt.Fprintln(h, strings.TrimPrefix(p, root))
		_, err = io.Copy(h, f)
		return err
	})
	return filepath.Join(cache, "components-"+hex.EncodeToString(h.Sum(nil))[:12]), err
}

// Warm reports whether the components of this version are built already.
func (b Builder) Warm() (bool, error) {
	dir, err := b.Dir()
	if err != nil {
		return false, err
	}
	_, err = os.Stat(filepath.Join(dir, "complete"))
	return err == nil, nil
}

// Build makes what is missing and returns the directory of the binaries. The project's
// own are built every time; Go's cache makes that quick.
func (b Builder) Build(ctx context.Context) (string, error) {
	dir, err := b.Dir()
	if err != nil {
		return "", err
	}
	bin := filepath.Join(dir, "bin")
	warm, err := b.Warm()
	if err != nil {
		return "", err
	}
	if !warm {
		if err := b.buildComponents(ctx, dir); err != nil {
			return "", err
		}
	}
	for name, pkg := range map[string]string{"e2e-cluster": "./cluster/cmd/e2e-cluster", "pause": "./cluster/cmd/pause", "e2ecsi": "./csidriver/cmd/e2ecsi"} {
		if err := b.goBuild(ctx, b.Source, filepath.Join(bin, name), pkg, ""); err != nil {
			return "", err
		}
	}
	return bin, b.buildImages(ctx, bin)
}

func (b Builder) buildComponents(ctx context.Context, dir string) error {
	if err := os.MkdirAll(filepath.Join(dir, "bin"), 0o755); err != nil {
		return err
	}
	src := filepath.Join(b.Source, "cluster", "components")
	b.Log.Info("building the cluster's components; the first time takes about ten minutes on two cores", "into", dir)
	if _, err := goCommand(ctx, src, "mod", "download"); err != nil {
		return err
	}
	for _, c := range components {
		ld := ""
		if c.module != "" {
			v, err := goCommand(ctx, src, "list", "-m", "-f", "{{.Version}}", c.module)
			if err != nil {
				return err
			}
			for _, x := range c.xflags {
				ld += " -X " + strings.ReplaceAll(x, "%s", v)
			}
		}
		start := time.Now()
		if err := b.goBuild(ctx, src, filepath.Join(dir, "bin", c.name), c.pkg, ld); err != nil {
			return err
		}
		b.Log.Info("built", "component", c.name, "took", time.Since(start).Round(100*time.Millisecond))
	}
	if err := b.copyManifests(ctx, src, filepath.Join(dir, "manifests")); err != nil {
		return err
	}
	return os.WriteFile(filepath.Join(dir, "complete"), nil, 0o644)
}

func (b Builder) copyManifests(ctx context.Context, src, to string) error {
	if err := os.MkdirAll(to, 0o755); err != nil {
		return err
	}
	for _, m := range upstreamManifests {
		dir, err := goCommand(ctx, src, "list", "-m", "-f", "{{.Dir}}", m.module)
		if err != nil {
			return err
		}
		files, err := filepath.Glob(filepath.Join(dir, m.glob))
		if err != nil {
			return err
		}
		if len(files) == 0 {
			return fmt.Errorf("module %s has no %s", m.module, m.glob)
		}
		for _, f := range files {
			if filepath.Base(f) == "kustomization.yaml" {
				continue
			}
			text, err := os.ReadFile(f)
			if err != nil {
				return err
			}
			if err := os.WriteFile(filepath.Join(to, m.prefix+filepath.Base(f)), text, 0o644); err != nil {
				return err
			}
		}
	}
	return nil
}

func (b Builder) goBuild(ctx context.Context, dir, out, pkg, ldflags string) error {
	_, err := goCommand(ctx, dir, "build", "-trimpath", "-buildvcs=false", "-tags", buildTags, "-gcflags", compilerFlags,
		"-ldflags", "-s -w"+ldflags, "-o", out, pkg)
	return err
}

// goCommand runs go at the lowest priority: a cold build is long and other work runs beside it.
func goCommand(ctx context.Context, dir string, args ...string) (string, error) {
	cmd := exec.CommandContext(ctx, "nice", append([]string{"-n", "19", "go"}, args...)...)
	cmd.Dir = dir
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0", "GOFLAGS=", "GOWORK=off")
	out, err := cmd.Output()
	if err != nil {
		var exit *exec.ExitError
		if errors.As(err, &exit) {
			return "", fmt.Errorf("go %s: %w\n%s", strings.Join(args, " "), err, exit.Stderr)
		}
		return "", fmt.Errorf("go %s: %w", strings.Join(args, " "), err)
	}
	return strings.TrimSpace(string(out)), nil
}
