package policies

import (
	"fmt"
	"slices"
	"testing"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"github.com/varve-io/varve/api/v1alpha1"
)

// The claims of a policy with a group are backed up at one time, each run knowing all of them, and
// the next group waits for all runs of the last.
func TestGroupOfRuns(t *testing.T) {
	now := at("2026-11-21T01:05:00Z")
	policy := newPolicy("shop", "0 * * * *")
	policy.Spec.Group, policy.Spec.Schedule.Spread = true, &metav1.Duration{Duration: 0}
	policy.Spec.Hooks = []v1alpha1.Hook{{Name: "a", Recipe: v1alpha1.HookPostgreSQL}}
	p := newReconciler(t, &now, policy, newClaim("text"), newClaim("data"), newClaim("log"), backupStore())
	_, c := p.look(t, "shop")
	if c.Status != metav1.ConditionTrue {
		t.Fatalf("%+v", c)
	}
	runs := p.runs(t)
	if len(runs) != 3 {
		t.Fatalf("%d runs", len(runs))
	}
	g := runs[0].Spec.Group
	if g == nil || len(g.Members) != 3 || g.Members[0].ClaimName != "data" || g.Members[2].ClaimName != "text" || len(g.ID) != 32 || g.Name != "shop" || !g.Time.Time.Equal(at("2026-11-21T01:00:00Z")) {
		t.Fatalf("the group is %+v", g)
	}
	for _, r := range runs {
		if r.Spec.Group.ID != g.ID || len(r.Spec.Hooks) != 1 || !slices.ContainsFunc(r.Spec.Group.Members, func(m v1alpha1.GroupMember) bool { return m.ClaimName == r.Spec.ClaimName && m.Run == r.Name }) {
			t.Errorf("run %s has group %+v", r.Name, r.Spec.Group)
		}
	}
	p.look(t, "shop")
	// The next one is due; one run is not over.
	now = at("2026-11-21T02:05:00Z")
	for i := range runs[1:] {
		end := metav1.NewTime(now)
		runs[i+1].Status.CompletionTime = &end
		if err := p.Client.Status().Update(t.Context(), &runs[i+1]); err != nil {
			t.Fatal(err)
		}
	}
	p.look(t, "shop")
	if n := len(p.runs(t)); n != 3 {
		t.Errorf("beside a run that is not over there are %d", n)
	}
	end := metav1.NewTime(now)
	runs[0].Status.CompletionTime = &end
	if err := p.Client.Status().Update(t.Context(), &runs[0]); err != nil {
		t.Fatal(err)
	}
	now = at("2026-11-21T03:05:00Z")
	p.look(t, "shop")
	p.look(t, "shop")
	if n := len(p.runs(t)); n != 6 {
		t.Errorf("after that there are %d", n)
	}
}

// A group made in part, because the process was killed, is completed.
func TestGroupInPart(t *testing.T) {
	now := at("2026-11-21T01:05:00Z")
	policy := newPolicy("shop", "0 * * * *")
	policy.Spec.Group = true
	p := newReconciler(t, &now, policy, newClaim("data"), newClaim("log"), backupStore())
	p.look(t, "shop")
	runs := p.runs(t)
	if len(runs) != 2 {
		t.Fatalf("%d runs", len(runs))
	}
	if err := p.Client.Delete(t.Context(), &runs[1]); err != nil {
		t.Fatal(err)
	}
	var made v1alpha1.BackupPolicy
	if err := p.Live.Get(t.Context(), client.ObjectKey{Namespace: "shop", Name: "shop"}, &made); err != nil {
		t.Fatal(err)
	}
	made.Status.LastScheduled = nil // it was not written yet
	if err := p.Client.Status().Update(t.Context(), &made); err != nil {
		t.Fatal(err)
	}
	p.look(t, "shop")
	if again := p.runs(t); len(again) != 2 || again[0].Spec.Group.ID != again[1].Spec.Group.ID || len(again[1].Spec.Group.Members) != 2 {
		t.Errorf("then there are %d", len(again))
	}
}

// A policy whose group would have too many claims starts nothing, and leaves its claims to other policies; those
// that a policy before it covers do not count.
func TestGroupOfTooMany(t *testing.T) {
	now := at("2026-11-21T01:05:00Z")
	group := newPolicy("many", "0 * * * *")
	group.Spec.Group = true
	objects := []client.Object{group, newPolicy("others", "0 * * * *"), backupStore()}
	for i := range maxGroup + 1 {
		objects = append(objects, newClaim(fmt.Sprintf("data-%d", i)))
	}
	p := newReconciler(t, &now, objects...)
	if _, c := p.look(t, "many"); c.Reason != v1alpha1.ReasonInvalidSpec {
		t.Fatalf("%+v", c)
	}
	if _, c := p.look(t, "others"); c.Status != metav1.ConditionTrue || len(p.runs(t)) != maxGroup+1 {
		t.Errorf("%d runs, %+v", len(p.runs(t)), c)
	}

	first := newPolicy("first", "0 * * * *")
	first.Spec.Selector = &metav1.LabelSelector{MatchLabels: map[string]string{"app": "one"}}
	one := newClaim("one")
	one.Labels = first.Spec.Selector.MatchLabels
	p = newReconciler(t, &now, append(objects[:len(objects)-1:len(objects)-1], first, one)...)
	if _, c := p.look(t, "others"); c.Reason != v1alpha1.ReasonOverlaps || len(p.runs(t)) > 0 {
		t.Errorf("%d runs beside a group of %d, %+v", len(p.runs(t)), maxGroup, c)
	}
}
