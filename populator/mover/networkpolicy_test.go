package mover

import (
	"net/netip"
	"os"
	"slices"
	"strings"
	"testing"

	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	networkingv1 "k8s.io/api/networking/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/labels"
	"sigs.k8s.io/yaml"

	"github.com/varve-io/varve/populator/store"
)

// shipped are the network policies and the controller of the plain manifests, which are the
// chart with its defaults.
func shipped(t *testing.T) (policies []networkingv1.NetworkPolicy, controller labels.Set) {
	t.Helper()
	text, err := os.ReadFile("../../deploy/varve.yaml")
	if err != nil {
		t.Fatal(err)
	}
	for _, doc := range strings.Split(string(text), "\n---\n") {
		var p networkingv1.NetworkPolicy
		var d appsv1.Deployment
		switch {
		case strings.Contains(doc, "\nkind: NetworkPolicy\n"):
			err = yaml.UnmarshalStrict([]byte(doc), &p)
			policies = append(policies, p)
		case strings.Contains(doc, "\nkind: Deployment\n"):
			err = yaml.UnmarshalStrict([]byte(doc), &d)
			controller = d.Spec.Template.Labels
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	if len(policies) == 0 || len(controller) == 0 {
		t.Fatalf("%d policies, controller %v", len(policies), controller)
	}
	return policies, controller
}

// connects reports whether policies let a pod connect to an address outside the cluster, or, if
// to is no address, to a pod of any namespace. As Kubernetes documents them, a pod that no
// egress policy selects may connect anywhere, and others where any rule allows it.
func connects(t *testing.T, policies []networkingv1.NetworkPolicy, pod labels.Set, to netip.AddrPort) bool {
	t.Helper()
	isolated := false
	for _, p := range policies {
		selector, err := metav1.LabelSelectorAsSelector(&p.Spec.PodSelector)
		if err != nil {
			t.Fatal(err)
		}
		if !selector.Matches(pod) || !slices.Contains(p.Spec.PolicyTypes, networkingv1.PolicyTypeEgress) {
			continue
		}
		isolated = true
		for _, rule := range p.Spec.Egress {
			port := len(rule.Ports) == 0 || slices.ContainsFunc(rule.Ports, func(p networkingv1.NetworkPolicyPort) bool { return p.Port.IntValue() == int(to.Port()) })
			peer := len(rule.To) == 0 || slices.ContainsFunc(rule.To, func(peer networkingv1.NetworkPolicyPeer) bool {
				if peer.IPBlock == nil {
					return !to.Addr().IsValid() && len(peer.NamespaceSelector.MatchLabels)+len(peer.NamespaceSelector.MatchExpressions) == 0 && peer.PodSelector == nil
				}
				return netip.MustParsePrefix(peer.IPBlock.CIDR).Contains(to.Addr()) &&
					!slices.ContainsFunc(peer.IPBlock.Except, func(e string) bool { return netip.MustParsePrefix(e).Contains(to.Addr()) })
			})
			if port && peer {
				return true
			}
		}
	}
	return !isolated
}

// A store may be anywhere. Only pods that may use the cloud's identity reach the metadata
// service: without it, stores without keys stop working.
func TestNetworkPoliciesOfMovers(t *testing.T) {
	policies, controller := shipped(t)
	pod := func(tenant bool) labels.Set {
		job, err := Pods{Namespace: "varve-system"}.Build(Job{Name: "x", Labels: RunLabels("backup", "uid"), Task: Task{Action: ActionMaintain, Store: store.Settings{Tenant: tenant}}})
		if err != nil {
			t.Fatal(err)
		}
		return job.Spec.Template.Labels
	}
	pods := map[string]labels.Set{"the controller": controller, "a BackupStore's mover": pod(false), "a Repository's mover": pod(true)}
	to := func(addresses ...string) (out []netip.AddrPort) {
		for _, a := range addresses {
			out = append(out, netip.MustParseAddrPort(a))
		}
		return out
	}
	everywhere := append(to("52.216.1.1:443", "[2600:1fa0::1]:443", "10.20.30.40:9000", "192.168.1.2:22", "10.0.0.1:6443", "[fd00::1]:6443",
		"169.254.20.10:53", "168.63.129.16:53", "172.20.0.1:443"), netip.AddrPortFrom(netip.Addr{}, 9000))
	metadata := to("169.254.169.254:80", "169.254.169.252:988", "169.254.170.23:80", "169.254.170.2:80", "[fd00:ec2::254]:80", "[fd00:ec2::23]:80", "[fd20:ce::254]:80",
		"100.100.100.200:80", "168.63.129.16:80", "168.63.129.16:32526", "192.0.0.192:80", "[fe80::a9fe:a9fe]:80", "[fd00:c1::a9fe:a9fe]:80")
	for name, labels := range pods {
		for _, a := range everywhere {
			if !connects(t, policies, labels, a) {
				t.Errorf("%s cannot connect to %v", name, a)
			}
		}
		for _, a := range metadata {
			if got := connects(t, policies, labels, a); got == (name == "a Repository's mover") {
				t.Errorf("%s connects to %v: %v", name, a, got)
			}
		}
	}
}

// Nothing may connect to a mover, and only readers of its metrics to the controller.
func TestNetworkPoliciesOfIngress(t *testing.T) {
	policies, controller := shipped(t)
	mover := labels.Set{LabelManagedBy: ManagedBy, LabelComponent: Component}
	for name, tc := range map[string]struct {
		pod   labels.Set
		ports []int
	}{"the controller": {controller, []int{8443}}, "a mover": {mover, nil}} {
		isolated, ports := false, []int(nil)
		for _, p := range policies {
			selector, err := metav1.LabelSelectorAsSelector(&p.Spec.PodSelector)
			if err != nil {
				t.Fatal(err)
			}
			if !selector.Matches(tc.pod) || !slices.Contains(p.Spec.PolicyTypes, networkingv1.PolicyTypeIngress) {
				continue
			}
			isolated = true
			for _, rule := range p.Spec.Ingress {
				if len(rule.Ports) == 0 {
					t.Errorf("all ports of %s are open", name)
				}
				for _, port := range rule.Ports {
					ports = append(ports, port.Port.IntValue())
					if *port.Protocol != corev1.ProtocolTCP {
						t.Errorf("port %v of %s is %s", port.Port, name, *port.Protocol)
					}
				}
			}
		}
		if !isolated || !slices.Equal(ports, tc.ports) {
			t.Errorf("of %s, isolated %v, ports %v are open, want %v", name, isolated, ports, tc.ports)
		}
	}
}
