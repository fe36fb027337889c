package cbt_test

import (
	"errors"
	"io"
	"slices"
	"strings"
	"testing"

	"github.com/varve-io/varve/backup/cbt"
)

// toolList reads text as --extents-format=auto would, as a list from base to "t" of a disk
// of 12288 bytes.
func toolList(t testing.TB, text, base string) (tool cbt.ExtentsTool, got []cbt.Extent, report cbt.Report, err error) {
	t.Helper()

	tool, list := cbt.DetectExtents(strings.NewReader(text))
	request := cbt.Request{Size: 12288}

	if base != "" {
		request.Base = &cbt.Base{PointID: "p", ChangeID: "b", VolumeHandle: "v", Size: 12288}
	}

	source := &cbt.ToolExtents{Tool: tool, Base: base, Target: "t", List: list}
	report, err = source.Changes(t.Context(), request, func(e cbt.Extent) error {
		got = append(got, e)
		return nil
	})
	return tool, got, report, err
}

// As the tools print them (Ceph 17.2, libnbd 1.14, QEMU 7.2).
const (
	rbdChanges = `[{"offset":0,"length":4096,"exists":"true"},{"offset":8192,"length":4096,"exists":"false"}]`
	nbdDirty   = `[
{ "offset": 0, "length": 4096, "type": 1, "description": "dirty"},
{ "offset": 4096, "length": 4096, "type": 0, "description": "clean"},
{ "offset": 8192, "length": 4096, "type": 1, "description": "dirty"}
]
`
	nbdAllocation = `[
{ "offset": 0, "length": 4096, "type": 0, "description": "data"},
{ "offset": 4096, "length": 8192, "type": 3, "description": "hole,zero"}
]
`
	qemuMap = `[{ "start": 0, "length": 4096, "depth": 0, "present": true, "zero": false, "data": true, "offset": 327680},
{ "start": 4096, "length": 8192, "depth": 0, "present": false, "zero": true, "data": false}]
`
)

func TestToolExtents(t *testing.T) {
	for name, c := range map[string]struct {
		text, base string
		tool       cbt.ExtentsTool
		want       []cbt.Extent
	}{
		"rbd diff":                 {rbdChanges, "b", cbt.RBDDiff, []cbt.Extent{{Length: 4096}, {Offset: 8192, Length: 4096, Zero: true}}},
		"rbd diff without changes": {"[]\n", "b", cbt.RBDDiff, nil},
		"rbd diff, all allocated":  {rbdChanges, "", cbt.RBDDiff, []cbt.Extent{{Length: 4096}, {Offset: 8192, Length: 4096, Zero: true}}},
		"nbdinfo, dirty bitmap":    {nbdDirty, "b", cbt.NBDInfo, []cbt.Extent{{Length: 4096}, {Offset: 8192, Length: 4096}}},
		"nbdinfo, base:allocation": {nbdAllocation, "", cbt.NBDInfo, []cbt.Extent{{Length: 4096}, {Offset: 4096, Length: 8192, Zero: true}}},
		"qemu-img map":             {qemuMap, "", cbt.QEMUImg, []cbt.Extent{{Length: 4096}, {Offset: 4096, Length: 8192, Zero: true}}},
	} {
		t.Run(name, func(t *testing.T) {
			tool, got, report, err := toolList(t, c.text, c.base)
			if err != nil {
				t.Fatal(err)
			}

			if tool != c.tool || !slices.Equal(got, c.want) {
				t.Errorf("%s: %v, want %s: %v", tool, got, c.tool, c.want)
			}

			if report.BaseChangeID != c.base || report.TargetChangeID != "t" || !report.Exact || report.Allocated != (c.base == "") {
				t.Errorf("report %+v", report)
			}
		})
	}
}

func TestToolExtentsRefused(t *testing.T) {
	for name, c := range map[string]struct {
		text, base string
		kind       error
	}{
		"cut in an element":        {rbdChanges[:60], "b", cbt.ErrTruncated},
		"cut between elements":     {strings.TrimSuffix(rbdChanges, "]"), "b", cbt.ErrTruncated},
		"cut at the first bracket": {"[", "b", cbt.ErrTruncated},
		"two lists":                {rbdChanges + rbdChanges, "b", cbt.ErrFormat},
		"another base":             {rbdChanges, "other", cbt.ErrBaseMismatch},
		"target is base":           {rbdChanges, "t", cbt.ErrFormat},
		"smaller disk":             {strings.Replace(nbdDirty, `"offset": 8192, "length": 4096`, `"offset": 8192, "length": 512`, 1), "b", cbt.ErrSizeMismatch},
		"gap":                      {strings.Replace(nbdDirty, `"offset": 4096`, `"offset": 4608`, 1), "b", cbt.ErrFormat},
		"overlap":                  {`[{"offset":0,"length":4096,"exists":"true"},{"offset":0,"length":512,"exists":"true"}]`, "b", cbt.ErrOverlap},
		"behind the end":           {`[{"offset":0,"length":409600,"exists":"true"}]`, "b", cbt.ErrOutOfRange},
		"overflow":                 {`[{"offset":9223372036854775807,"length":9223372036854775807,"exists":"true"}]`, "b", cbt.ErrOutOfRange},
		"negative":                 {`[{"offset":-1,"length":4096,"exists":"true"}]`, "b", cbt.ErrFormat},
		"fraction":                 {`[{"offset":0.5,"length":4096,"exists":"true"}]`, "b", cbt.ErrFormat},
		"bitmap without base":      {nbdDirty, "", cbt.ErrFormat},
		"allocation with base":     {nbdAllocation, "b", cbt.ErrFormat},
		"qemu-img map with base":   {qemuMap, "b", cbt.ErrFormat},
		"another context":          {`[{ "offset": 0, "length": 12288, "type": 1, "description": "backing depth 1"}]`, "b", cbt.ErrFormat},
		"endless element":          {`[{"offset":0,"length":4096,"exists":"` + strings.Repeat("x", 200_000), "b", cbt.ErrFormat},
	} {
		t.Run(name, func(t *testing.T) {
			_, _, _, err := toolList(t, c.text, c.base)

			var detailed *cbt.Error
			if !errors.Is(err, c.kind) || !errors.As(err, &detailed) {
				t.Errorf("%v, want a *cbt.Error that is %v", err, c.kind)
			}
		})
	}
}

// A list in Varve's own form is read completely after detection.
func TestDetectExtentsKeepsTheList(t *testing.T) {
	text := goodHeader + goodExtent + goodEnd

	tool, list := cbt.DetectExtents(strings.NewReader(text))
	if got, err := io.ReadAll(list); tool != "" || err != nil || string(got) != text {
		t.Errorf("%q: %q, %v", tool, got, err)
	}
}

func FuzzToolExtents(f *testing.F) {
	for _, text := range []string{rbdChanges, nbdDirty, nbdAllocation, qemuMap} {
		f.Add(text, "b")
		f.Add(text, "")
	}

	f.Fuzz(func(t *testing.T, text, base string) {
		_, got, report, err := toolList(t, text, base)
		if err != nil {
			var detailed *cbt.Error
			if !errors.As(err, &detailed) {
				t.Fatalf("%v is not a *cbt.Error", err)
			}
			return
		}

		sum := int64(0)
		for _, e := range got {
			if e.Length <= 0 || e.Offset < 0 || e.End() > 12288 {
				t.Fatalf("extent %v", e)
			}

			sum += e.Length
		}

		if report.Reported != sum {
			t.Fatalf("Reported %d, want %d", report.Reported, sum)
		}
	})
}
