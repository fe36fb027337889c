package csi_test

import (
	"errors"
	"testing"
	"time"

	"google.golang.org/grpc/codes"

	"github.com/varve-io/varve/backup/cbt"
	"github.com/varve-io/varve/backup/cbt/csi"
	"github.com/varve-io/varve/backup/cbt/csi/csitest"
)

const (
	testSize  = 1 << 20
	testGrain = 4096
)

var testBase = cbt.Base{PointID: "p1", ChangeID: "base", SnapshotHandle: "base", VolumeHandle: "vol", Size: testSize}

func deltaRequest() cbt.Request {
	base := testBase
	return cbt.Request{Base: &base, Size: testSize}
}

func testExtents(n int) []cbt.Extent {
	var e []cbt.Extent
	for i := range n {
		e = append(e, cbt.Extent{Offset: int64(i) * 2 * testGrain, Length: testGrain})
	}
	return e
}

// list runs a source and returns what it emitted.
func list(t *testing.T, source cbt.Source, req cbt.Request) ([]cbt.Extent, cbt.Report, error) {
	t.Helper()

	var got []cbt.Extent

	report, err := source.Changes(t.Context(), req, func(e cbt.Extent) error {
		got = append(got, e)
		return nil
	})
	return got, report, err
}

// TestCodes: a service always answers with one code, after one range or none.
func TestCodes(t *testing.T) {
	const attempts = 7

	for code, want := range map[codes.Code]struct {
		reason cbt.Reason // empty: the backup fails
		calls  int
	}{
		codes.FailedPrecondition: {cbt.ReasonFailedPrecondition, 1},
		codes.NotFound:           {cbt.ReasonNotFound, 1},
		codes.Unimplemented:      {cbt.ReasonUnimplemented, 1},
		codes.OutOfRange:         {cbt.ReasonOutOfRange, 1},
		codes.InvalidArgument:    {cbt.ReasonInvalidArgument, 1},
		codes.PermissionDenied:   {"", 1},
		codes.Unauthenticated:    {"", 1},
		codes.Unavailable:        {cbt.ReasonUnavailable, attempts},
		codes.Internal:           {cbt.ReasonInternal, attempts},
		codes.DeadlineExceeded:   {cbt.ReasonDeadlineExceeded, attempts},
		codes.ResourceExhausted:  {cbt.ReasonResourceExhausted, attempts},
		codes.Aborted:            {cbt.ReasonAborted, attempts},
		codes.Canceled:           {cbt.ReasonAborted, attempts},
		codes.Unknown:            {cbt.ReasonUnknown, attempts},
		codes.DataLoss:           {cbt.ReasonUnknown, attempts},
		codes.AlreadyExists:      {cbt.ReasonUnknown, attempts},
		codes.Code(77):           {cbt.ReasonUnknown, attempts},
	} {
		t.Run(code.String(), func(t *testing.T) {
			for after := range 2 {
				server := csitest.New(t, csitest.Script{
					Capacity: testSize, Delta: testExtents(5),
					Then: csitest.Behaviour{End: csitest.Status, After: after, Code: code, Message: "as told"},
				})
				clock := &testClock{}
				session := openSession(t, server, func(o *csi.Options) { o.Clock = clock })

				_, _, err := list(t, session.Delta(), deltaRequest())
				if err == nil {
					t.Fatal("no error")
				}

				if n := len(server.Calls()); n != want.calls {
					t.Errorf("%d calls, want %d", n, want.calls)
				}

				reason, fallback := cbt.FallbackReason(err)
				if reason != want.reason || fallback != (want.reason != "") || errors.Is(err, cbt.ErrUnavailable) != fallback {
					t.Errorf("%v: reason %q, fallback %v; want %q", err, reason, fallback, want.reason)
				}

				if denied := errors.Is(err, cbt.ErrDenied); denied == fallback {
					t.Errorf("%v: denied %v, fallback %v", err, denied, fallback)
				}

				var st *csi.StatusError
				if !errors.As(err, &st) || st.Code != code || st.Message != "as told" {
					t.Errorf("%v does not tell the status", err)
				}

				checkWaits(t, clock.waited(), attempts-1, want.calls > 1)
			}
		})
	}
}

