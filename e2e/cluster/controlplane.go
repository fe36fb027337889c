package cluster

import (
	"context"
	"errors"
	"fmt"
	"os"

	"github.com/varve-io/varve/e2e/cluster/supervisor"
)

// users are the clients of the API server that get a certificate and a kubeconfig:
// file name -> user name and groups.
var users = map[string][]string{
	"admin":              {"admin", "system:masters"},
	"controller-manager": {"system:kube-controller-manager"},
	"scheduler":          {"system:kube-scheduler"},
	"kube-proxy":         {"system:kube-proxy"},
	"coredns":            {"e2e-coredns"},
}

// sidecarAccounts are the service accounts that the sidecars run as. They run as
// processes, not pods, so a certificate replaces the account's token.
var sidecarAccounts = []string{"csi-provisioner", "csi-attacher", "csi-resizer", "csi-snapshotter", "snapshot-controller", "csi-snapshot-metadata"}

func (c *Cluster) makeCertificates() error {
	a, err := newAuthority(c.Path("pki"))
	if err != nil {
		return err
	}
	ip := c.Control().IP()
	errs := []error{
		a.tokenKeys(),
		a.server("apiserver", "localhost", "kubernetes", "kubernetes.default", "kubernetes.default.svc",
			"kubernetes.default.svc.cluster.local", "127.0.0.1", ip, serviceIP),
		a.client("apiserver-kubelet", "apiserver-kubelet", "system:masters"),
		a.client("front-proxy", "front-proxy"),
		a.server("snapshot-metadata", "localhost", "127.0.0.1", ip),
	}
	for file, u := range users {
		errs = append(errs, a.client(file, u[0], u[1:]...), c.kubeconfig(file))
	}
	for _, s := range sidecarAccounts {
		errs = append(errs, a.client(s, "system:serviceaccount:"+SystemNamespace+":"+s,
			"system:serviceaccounts", "system:serviceaccounts:"+SystemNamespace), c.kubeconfig(s))
	}
	return errors.Join(errs...)
}

func (c *Cluster) apiServer() supervisor.Process {
	pki := c.Path("pki")
	return supervisor.Process{Name: "kube-apiserver", Argv: []string{"kube-apiserver",
		"--etcd-servers=http://127.0.0.1:2379", "--secure-port=6443", "--bind-address=0.0.0.0",
		"--advertise-address=" + c.Control().IP(), "--service-cluster-ip-range=" + serviceCIDR,
		"--tls-cert-file=" + pki + "/apiserver.crt", "--tls-private-key-file=" + pki + "/apiserver.key",
		"--client-ca-file=" + pki + "/ca.crt",
		"--kubelet-client-certificate=" + pki + "/apiserver-kubelet.crt", "--kubelet-client-key=" + pki + "/apiserver-kubelet.key",
		"--kubelet-certificate-authority=" + pki + "/ca.crt", "--kubelet-preferred-address-types=InternalIP",
		"--service-account-key-file=" + pki + "/sa.pub", "--service-account-signing-key-file=" + pki + "/sa.key",
		"--service-account-issuer=https://kubernetes.default.svc.cluster.local",
		"--requestheader-client-ca-file=" + pki + "/ca.crt", "--requestheader-allowed-names=front-proxy",
		"--requestheader-username-headers=X-Remote-User", "--requestheader-group-headers=X-Remote-Group",
		"--requestheader-extra-headers-prefix=X-Remote-Extra-",
		"--proxy-client-cert-file=" + pki + "/front-proxy.crt", "--proxy-client-key-file=" + pki + "/front-proxy.key",
		"--authorization-mode=Node,RBAC", "--allow-privileged=true"}}
}

