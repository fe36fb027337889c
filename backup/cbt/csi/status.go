package csi

import (
	"errors"
	"fmt"
	"strings"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/varve-io/varve/backup/cbt"
)

// StatusError is the answer of the service, or the error of the connection to it. It contains
// no part of the token, whatever the service's message contains.
type StatusError struct {
	Code    codes.Code
	Message string
}

func (e *StatusError) Error() string { return e.Code.String() + ": " + e.Message }

// maxStatusMessage bounds the shown part of a service's message, in bytes.
const maxStatusMessage = 1 << 10

// newStatusError keeps only the status of an error.
func newStatusError(err error, token Token) *StatusError {
	st := status.Convert(err)
	text := token.redact(st.Message())
	text = strings.ToValidUTF8(text, "?")
	text = strings.Map(func(r rune) rune {
		if r < ' ' || r == 0x7f {
			return ' '
		}
		return r
	}, text)

	if len(text) > maxStatusMessage {
		text = strings.ToValidUTF8(text[:maxStatusMessage], "") + "..."
	}
	return &StatusError{Code: st.Code(), Message: text}
}

// step is what to do after a failed call.
type step int

const (
	again step = iota // retry, then the next source
	down              // the next source, at once
	stop              // the backup fails
)

// verdicts are the steps for the codes that a call can fail with; all others are
// codes.Unknown. See "GetMetadataDelta Errors" in the CSI specification.
var verdicts = map[codes.Code]struct {
	step   step
	reason cbt.Reason
}{
	codes.FailedPrecondition: {down, cbt.ReasonFailedPrecondition},
	codes.NotFound:           {down, cbt.ReasonNotFound},
	codes.Unimplemented:      {down, cbt.ReasonUnimplemented},
	codes.OutOfRange:         {down, cbt.ReasonOutOfRange},
	codes.InvalidArgument:    {down, cbt.ReasonInvalidArgument},

	codes.PermissionDenied: {stop, ""},
	codes.Unauthenticated:  {stop, ""},

	codes.Unavailable:       {again, cbt.ReasonUnavailable},
	codes.Internal:          {again, cbt.ReasonInternal},
	codes.DeadlineExceeded:  {again, cbt.ReasonDeadlineExceeded},
	codes.ResourceExhausted: {again, cbt.ReasonResourceExhausted},
	codes.Aborted:           {again, cbt.ReasonAborted},
	codes.Canceled:          {again, cbt.ReasonAborted}, // not cancelled here
	codes.Unknown:           {again, cbt.ReasonUnknown},
}

// callError is a failed call, judged.
type callError struct {
	step   step
	reason cbt.Reason
	cause  error
	code   codes.Code
}

func (e *callError) Error() string { return e.cause.Error() }
func (e *callError) Unwrap() error { return e.cause }

// judge decides what to do after the error of a call. cause is why its context ended.
func (s *Session) judge(err, cause error, token Token) *callError {
	if errors.Is(cause, errStalled) {
		return &callError{again, cbt.ReasonStalled, fmt.Errorf("%w of %s", errStalled, s.opt.StallTimeout), codes.DeadlineExceeded}
	}

	st := newStatusError(err, token)

	v, known := verdicts[st.Code]
	if !known {
		v = verdicts[codes.Unknown]
	}

	if st.Code == codes.Unavailable && s.troubles.get() != nil {
		v.reason = cbt.ReasonConnectionFailed
	}
	return &callError{v.step, v.reason, st, st.Code}
}

var errStalled = errors.New("the service said nothing within the stall timeout")

// deniedDetail says what to do after a refusal.
func (s *Session) deniedDetail(code codes.Code) string {
	if code == codes.PermissionDenied {
		return fmt.Sprintf("let the service account of the token get volumesnapshots in namespace %s", quote(s.opt.Target.Namespace))
	}
	return fmt.Sprintf("the token was not accepted; it must be for audience %s, as the driver's SnapshotMetadataService says", quote(s.opt.Endpoint.Audience))
}
