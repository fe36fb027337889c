package main

import (
	"context"
	"os"
	"time"

	"github.com/go-logr/logr"
	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"
	corev1 "k8s.io/api/core/v1"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/clientcmd"
	ctrllog "sigs.k8s.io/controller-runtime/pkg/log"
	"sigs.k8s.io/yaml"

	"github.com/varve-io/varve/backup/repository"
	"github.com/varve-io/varve/internal/bytesize"
	"github.com/varve-io/varve/populator"
	"github.com/varve-io/varve/populator/mover"
	"github.com/varve-io/varve/populator/store"
)

type controllerFlags struct {
	kubeconfig      string
	namespace       string
	podFile         string
	verifyUnchanged string
	opt             populator.Options
	pull            string
	pullSecrets     []string
	memory          bytesize.Value
}

func newControllerCommand(a *app) *cobra.Command {
	var f controllerFlags
	cmd := &cobra.Command{
		Use:     "controller",
		GroupID: groupKubernetes,
		Short:   "Back up and restore claims in Kubernetes",
		Long: `Back up and restore claims in Kubernetes: the controller of the objects of group
varve.io (docs/kubernetes.md). It runs in a pod of the cluster, as the manifests
and the chart in deploy/ set it up.`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error { return a.controller(cmd.Context(), f) },
	}
	fl := cmd.Flags()
	fl.StringVar(&f.kubeconfig, "kubeconfig", "", "client configuration file (default the pod's service account)")
	fl.StringVar(&f.namespace, "namespace", "", "namespace of Varve, where movers run (default the pod's)")
	fl.StringVar(&f.opt.Pods.Image, "image", "", "image of movers: the controller's own")
	fl.StringVar(&f.pull, "image-pull-policy", "", "how movers' image is pulled: Always, IfNotPresent or Never")
	fl.StringSliceVar(&f.pullSecrets, "image-pull-secret", nil, "Secret to pull movers' image with; repeatable")
	fl.StringVar(&f.opt.Pods.ServiceAccount, "mover-service-account", "varve-mover", "service account of movers whose store names none")
	fl.BoolVar(&f.opt.Pods.NonRoot, "mover-non-root", false, "run movers as user 65532; the container runtime must give block devices to the pod's user")
	fl.StringVar(&f.podFile, "mover-pod", "", "YAML file with resources, tolerations, nodeSelector and priorityClassName of movers")
	fl.IntVar(&f.opt.Movers, "movers", 16, "maximum number of movers, 0 for the limits of the stores only")
	fl.IntVar(&f.opt.Workers, "workers", 8, "objects of each kind worked on at once")
	fl.StringVar(&f.verifyUnchanged, "verify-unchanged", "0.1%", "share of the blocks reported unchanged to read and compare in each increment")
	fl.DurationVar(&f.opt.MaintainEvery, "maintain-every", 6*time.Hour, "time between two maintenance Jobs of a repository, 0 for none")
	fl.StringVar(&f.opt.Dir, "scratch", "", "directory for connections' caches (default the system's temporary one)")
	fl.StringVar(&f.opt.ConfigDir, "connections", "", "directory for connections' configuration with the credentials in it, best in memory (default that of --scratch)")
	fl.StringVar(&f.opt.VolumesDir, "store-volumes", "/var/run/varve/volumes", "directory with the claims that stores keep repositories on, each under its name")
	fl.StringVar(&f.opt.MetricsAddress, "metrics", ":8443", "serve Prometheus metrics on this address, 0 for none")
	fl.BoolVar(&f.opt.MetricsInsecure, "metrics-insecure", false, "serve metrics over plain HTTP to all, not over HTTPS to those that may get /metrics")
	fl.StringVar(&f.opt.MetricsCertDir, "metrics-cert-dir", "", "directory with tls.crt and tls.key for metrics (default a self-signed certificate)")
	fl.StringVar(&f.opt.HealthAddress, "health", ":8081", "serve /healthz and /readyz on this address, 0 for none")
	fl.BoolVar(&f.opt.LeaderElection, "leader-election", true, "work only while holding the Lease varve-controller")
	fl.Var(&f.memory, "memory-limit", "memory limit of the container (default as the kernel reports it)")
	// As a Deployment names them: VARVE_NAMESPACE, VARVE_IMAGE, VARVE_MEMORY_LIMIT.
	inSection(fl, "", "namespace", "image", "memory-limit")
	return cmd
}

// podDefaults is the content of the --mover-pod file.
type podDefaults struct {
	Resources         corev1.ResourceRequirements `json:"resources"`
	Tolerations       []corev1.Toleration         `json:"tolerations"`
	NodeSelector      map[string]string           `json:"nodeSelector"`
	PriorityClassName string                      `json:"priorityClassName"`
}

func (f *controllerFlags) pods() (mover.Pods, error) {
	p := f.opt.Pods
	p.Namespace = f.namespace
	if p.Namespace == "" {
		b, err := os.ReadFile("/var/run/secrets/kubernetes.io/serviceaccount/namespace")
		if err != nil {
			return p, usagef("--namespace is needed outside of a pod")
		}
		p.Namespace = string(b)
	}
	if p.Image == "" {
		return p, usagef("--image is needed: movers run it")
	}
	switch p.PullPolicy = corev1.PullPolicy(f.pull); p.PullPolicy {
	case "", corev1.PullAlways, corev1.PullIfNotPresent, corev1.PullNever:
	default:
		return p, usagef("--image-pull-policy is Always, IfNotPresent or Never, not %q", f.pull)
	}
	p.Proxy, p.NoProxy = os.Getenv("HTTPS_PROXY"), os.Getenv("NO_PROXY")
	for _, name := range f.pullSecrets {
		p.PullSecrets = append(p.PullSecrets, corev1.LocalObjectReference{Name: name})
	}
	if f.podFile != "" {
		text, err := os.ReadFile(f.podFile)
		if err != nil {
			return p, usagef("--mover-pod: %w", err)
		}
		var d podDefaults
		if err := yaml.UnmarshalStrict(text, &d); err != nil {
			return p, usagef("--mover-pod %s: %w", f.podFile, err)
		}
		p.Resources, p.Tolerations, p.NodeSelector, p.PriorityClass = d.Resources, d.Tolerations, d.NodeSelector, d.PriorityClassName
	}
	return p, nil
}

func (a *app) controller(ctx context.Context, f controllerFlags) error {
	opt := f.opt
	err := repository.GuardTransport()
	if err != nil {
		return err
	}
	if opt.Pods, err = f.pods(); err != nil {
		return err
	}
	if opt.VerifyUnchanged, err = parseShare(f.verifyUnchanged); err != nil {
		return usagef("--verify-unchanged: %w", err)
	}
	if opt.Workers < 1 {
		return usagef("--workers must be positive")
	}
	opt.Version = readVersion().Version
	a.boundMemory(int64(f.memory))
	unix.Umask(store.VolumeUmask)
	var cfg *rest.Config
	if f.kubeconfig != "" {
		cfg, err = clientcmd.BuildConfigFromFlags("", f.kubeconfig)
	} else {
		cfg, err = rest.InClusterConfig()
	}
	if err != nil {
		return usagef("cannot find the cluster: %w", err)
	}
	cfg.QPS, cfg.Burst = 50, 100
	cfg.UserAgent = "varve-controller/" + opt.Version
	ctrllog.SetLogger(logr.FromSlogHandler(a.log.Handler()))
	opt.Log = a.log
	mgr, err := populator.New(cfg, opt)
	if err != nil {
		return err
	}
	return mgr.Start(ctx)
}