func (c *Cluster) startControlPlane(ctx context.Context) error {
	n := c.Control()
	pki := c.Path("pki")
	if err := c.run(ctx, n, supervisor.Process{Name: "etcd", Argv: []string{"etcd", "--name", "e2e", "--data-dir", c.NodePath(n, "etcd"),
		"--unsafe-no-fsync", "--log-level", "warn",
		"--listen-client-urls", "http://127.0.0.1:2379", "--advertise-client-urls", "http://127.0.0.1:2379",
		"--listen-peer-urls", "http://127.0.0.1:2380", "--initial-advertise-peer-urls", "http://127.0.0.1:2380",
		"--initial-cluster", "e2e=http://127.0.0.1:2380"}}); err != nil {
		return err
	}
	if err := c.StartAPIServer(ctx); err != nil {
		return err
	}
	kubeconfigs := func(user string) []string {
		f := c.Path(user + ".kubeconfig")
		return []string{"--kubeconfig=" + f, "--authentication-kubeconfig=" + f, "--authorization-kubeconfig=" + f,
			"--leader-elect=false", "--bind-address=127.0.0.1", "--profiling=false"}
	}
	if err := renderTo(c.Path("Corefile"), "Corefile", map[string]string{"ControlIP": n.IP(), "Run": c.Run}); err != nil {
		return err
	}
	for _, p := range []supervisor.Process{
		{Name: "kube-controller-manager", Argv: append([]string{"kube-controller-manager"}, append(kubeconfigs("controller-manager"),
			"--service-account-private-key-file="+pki+"/sa.key", "--root-ca-file="+pki+"/ca.crt",
			"--cluster-signing-cert-file="+pki+"/ca.crt", "--cluster-signing-key-file="+pki+"/ca.key",
			"--use-service-account-credentials=true", "--controllers=*",
			// A lost node is noticed, and its pods are evicted, within seconds.
			"--node-monitor-period=1s", "--node-monitor-grace-period=20s")...), Restart: true},
		{Name: "kube-scheduler", Argv: append([]string{"kube-scheduler"}, kubeconfigs("scheduler")...), Restart: true},
		{Name: "coredns", Argv: []string{"coredns", "-conf", c.Path("Corefile")}, Restart: true},
	} {
		if err := c.run(ctx, n, p); err != nil {
			return err
		}
	}
	return nil
}

// StartAPIServer starts the API server and waits until it is ready.
func (c *Cluster) StartAPIServer(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, startTimeout)
	defer cancel()
	if err := c.run(ctx, c.Control(), c.apiServer()); err != nil {
		return err
	}
	return until(ctx, "the API server", func(ctx context.Context) error {
		out, err := c.Kubectl(ctx, nil, "get", "--raw", "/readyz", "--request-timeout=2s")
		if err == nil && out != "ok" {
			err = fmt.Errorf("it says %q", out)
		}
		return err
	})
}

// startSnapshotController starts the controller that all drivers share.
func (c *Cluster) startSnapshotController(ctx context.Context) error {
	return c.run(ctx, c.Control(), supervisor.Process{Name: "snapshot-controller", Restart: true, Argv: []string{"snapshot-controller",
		"--kubeconfig", c.Path("snapshot-controller.kubeconfig"), "--leader-election=false", "--http-endpoint=",
		"--feature-gates=CSIVolumeGroupSnapshot=true", "--v=2"}})
}

func (c *Cluster) installManifests(ctx context.Context) error {
	system, err := render("system.yaml", map[string]string{"Namespace": SystemNamespace})
	if err != nil {
		return err
	}
	if err := c.Apply(ctx, system); err != nil {
		return err
	}
	crds, rest, err := c.upstream()
	if err != nil {
		return err
	}
	if err := c.Apply(ctx, crds); err != nil {
		return err
	}
	if _, err := c.Kubectl(ctx, nil, "wait", "--for=condition=Established", "--timeout=60s", "crd", "--all"); err != nil {
		return err
	}
	return c.Apply(ctx, rest)
}

func readFile(path string) (string, error) {
	b, err := os.ReadFile(path)
	return string(b), err
}
