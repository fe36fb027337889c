package store

import (
	"errors"
	"testing"
	"time"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/varve-io/varve/api/v1alpha1"
	"github.com/varve-io/varve/backup/points"
)

func TestPick(t *testing.T) {
	hour := func(n int) time.Time { return time.Date(2026, 11, 21, n, 0, 0, 0, time.UTC) }
	pts := []*points.Point{{ID: "aaaa1111", Time: hour(1)}, {ID: "aaaa2222", Time: hour(3)}, {ID: "bbbb3333", Time: hour(2)}}
	at := func(t time.Time) *metav1.Time { m := metav1.NewTime(t); return &m }
	for _, tc := range []struct {
		name string
		at   v1alpha1.RecoveryAt
		want string
	}{
		{"latest by generation", v1alpha1.RecoveryAt{}, "bbbb3333"},
		{"not younger", v1alpha1.RecoveryAt{Time: at(hour(2).Add(time.Minute))}, "bbbb3333"},
		{"that very time", v1alpha1.RecoveryAt{Time: at(hour(1))}, "aaaa1111"},
		{"newest by time", v1alpha1.RecoveryAt{Time: at(hour(9))}, "aaaa2222"},
		{"older than all", v1alpha1.RecoveryAt{Time: at(hour(0))}, ""},
		{"prefix", v1alpha1.RecoveryAt{ID: "aaaa2"}, "aaaa2222"},
		{"ambiguous", v1alpha1.RecoveryAt{ID: "aaaa"}, ""},
		{"unknown", v1alpha1.RecoveryAt{ID: "cccc"}, ""},
	} {
		t.Run(tc.name, func(t *testing.T) {
			p, err := Pick(pts, tc.at)
			switch {
			case tc.want == "" && (!errors.Is(err, ErrNoMatch) || errors.Is(err, ErrNone)):
				t.Errorf("got %v, %v", p, err)
			case tc.want != "" && (err != nil || p.ID != tc.want):
				t.Errorf("got %v, %v", p, err)
			}
		})
	}
	if _, err := Pick(nil, v1alpha1.RecoveryAt{}); !errors.Is(err, ErrNone) {
		t.Errorf("of none: %v", err)
	}
}
