package report

import (
	"encoding/json"
	"strings"
	"testing"
	"time"
	"unicode/utf8"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/tools/record"

	"github.com/varve-io/varve/api/v1alpha1"
)

func TestEventsAreSaidOnce(t *testing.T) {
	r := record.NewFakeRecorder(10)
	e := NewEvents(r)
	one := &v1alpha1.VolumeBackup{ObjectMeta: metav1.ObjectMeta{UID: "1"}}
	other := &v1alpha1.VolumeBackup{ObjectMeta: metav1.ObjectMeta{UID: "2"}}
	for range 3 {
		e.Warning(one, "Reason", "what %d", 1)
	}
	e.Warning(one, "Reason", "what %d", 2)
	e.Normal(other, "Reason", "what %d", 1)
	if n := len(r.Events); n != 3 {
		t.Errorf("%d events, want 3", n)
	}
	e.Warning(one, "Long", "%s", strings.Repeat("ü", 1000))
	for range 3 {
		<-r.Events
	}
	if said := <-r.Events; len(said) > maxMessage+len("Warning Long ") || !utf8.ValidString(said) {
		t.Errorf("an event of %d bytes, valid UTF-8: %v", len(said), utf8.ValidString(said))
	}
}

// Texts of a repository, such as why a lineage began, appear in events and conditions as one
// line without control characters.
func TestTextIsPlain(t *testing.T) {
	r := record.NewFakeRecorder(1)
	vb := &v1alpha1.VolumeBackup{}
	NewEvents(r).Normal(vb, "NewLineage", "because %s", "\x1b[2J\u202eof\nthis")
	if said := <-r.Events; said != "Normal NewLineage because \ufffd[2J\ufffdof; this" {
		t.Errorf("event %q", said)
	}
	var list []metav1.Condition
	Condition(&list, vb, "Protected", metav1.ConditionTrue, "Reason", "a\nb\x7f")
	if list[0].Message != "a; b\ufffd" {
		t.Errorf("condition %q", list[0].Message)
	}
}

// The status of a ProtectedVolume is at most 16 KiB with any error: there is one for each claim
// and store.
func TestProtectedVolumeIsSmall(t *testing.T) {
	now := metav1.NewTime(time.Date(2026, 11, 21, 12, 0, 0, 0, time.UTC))
	long := strings.Repeat("x", 128) // a snapshot name that a CSI driver may use
	pv := &v1alpha1.ProtectedVolume{Status: v1alpha1.ProtectedVolumeStatus{
		ClaimUID: "0b0c1b73-c27f-3d54-6502-b79bd5b4ddb4", LastSuccess: &now, LastFull: &now, LastScheduled: &now, NextRun: &now, LastPrune: &now,
		Base: &v1alpha1.BaseSnapshot{Name: long, Content: long, Handle: long, ChangeID: long, PointID: long, Time: now},
	}}
	for range v1alpha1.MaxListedPoints {
		pv.Status.Points = append(pv.Status.Points, v1alpha1.PointSummary{
			ID: strings.Repeat("f", 32), Time: now, Kind: "incremental", SizeBytes: 1 << 50, Source: "csi-allocated", ReadBytes: 1 << 50, StoredBytes: 1 << 50,
			Fallbacks: []string{"csi-delta: FailedPrecondition", "csi-allocated: DeadlineExceeded"},
		})
	}
	Condition(&pv.Status.Conditions, pv, v1alpha1.ConditionProtected, metav1.ConditionFalse, v1alpha1.ReasonMoverFailed, strings.Repeat("ü", 1<<20))
	text, err := json.Marshal(pv.Status)
	if err != nil || len(text) > 16<<10 {
		t.Errorf("%d bytes (%v)", len(text), err)
	}
}
