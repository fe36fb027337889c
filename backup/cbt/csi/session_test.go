package csi_test

import (
	"encoding/json"
	"errors"
	"reflect"
	"strings"
	"testing"
	"time"

	"github.com/kubernetes-csi/external-snapshot-metadata/pkg/api"
	"google.golang.org/grpc/codes"

	"github.com/varve-io/varve/backup/cbt"
	"github.com/varve-io/varve/backup/cbt/csi"
	"github.com/varve-io/varve/backup/cbt/csi/csitest"
)

// TestEndIsAskedForAgain checks which calls are made to know that a list is complete.
func TestEndIsAskedForAgain(t *testing.T) {
	tail := []cbt.Extent{{Offset: testSize - testGrain, Length: testGrain}}
	early := func(after int) csitest.Behaviour { return csitest.Behaviour{End: csitest.Early, After: after} }

	for name, c := range map[string]struct {
		extents []cbt.Extent
		calls   []csitest.Behaviour
		want    []int64 // offsets asked from
	}{
		"nothing":           {nil, nil, []int64{0, 0}},
		"something":         {testExtents(3), nil, []int64{0, 5 * testGrain}},
		"up to the end":     {tail, nil, []int64{0}},
		"early":             {testExtents(3), []csitest.Behaviour{early(1)}, []int64{0, testGrain, 5 * testGrain}},
		"early at once":     {testExtents(3), []csitest.Behaviour{early(0)}, []int64{0, 0, 5 * testGrain}},
		"early before tail": {append(testExtents(3), tail...), []csitest.Behaviour{early(3)}, []int64{0, 5 * testGrain}},
	} {
		t.Run(name, func(t *testing.T) {
			server := csitest.New(t, csitest.Script{Capacity: testSize, Delta: c.extents, Calls: c.calls})

			got, _, err := list(t, openSession(t, server, nil).Delta(), deltaRequest())
			if err != nil || !reflect.DeepEqual(got, c.extents) {
				t.Errorf("%v, %v", got, err)
			}

			var offsets []int64
			for _, call := range server.Calls() {
				offsets = append(offsets, call.Offset)
			}

			if !reflect.DeepEqual(offsets, c.want) {
				t.Errorf("asked from %v, want %v", offsets, c.want)
			}
		})
	}
}

// TestEndlessBreaks bounds the calls to a service that makes a little progress each time.
func TestEndlessBreaks(t *testing.T) {
	for end, want := range map[csitest.End]cbt.Reason{csitest.Early: cbt.ReasonTruncated, csitest.Status: cbt.ReasonUnavailable} {
		var calls []csitest.Behaviour
		for i := range 50 {
			calls = append(calls, csitest.Behaviour{End: end, After: i + 1, Code: codes.Unavailable})
		}

		server := csitest.New(t, csitest.Script{Capacity: testSize, Delta: testExtents(60), Calls: calls})
		session := openSession(t, server, func(o *csi.Options) { o.Retry.Breaks = 20 })

		_, _, err := list(t, session.Delta(), deltaRequest())
		if reason, _ := cbt.FallbackReason(err); reason != want || !errors.Is(err, cbt.ErrTruncated) {
			t.Errorf("%v: reason %q, want %q", err, reason, want)
		}

		if n := len(server.Calls()); n > 25 {
			t.Errorf("%d calls", n)
		}
	}
}

func TestStreamChangesItsMind(t *testing.T) {
	for name, b := range map[string]csitest.Behaviour{
		"capacity": {Capacity: testSize / 2},
		"type":     {Type: api.BlockMetadataType_FIXED_LENGTH},
	} {
		t.Run(name, func(t *testing.T) {
			server := csitest.New(t, csitest.Script{Capacity: testSize, Delta: testExtents(5), PerMessage: 2, Then: b})

			_, _, err := list(t, openSession(t, server, nil).Delta(), deltaRequest())
			if reason, _ := cbt.FallbackReason(err); reason != cbt.ReasonMalformed {
				t.Errorf("%v", err)
			}
		})
	}
}

