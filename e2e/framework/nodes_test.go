package framework_test

import (
	"context"
	"errors"
	"fmt"
	"testing"

	corev1 "k8s.io/api/core/v1"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"github.com/varve-io/varve/e2e/csidriver"
	"github.com/varve-io/varve/e2e/framework"
)

// Node-local volumes are where their first pod runs; there is no clone for another node,
// and no snapshot once the node is lost.
func TestNodeLocalVolumes(t *testing.T) {
	f := framework.New(t)
	nodes := f.Nodes(2)
	here, there := nodes[0], nodes[1]
	d := f.Driver(csidriver.Options{NodeLocal: true})
	class := d.Class() + "-wffc"
	f.CreateClaim(framework.Claim{Name: "data", Class: class, Mode: framework.Filesystem, Size: "32Mi"})
	f.RunPod(framework.Pod{Name: "writer", Node: there.Name, Claims: map[string]corev1.PersistentVolumeMode{"data": framework.Filesystem}})
	f.Exec("writer", "echo hello > /data/a; sync")
	terms := f.WaitBound("data").Spec.NodeAffinity.Required.NodeSelectorTerms
	if got := terms[0].MatchExpressions[0]; got.Key != csidriver.TopologyKey || got.Values[0] != there.Name {
		t.Fatalf("the volume's affinity is %v, want node %s", got, there.Name)
	}
	f.Snapshot("s", "data", d.Class())

	f.CreateClaim(framework.Claim{Name: "wrong", Class: class, Mode: framework.Filesystem, Size: "32Mi", Snapshot: "s"})
	f.CreatePod(framework.Pod{Name: "wrong-reader", Node: here.Name, Claims: map[string]corev1.PersistentVolumeMode{"wrong": framework.Filesystem}})
	said := "the source lies on node " + there.Name
	f.Eventually("the clone on the wrong node to fail", func(ctx context.Context) error {
		var events corev1.EventList
		if err := f.Client.List(ctx, &events, client.InNamespace(f.Namespace)); err != nil {
			return err
		}
		for _, e := range events.Items {
			if e.InvolvedObject.Name == "wrong" && e.Reason == "ProvisioningFailed" && contains(e.Message, said) {
				return nil
			}
		}
		return errors.New("no event says why")
	})
	f.CreateClaim(framework.Claim{Name: "right", Class: class, Mode: framework.Filesystem, Size: "32Mi", Snapshot: "s"})
	f.RunPod(framework.Pod{Name: "right-reader", Node: there.Name, Claims: map[string]corev1.PersistentVolumeMode{"right": framework.Filesystem}})
	if got := f.Exec("right-reader", "cat /right/a"); got != "hello" {
		t.Fatalf("the clone has %q", got)
	}

	f.LoseNode(there)
	f.Eventually("the node to be missed", func(ctx context.Context) error {
		var n corev1.Node
		if err := f.Client.Get(ctx, client.ObjectKey{Name: there.Name}, &n); err != nil {
			return err
		}
		for _, c := range n.Status.Conditions {
			if c.Type == corev1.NodeReady && c.Status != corev1.ConditionUnknown {
				return fmt.Errorf("Ready is %s", c.Status)
			}
		}
		return nil
	})
	late := f.CreateSnapshot("late", "data", d.Class())
	f.Eventually("the snapshot to fail", func(ctx context.Context) error {
		if err := f.Client.Get(ctx, client.ObjectKeyFromObject(late), late); err != nil {
			return err
		}
		if s := late.Status; s == nil || s.Error == nil || !contains(*s.Error.Message, "does not answer") {
			return fmt.Errorf("its status is %+v", s)
		}
		return nil
	})
	f.Nodes(2)
	f.WaitSnapshot("late")
}
