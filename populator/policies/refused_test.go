package policies

import (
	"context"
	"errors"
	"strings"
	"testing"
	"time"

	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/client-go/tools/record"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/controller-runtime/pkg/client/interceptor"

	"github.com/varve-io/varve/api/v1alpha1"
	"github.com/varve-io/varve/populator/report"
)

// A run that the API server refuses is said on its policy, with what to do about it. It is tried again
// soon.
func TestRefusedRuns(t *testing.T) {
	t.Parallel()
	runs := schema.GroupResource{Group: v1alpha1.GroupVersion.Group, Resource: "volumebackups"}
	hook := []v1alpha1.Hook{{Name: "a", Recipe: v1alpha1.HookPostgreSQL}}
	exec := "ValidatingAdmissionPolicy 'varve-hooks' with binding 'varve-hooks' denied request: hooks run commands in the pods of namespace shop, and the controller may not create pods/exec there"
	for name, tc := range map[string]struct {
		hooks  []v1alpha1.Hook
		err    error
		reason string
		says   string
	}{
		"no right to exec": {hook, apierrors.NewForbidden(runs, "run", errors.New(exec)), v1alpha1.ReasonHookForbidden,
			"kubectl -n shop create rolebinding varve-hooks --clusterrole=varve-hooks --serviceaccount=varve:varve-controller"},
		"a quota":   {hook, apierrors.NewForbidden(runs, "run", errors.New("exceeded quota")), v1alpha1.ReasonRunRefused, "exceeded quota"},
		"a webhook": {nil, apierrors.NewBadRequest("admission webhook denied the request"), v1alpha1.ReasonRunRefused, "admission webhook"},
		"invalid":   {nil, apierrors.NewInvalid(schema.GroupKind{Kind: "VolumeBackup"}, "run", nil), v1alpha1.ReasonRunRefused, "is invalid"},
	} {
		for _, group := range []bool{false, true} {
			t.Run(name, func(t *testing.T) {
				t.Parallel()
				now := at("2026-11-21T01:05:00Z")
				policy := newPolicy("hourly", "0 * * * *")
				policy.Spec.Hooks, policy.Spec.Group, policy.Spec.Schedule.Spread = tc.hooks, group, &metav1.Duration{}
				p := newReconciler(t, &now, policy, newClaim("data"), newClaim("log"), backupStore())
				events := record.NewFakeRecorder(100)
				p.Events = report.NewEvents(events)
				c := p.Client
				p.Client = interceptor.NewClient(c.(client.WithWatch), interceptor.Funcs{
					Create: func(ctx context.Context, c client.WithWatch, o client.Object, opts ...client.CreateOption) error {
						if _, is := o.(*v1alpha1.VolumeBackup); is {
							return tc.err
						}
						return c.Create(ctx, o, opts...)
					},
				})
				for range 3 {
					after, ready := p.look(t, "hourly")
					if after != retryStore || ready == nil || ready.Status != metav1.ConditionFalse || ready.Reason != tc.reason || !strings.Contains(ready.Message, tc.says) {
						t.Fatalf("checked again after %v, %+v", after, ready)
					}
				}
				if len(events.Events) != 1 {
					t.Errorf("%d events", len(events.Events))
				} else if said := <-events.Events; !strings.HasPrefix(said, "Warning "+tc.reason+" ") || !strings.Contains(said, tc.says) {
					t.Errorf("the event says %q", said)
				}
				p.Client = c
				if _, ready := p.look(t, "hourly"); ready.Status != metav1.ConditionTrue || len(p.runs(t)) != 2 {
					t.Errorf("afterwards there are %d runs, %+v", len(p.runs(t)), ready)
				}
			})
		}
	}
}

// Once the deadline of a refused run has passed its policy does not call itself ready: the next is refused,
// too, until one is created.
func TestRefusedPastTheDeadline(t *testing.T) {
	t.Parallel()
	for _, group := range []bool{false, true} {
		now := at("2026-11-21T01:05:00Z")
		policy := newPolicy("hourly", "0 * * * *")
		policy.Spec.Group, policy.Spec.Schedule.Spread = group, &metav1.Duration{}
		policy.Spec.Schedule.StartingDeadline = &metav1.Duration{Duration: 10 * time.Minute}
		p := newReconciler(t, &now, policy, newClaim("data"), newClaim("log"), backupStore())
		events := record.NewFakeRecorder(100)
		p.Events = report.NewEvents(events)
		c := p.Client
		p.Client = interceptor.NewClient(c.(client.WithWatch), interceptor.Funcs{
			Create: func(ctx context.Context, c client.WithWatch, o client.Object, opts ...client.CreateOption) error {
				if vb, is := o.(*v1alpha1.VolumeBackup); is {
					return apierrors.NewForbidden(schema.GroupResource{Resource: "volumebackups"}, vb.Name, errors.New("exceeded quota"))
				}
				return c.Create(ctx, o, opts...)
			},
		})
		look := func(time string, status metav1.ConditionStatus, reason string) {
			t.Helper()
			now = at(time)
			if _, ready := p.look(t, "hourly"); ready.Status != status || ready.Reason != reason {
				t.Errorf("group %v at %s: %+v", group, time, ready)
			}
		}
		for _, hour := range []string{"01", "02", "03"} {
			look("2026-11-21T"+hour+":05:00Z", metav1.ConditionFalse, v1alpha1.ReasonRunRefused)
			look("2026-11-21T"+hour+":15:00Z", metav1.ConditionFalse, v1alpha1.ReasonRunRefused)
			look("2026-11-21T"+hour+":45:00Z", metav1.ConditionFalse, v1alpha1.ReasonRunRefused)
		}
		refused := 0
		for len(events.Events) > 0 {
			if strings.Contains(<-events.Events, v1alpha1.ReasonRunRefused) {
				refused++
			}
		}
		if refused != 1 {
			t.Errorf("group %v: %d events", group, refused)
		}
		p.Client = c
		look("2026-11-21T03:50:00Z", metav1.ConditionFalse, v1alpha1.ReasonRunRefused)
		look("2026-11-21T04:05:00Z", metav1.ConditionTrue, v1alpha1.ReasonScheduled)
		look("2026-11-21T04:45:00Z", metav1.ConditionTrue, v1alpha1.ReasonScheduled)
	}
}