func TestRequest(t *testing.T) {
	server := csitest.New(t, csitest.Script{Capacity: testSize, Delta: testExtents(1), Allocated: testExtents(2)})
	session := openSession(t, server, func(o *csi.Options) {
		o.MaxResults = 17
		o.Target.ChangeID = "target-change"
		o.Base = nil
	})

	req := deltaRequest()
	req.Base.ChangeID = "base-change"

	_, report, err := list(t, session.Delta(), req)
	if err != nil {
		t.Fatal(err)
	}

	want := cbt.Report{
		Source: "csi-delta", BaseChangeID: "base-change", TargetChangeID: "target-change", SnapshotHandle: "target", VolumeHandle: "vol",
		Size: testSize, Exact: true, Reported: testGrain,
	}
	if report != want {
		t.Errorf("delta: %+v, want %+v", report, want)
	}

	for _, base := range []*cbt.Base{req.Base, nil} {
		_, report, err = list(t, session.Allocated(), cbt.Request{Base: base, Size: testSize})
		if err != nil {
			t.Fatal(err)
		}

		want.Source, want.BaseChangeID, want.Allocated, want.Reported = "csi-allocated", "", true, 2*testGrain
		if report != want {
			t.Errorf("allocated: %+v, want %+v", report, want)
		}
	}

	_, report, err = list(t, session.Whole(), req)
	if err != nil {
		t.Fatal(err)
	}

	want.Source, want.BaseChangeID, want.Allocated, want.Exact, want.Reported = "compare", "base-change", false, false, testSize
	if report != want {
		t.Errorf("whole: %+v, want %+v", report, want)
	}

	calls := server.Calls()
	if c := (csitest.Call{Method: "delta", Token: csitest.Token, Namespace: "ns", Name: "snap", Base: "base-change", MaxResults: 17}); calls[0] != c {
		t.Errorf("delta asked %+v, want %+v", calls[0], c)
	}

	if c := (csitest.Call{Method: "allocated", Token: csitest.Token, Namespace: "ns", Name: "snap", MaxResults: 17}); calls[2] != c {
		t.Errorf("allocated asked %+v, want %+v", calls[2], c)
	}
}

func TestBaseChecks(t *testing.T) {
	server := csitest.New(t, csitest.Script{Capacity: testSize})

	for name, c := range map[string]struct {
		change func(*csi.Options, *cbt.Base)
		reason cbt.Reason // empty: a delta is asked for
	}{
		"right":                {func(*csi.Options, *cbt.Base) {}, ""},
		"none kept":            {func(o *csi.Options, _ *cbt.Base) { o.Base = nil }, ""},
		"parent knows no name": {func(_ *csi.Options, b *cbt.Base) { b.SnapshotHandle = "" }, ""},
		"another change ID":    {func(o *csi.Options, _ *cbt.Base) { o.Base.ChangeID = "x" }, cbt.ReasonBaseMismatch},
		"unknown change ID":    {func(o *csi.Options, _ *cbt.Base) { o.Base.ChangeID = "" }, cbt.ReasonBaseMismatch},
		"another handle":       {func(o *csi.Options, _ *cbt.Base) { o.Base.Handle = "x" }, cbt.ReasonBaseMismatch},
		"parent without ID":    {func(_ *csi.Options, b *cbt.Base) { b.ChangeID = "" }, cbt.ReasonNoChangeID},
		"parent of another":    {func(_ *csi.Options, b *cbt.Base) { b.VolumeHandle = "x" }, cbt.ReasonVolumeMismatch},
		"parent of unknown":    {func(_ *csi.Options, b *cbt.Base) { b.VolumeHandle = "" }, cbt.ReasonVolumeMismatch},
		"kept of another":      {func(o *csi.Options, _ *cbt.Base) { o.Base.VolumeHandle = "x" }, cbt.ReasonVolumeMismatch},
	} {
		t.Run(name, func(t *testing.T) {
			req := deltaRequest()
			before := len(server.Calls())

			session := openSession(t, server, func(o *csi.Options) { c.change(o, req.Base) })
			_, _, err := list(t, session.Delta(), req)

			if reason, _ := cbt.FallbackReason(err); reason != c.reason || (err == nil) != (c.reason == "") {
				t.Errorf("%v: reason %q, want %q", err, reason, c.reason)
			}

			if asked := len(server.Calls()) > before; asked != (c.reason == "") {
				t.Errorf("asked the service: %v", asked)
			}
		})
	}
}

func TestNoService(t *testing.T) {
	session, err := csi.Open(t.Context(), csi.Options{Target: csi.Snapshot{Namespace: "n", Name: "n", Handle: "h", VolumeHandle: "vol"}})
	if err != nil {
		t.Fatal(err)
	}

	for _, source := range []cbt.Source{session.Delta(), session.Allocated()} {
		_, _, err := list(t, source, deltaRequest())
		if reason, _ := cbt.FallbackReason(err); reason != cbt.ReasonNoService {
			t.Errorf("%v", err)
		}
	}

	if err := session.Close(); err != nil {
		t.Error(err)
	}
}

