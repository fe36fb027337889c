package csi

import (
	"errors"
	"fmt"
	"strings"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/varve-io/varve/backup/cbt"
)

// StatusError is what the service answered, or what the connection to it came to. It
// holds no part of the token, whatever the service put into its message.
type StatusError struct {
	Code    codes.Code
	Message string
}

func (e *StatusError) Error() string { return e.Code.String() + ": " + e.Message }

// maxStatusMessage bounds what is shown of a service's message, in bytes.
const maxStatusMessage = 1 << 10

// newStatusError takes the status out of an error and leaves the rest of it behind.
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

// step is what follows from a failed call.
type step int

const (
	again step = iota // try again, then step down
	down              // the next rung, at once
	stop              // the backup fails
)

// verdicts are of the codes that a call can fail with; all others are codes.Unknown.
// See "GetMetadataDelta Errors" in the CSI specification.
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
	codes.Canceled:          {again, cbt.ReasonAborted}, // not by us
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

// judge says what follows from the error of a call. cause is why its context ended.
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

// deniedDetail says what to do about a refusal.
func (s *Session) deniedDetail(code codes.Code) string {
	if code == codes.PermissionDenied {
		return fmt.Sprintf("let the service account of the token get volumesnapshots in namespace %s", quote(s.opt.Target.Namespace))
	}

	return fmt.Sprintf("the token was not accepted; it must be for audience %s, as the driver's SnapshotMetadataService says", quote(s.opt.Endpoint.Audience))
}
