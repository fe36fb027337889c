package points

import (
	"errors"
	"strconv"
	"strings"
	"testing"
	"time"
)

// catalogOf makes a catalogue of points without a repository: by "cluster:ns/name",
// an ID each, one second apart.
func catalogOf(t *testing.T, ids map[string][]string) *Catalog {
	t.Helper()
	c := &Catalog{}
	for name, list := range ids {
		v, err := ParseVolume(name, "")
		if err != nil {
			t.Fatal(err)
		}
		for i, id := range list {
			c.points = append(c.points, &Point{
				ID: id + strings.Repeat("0", 32-len(id)), Volume: v, Generation: int64(i + 1),
				Time: time.Date(2026, 11, 20, 10, 0, i, 0, time.UTC),
			})
		}
	}
	c.sort()
	return c
}

func TestNamesOfClusters(t *testing.T) {
	cat := catalogOf(t, map[string][]string{
		"alpha:os/root":   {"a1", "a2"},
		"alpha:os/only":   {"a3aaa"},
		"beta:os/root":    {"b1"},
		"beta:os/own":     {"b2bbb"},
		"gamma:os/shared": {"c1ccc"},
		"alpha:os/shared": {"a4aaa"},
		"alpha:os/same":   {"d0d0d01"},
		"gamma:os/same2":  {"d0d0d02"},
	})
	const refused, several = "no such", "ambiguous"
	for _, tc := range []struct{ name, read, change string }{
		{"os/root@latest", "b1", "b1"},
		{"os/own@latest", "b2bbb", "b2bbb"},
		{"alpha:os/root@latest", "a2", "a2"},
		{"alpha:os/root@latest~1", "a1", "a1"},
		{"alpha:os/root@2026-11-20T10:00:00Z", "a1", "a1"},
		{"os/only@latest", "a3aaa", refused},
		{"os/only@2026-11-20T10:00:00", "a3aaa", refused},
		{"os/only@a3aaa", "a3aaa", refused},
		{"alpha:os/only@a3aaa", "a3aaa", "a3aaa"},
		{"os/shared@latest", several, refused},
		{"gamma:os/shared@latest", "c1ccc", "c1ccc"},
		{"beta:os/only@latest", refused, refused},
		{"a3aaa", "a3aaa", refused},
		{"alpha:a3aaa", "a3aaa", "a3aaa"},
		{"beta:a3aaa", refused, refused},
		{"b2bbb", "b2bbb", "b2bbb"},
		{"d0d0d0", several, refused},
		{"gamma:d0d0d0", "d0d0d02", "d0d0d02"},
		{"os/none@latest", refused, refused},
	} {
		told := ""
		names := Names{Catalog: cat, Cluster: "beta", Fallback: func(_ string, v Volume) { told = v.Cluster }}
		for _, by := range []struct {
			what string
			find func(string) (*Point, error)
			want string
		}{{"read", names.Read, tc.read}, {"change", names.Change, tc.change}} {
			told = ""
			p, err := by.find(tc.name)
			switch by.want {
			case refused:
				if !errors.Is(err, ErrNoSuchPoint) {
					t.Errorf("%s %s: %v, %v", by.what, tc.name, p, err)
				}
				continue
			case several:
				if !errors.Is(err, ErrAmbiguous) {
					t.Errorf("%s %s: %v, %v", by.what, tc.name, p, err)
				}
				continue
			}
			if err != nil || !strings.HasPrefix(p.ID, by.want) {
				t.Errorf("%s %s: %v, %v, want %s", by.what, tc.name, p, err, by.want)
				continue
			}
			wantTold := ""
			if p.Volume.Cluster != "beta" && !strings.HasPrefix(tc.name, p.Volume.Cluster+":") {
				wantTold = p.Volume.Cluster
			}
			if told != wantTold {
				t.Errorf("%s %s: the user is told of cluster %q, want %q", by.what, tc.name, told, wantTold)
			}
		}
	}
	names := Names{Catalog: cat, Cluster: "beta"}
	for name, spell := range map[string]string{"os/only@latest~0": "alpha:os/only@latest~0", "a3aaa": "alpha:a3aaa"} {
		if _, err := names.Change(name); err == nil || !strings.Contains(err.Error(), spell) {
			t.Errorf("change %s: %v: want the advice %s", name, err, spell)
		}
	}
	for text, want := range map[string]string{
		"os/root": "beta:os/root", "os/only": "alpha:os/only", "alpha:os/root": "alpha:os/root", "os/none": "beta:os/none",
	} {
		if v, err := names.Volume(text); err != nil || v.FullName() != want {
			t.Errorf("volume %s is %s, %v", text, v.FullName(), err)
		}
	}
	if _, err := names.Volume("os/shared"); !errors.Is(err, ErrAmbiguous) || !strings.Contains(err.Error(), "alpha:os/shared, gamma:os/shared") {
		t.Errorf("a volume of two other clusters: %v", err)
	}
}

// TestResolveByAge: names with a relative time mean the newest point that is at least that
// old.
func TestResolveByAge(t *testing.T) {
	now := time.Date(2026, 11, 20, 10, 0, 0, 0, time.UTC)
	v := Volume{Namespace: "shop", Name: "db", Cluster: "c"}
	cat := &Catalog{}
	for i, at := range []time.Time{now.AddDate(0, 0, -9), now.Add(-30 * time.Hour), now.Add(-11 * time.Hour), now.Add(-3 * time.Hour), now.Add(-time.Minute)} {
		cat.points = append(cat.points, &Point{ID: strings.Repeat(strconv.Itoa(i), 32), Volume: v, Generation: int64(i + 1), Time: at})
	}
	names := Names{Catalog: cat, Cluster: "c", Now: now}
	for sel, want := range map[string]int64{
		"today": 5, "yesterday": 3, "2h": 4, "3h": 3, "90m": 4, "0m": 5, "1d": 2, "1w": 1, "latest": 5,
	} {
		p, err := names.Read("shop/db@" + sel)
		if err != nil || p.Generation != want {
			t.Errorf("@%s: %v, %v; want generation %d", sel, p, err, want)
		}
	}
	for _, sel := range []string{"2w", "99999d", "h", "-2h", "2y", "tomorrow", "20261120", "11/20"} {
		if p, err := names.Read("shop/db@" + sel); !errors.Is(err, ErrNoSuchPoint) {
			t.Errorf("@%s: %v, %v; want %v", sel, p, err, ErrNoSuchPoint)
		}
	}
	if _, err := names.Read("shop/db@20261120"); err == nil || !strings.Contains(err.Error(), "@yesterday") || !strings.Contains(err.Error(), "@2026-11-20T10:00") {
		t.Errorf("the error about a wrong time does not show the forms: %v", err)
	}
	cat.points[3].ID, cat.points[4].ID = "abcd"+cat.points[3].ID[4:], "abcd"+cat.points[4].ID[4:]
	_, err := names.Read("abcd")
	if !errors.Is(err, ErrAmbiguous) || strings.Count(err.Error(), "\n") != 3 {
		t.Errorf("ambiguous: %v", err)
	}
}