func TestUnchanged(t *testing.T) {
	for name, c := range map[string]struct {
		extents []cbt.Extent
		then    csitest.Behaviour
		want    bool
		err     error
	}{
		"unchanged":    {nil, csitest.Behaviour{}, true, nil},
		"changed":      {testExtents(1), csitest.Behaviour{}, false, nil},
		"changed much": {testExtents(128), csitest.Behaviour{}, false, nil},
		"unavailable":  {nil, csitest.Behaviour{End: csitest.Status, Code: codes.NotFound}, false, cbt.ErrUnavailable},
	} {
		t.Run(name, func(t *testing.T) {
			server := csitest.New(t, csitest.Script{Capacity: testSize, Delta: c.extents, Then: c.then})

			got, err := openSession(t, server, nil).Unchanged(t.Context(), testBase)
			if got != c.want || !errors.Is(err, c.err) {
				t.Errorf("%v, %v", got, err)
			}
		})
	}
}

func TestOptionsAreChecked(t *testing.T) {
	server := csitest.New(t, csitest.Script{})

	for want, change := range map[string]func(*csi.Options){
		"namespace and name": func(o *csi.Options) { o.Target.Name = "" },
		"no snapshot handle": func(o *csi.Options) { o.Target.Handle = "" },
		"volume handle":      func(o *csi.Options) { o.Target.VolumeHandle = "" },
		"no token":           func(o *csi.Options) { o.Tokens = nil },
		"MaxResults":         func(o *csi.Options) { o.MaxResults = -1 },
	} {
		opt := csi.Options{
			Endpoint: server.Endpoint(), Tokens: fixedToken("t"),
			Target: csi.Snapshot{Namespace: "ns", Name: "snap", Handle: "target", VolumeHandle: "vol"},
		}
		change(&opt)

		if _, err := csi.Open(t.Context(), opt); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%v, want one that says %q", err, want)
		}
	}
}

// A wrong SnapshotMetadataService object costs the changed blocks, not the backup.
func TestBrokenEndpoint(t *testing.T) {
	server := csitest.New(t, csitest.Script{})

	for want, change := range map[string]func(*csi.Endpoint){
		"not host:port":  func(e *csi.Endpoint) { e.Address = "host" },
		"no certificate": func(e *csi.Endpoint) { e.CABundle = []byte("x") },
		"certificate in": func(e *csi.Endpoint) { e.CABundle = nil },
		"lacks":          func(e *csi.Endpoint) { *e = csi.Endpoint{Trouble: "it lacks an address"} },
		"an audience":    func(e *csi.Endpoint) { e.Trouble = "it lacks an audience" },
	} {
		session := openSession(t, server, func(o *csi.Options) { change(&o.Endpoint) })

		for _, source := range []cbt.Source{session.Delta(), session.Allocated()} {
			_, _, err := list(t, source, deltaRequest())
			if reason, _ := cbt.FallbackReason(err); reason != cbt.ReasonConnectionFailed || !strings.Contains(err.Error(), want) {
				t.Errorf("%v, want one that says %q", err, want)
			}
		}

		if _, err := session.Unchanged(t.Context(), testBase); !errors.Is(err, cbt.ErrUnavailable) {
			t.Errorf("%s: %v", want, err)
		}
	}
}

func TestOptionsGoThroughJSON(t *testing.T) {
	opt := csi.Options{
		Endpoint:  csi.Endpoint{Address: "a:1", CABundle: []byte("pem"), Audience: "aud"},
		TokenFile: "/token", Target: csi.Snapshot{Namespace: "ns", Name: "n", Handle: "h", ChangeID: "c", VolumeHandle: "v"},
		Base: &csi.Snapshot{Handle: "b"}, MaxResults: 5, Retry: csi.Retry{Attempts: 3, Base: time.Second}, StallTimeout: time.Minute,
	}

	text, err := json.Marshal(opt)
	if err != nil {
		t.Fatal(err)
	}

	var back csi.Options
	if err := json.Unmarshal(text, &back); err != nil || !reflect.DeepEqual(back, opt) {
		t.Errorf("%+v, %v; want %+v", back, err, opt)
	}
}

func TestChangeID(t *testing.T) {
	for _, c := range []struct {
		driver, handle string
		a              csi.Annotations
		want           string
		fails          bool
	}{
		{"rbd.csi.ceph.com", "h", csi.Annotations{}, "h", false},
		{"rbd.csi.ceph.com", "", csi.Annotations{}, "", true},
		{csi.VSphereDriver, "h", csi.Annotations{}, "", true},
		{csi.VSphereDriver, "h", csi.Annotations{Snapshot: map[string]string{"csi.vsphere.volume/change-id": "52 e1/7"}}, "52 e1/7", false},
		{csi.VSphereDriver, "h", csi.Annotations{Content: map[string]string{"csi.vsphere.volume/change-id": "52 e1/8"}}, "52 e1/8", false},
	} {
		if got, err := csi.ChangeID(c.driver, c.handle, c.a); got != c.want || (err != nil) != c.fails {
			t.Errorf("%+v: %q, %v", c, got, err)
		}
	}
}