// checkWaits checks that the waits of n repeats in a row double up to the bound, each random
// in the upper half.
func checkWaits(t *testing.T, waits []time.Duration, n int, some bool) {
	t.Helper()

	if !some {
		n = 0
	}

	if len(waits) != n {
		t.Fatalf("waited %v, want %d times", waits, n)
	}

	most := time.Second
	for i, w := range waits {
		if w < most/2 || w > most {
			t.Errorf("wait %d is %s, want from %s to %s", i+1, w, most/2, most)
		}

		most = min(2*most, 30*time.Second)
	}
}

func TestReasonsAreListed(t *testing.T) {
	known := map[cbt.Reason]bool{}
	for _, r := range cbt.Reasons {
		if known[r] {
			t.Errorf("%s is listed twice", r)
		}

		known[r] = true
	}

	for _, r := range csi.VerdictReasons() {
		if !known[r] {
			t.Errorf("%s is not among cbt.Reasons", r)
		}
	}
}

func TestUnreachable(t *testing.T) {
	server := csitest.New(t, csitest.Script{Capacity: testSize})
	other := csitest.New(t, csitest.Script{})

	for name, change := range map[string]func(*csi.Options){
		"nobody listens":    func(o *csi.Options) { o.Endpoint.Address = "127.0.0.1:1" },
		"another authority": func(o *csi.Options) { o.Endpoint.CABundle = other.Endpoint().CABundle },
		"another name":      func(o *csi.Options) { o.Endpoint.Address = "localhost" + o.Endpoint.Address[len("127.0.0.1"):] },
	} {
		t.Run(name, func(t *testing.T) {
			clock := &testClock{}
			session := openSession(t, server, func(o *csi.Options) {
				change(o)
				o.Clock = clock
			})

			_, _, err := list(t, session.Delta(), deltaRequest())
			if reason, _ := cbt.FallbackReason(err); reason != cbt.ReasonConnectionFailed {
				t.Errorf("%v: reason %q", err, reason)
			}

			if n := len(clock.waited()); n != 6 {
				t.Errorf("waited %d times", n)
			}
		})
	}

	if n := len(server.Calls()); n != 0 {
		t.Errorf("%d calls, and their tokens, went to a service that was not vouched for", n)
	}
}

func TestStall(t *testing.T) {
	server := csitest.New(t, csitest.Script{
		Capacity: testSize, Delta: testExtents(5),
		Calls: []csitest.Behaviour{{End: csitest.Stall, After: 2}, {End: csitest.Stall, After: 2}},
	})
	clock := &testClock{}
	session := openSession(t, server, func(o *csi.Options) { o.Clock = clock })

	go func() {
		for range 2 {
			<-server.Stalled()
			clock.stall()
		}
	}()

	got, _, err := list(t, session.Delta(), deltaRequest())
	if err != nil || len(got) != 5 {
		t.Errorf("%v, %v", got, err)
	}

	if st := session.Stats(); st.Breaks != 2 {
		t.Errorf("stats %+v", st)
	}
}

func TestSmallerMessagesWhenTooLarge(t *testing.T) {
	server := csitest.New(t, csitest.Script{
		Capacity: testSize, Delta: testExtents(5),
		Calls: []csitest.Behaviour{{End: csitest.Status, Code: codes.ResourceExhausted}},
	})
	session := openSession(t, server, nil)

	if _, _, err := list(t, session.Delta(), deltaRequest()); err != nil {
		t.Fatal(err)
	}

	calls := server.Calls()
	if calls[0].MaxResults != 0 || calls[1].MaxResults != 10_000 {
		t.Errorf("asked for %d, then %d", calls[0].MaxResults, calls[1].MaxResults)
	}
}
