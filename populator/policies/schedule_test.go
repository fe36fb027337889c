package policies

import (
	"fmt"
	"math/rand/v2"
	"testing"
	"time"

	"k8s.io/apimachinery/pkg/types"

	"github.com/varve-io/varve/api/v1alpha1"
)

func at(s string) time.Time {
	t, err := time.Parse(time.RFC3339, s)
	if err != nil {
		panic(err)
	}
	return t
}

func TestSchedule(t *testing.T) {
	for _, tc := range []struct {
		cron, zone      string
		from, now, want string // want is empty for none
		next            string
	}{
		{cron: "0 * * * *", from: "2026-11-21T10:30:00Z", now: "2026-11-21T10:59:59Z", next: "2026-11-21T11:00:00Z"},
		{cron: "0 * * * *", from: "2026-11-21T10:30:00Z", now: "2026-11-21T11:00:00Z", want: "2026-11-21T11:00:00Z", next: "2026-11-21T12:00:00Z"},
		{cron: "0 * * * *", from: "2026-11-01T10:30:00Z", now: "2026-11-21T15:20:00Z", want: "2026-11-21T15:00:00Z", next: "2026-11-21T16:00:00Z"},
		{cron: "@daily", zone: "Europe/Berlin", from: "2026-11-01T10:30:00Z", now: "2026-11-21T15:20:00Z", want: "2026-11-20T23:00:00Z", next: "2026-11-21T23:00:00Z"},
		{cron: "0 0 29 2 *", from: "2026-11-01T10:30:00Z", now: "2026-11-21T15:20:00Z", next: "2028-02-29T00:00:00Z"},
	} {
		t.Run(tc.cron+" "+tc.now, func(t *testing.T) {
			c, err := parseSchedule(v1alpha1.Schedule{Cron: tc.cron, TimeZone: tc.zone})
			if err != nil {
				t.Fatal(err)
			}
			s := of(c, 0, "")
			got, want := s.last(at(tc.from), at(tc.now)), time.Time{}
			if tc.want != "" {
				want = at(tc.want)
			}
			if !got.Equal(want) {
				t.Errorf("last is %v, want %v", got, want)
			}
			if got := s.next(at(tc.now)); !got.Equal(at(tc.next)) {
				t.Errorf("next is %v, want %s", got, tc.next)
			}
		})
	}
}

// last must equal the result of walking all times.
func TestLastIsTheLast(t *testing.T) {
	rng := rand.New(rand.NewPCG(1, 2))
	for range 300 {
		text := fmt.Sprintf("%d %d */%d * *", rng.IntN(60), rng.IntN(24), 1+rng.IntN(5))
		if rng.IntN(2) == 0 {
			text = fmt.Sprintf("*/%d * * * *", 1+rng.IntN(59))
		}
		c, err := parseSchedule(v1alpha1.Schedule{Cron: text})
		if err != nil {
			t.Fatal(err)
		}
		s := of(c, time.Duration(rng.IntN(3600))*time.Second+time.Second, types.UID(fmt.Sprint(rng.Int())))
		from := at("2026-11-21T00:00:00Z").Add(time.Duration(rng.IntN(1e6)) * time.Second)
		now := from.Add(time.Duration(rng.IntN(3e6)) * time.Second)
		want := time.Time{}
		for n := s.next(from); !n.After(now); n = s.next(n) {
			want = n
		}
		if got := s.last(from, now); !got.Equal(want) {
			t.Fatalf("%s from %v to %v with offset %v: %v, want %v", text, from, now, s.offset, got, want)
		}
	}
}

func TestSpread(t *testing.T) {
	c, err := parseSchedule(v1alpha1.Schedule{Cron: "0 0 * * *"})
	if err != nil {
		t.Fatal(err)
	}
	const spread = time.Hour
	begin, quarters := at("2026-11-21T00:00:00Z"), [4]int{}
	for i := range 400 {
		s := of(c, spread, types.UID(fmt.Sprintf("claim-%d", i)))
		n := s.next(begin.Add(-time.Second))
		if n.Before(begin) || !n.Before(begin.Add(spread)) {
			t.Fatalf("claim %d runs at %v, out of the spread", i, n)
		}
		quarters[n.Sub(begin)/(15*time.Minute)]++
	}
	for i, n := range quarters {
		if n < 50 {
			t.Errorf("quarter %d of the spread has %d of 400 claims", i, n)
		}
	}
}

func TestRefusedSchedules(t *testing.T) {
	for _, s := range []v1alpha1.Schedule{
		{Cron: "hourly"}, {Cron: "* * * *"}, {Cron: "0 0 30 2 *"}, {Cron: "@every 5m"}, {Cron: "0 * * * *", TimeZone: "Berlin"}, {Cron: "61 * * * *"},
		{Cron: "TZ=UTC"}, {Cron: "CRON_TZ=Europe/Berlin"}, {Cron: "TZ=UTC "}, {Cron: "TZ=Berlin 0 * * * *"}, {Cron: "TZ=UTC\t0 * * * *"},
	} {
		if _, err := parseSchedule(s); err == nil {
			t.Errorf("%+v was taken", s)
		}
	}
}

// A schedule is a tenant's text: it is accepted or refused, and an accepted one occurs.
func FuzzParseSchedule(f *testing.F) {
	for _, s := range []string{"0 */6 * * *", "@daily", "TZ=UTC", "TZ=Asia/Tokyo 0 3 * * mon-fri", "CRON_TZ= @weekly", ", * * * *", "*-5/3 1,,2 ? JAN-12 sun", "0 0 30 2 *"} {
		f.Add(s, "Europe/Berlin")
	}
	f.Fuzz(func(t *testing.T, text, zone string) {
		if len(text) > 128 || len(zone) > 64 { // as the definition has it
			return
		}
		c, err := parseSchedule(v1alpha1.Schedule{Cron: text, TimeZone: zone})
		if err == nil && c.Next(at("2026-11-21T00:00:00Z")).IsZero() {
			t.Errorf("%q in %q never comes", text, zone)
		}
	})
}
