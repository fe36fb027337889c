package cbt

import "errors"

// Reason is why the next source was used instead: a stable code for records, events and the
// label of a metric. The text of the error is for people.
type Reason string

// Reasons, most of them named after what a CSI driver or its metadata sidecar
// answers (KEP-3314, CSI specification, "GetMetadataDelta Errors").
const (
	// ReasonNoService: the driver has no SnapshotMetadata service.
	ReasonNoService Reason = "NoService"
	// ReasonNoChangeID: the parent was recorded without a change ID, so that no difference to
	// it can be requested.
	ReasonNoChangeID Reason = "NoChangeID"
	// ReasonBaseMismatch: the snapshot kept as the base is not the one that the parent
	// was made from.
	ReasonBaseMismatch Reason = "BaseMismatch"
	// ReasonVolumeMismatch: the parent was made from another volume: the claim was deleted
	// and made again, or restored.
	ReasonVolumeMismatch Reason = "VolumeMismatch"
	// ReasonSizeMismatch: the storage reports a larger disk than the one being read, so that
	// its offsets may differ (encryption headers).
	ReasonSizeMismatch Reason = "SizeMismatch"

	// ReasonFailedPrecondition: the driver does not track this volume or snapshot.
	ReasonFailedPrecondition Reason = "FailedPrecondition"
	// ReasonNotFound: a snapshot, mostly the base, is gone.
	ReasonNotFound Reason = "NotFound"
	// ReasonUnimplemented: the driver has no such call.
	ReasonUnimplemented Reason = "Unimplemented"
	// ReasonOutOfRange: the driver refused an offset to continue from.
	ReasonOutOfRange Reason = "OutOfRange"
	// ReasonInvalidArgument: the driver cannot compare these two snapshots.
	ReasonInvalidArgument Reason = "InvalidArgument"

	// ReasonConnectionFailed: the service was not reached, or not over a TLS
	// connection that its own certificate authority vouches for.
	ReasonConnectionFailed Reason = "ConnectionFailed"
	// ReasonUnavailable, ReasonInternal, ReasonDeadlineExceeded, ReasonResourceExhausted,
	// ReasonAborted and ReasonUnknown: the service answered with this code repeatedly.
	ReasonUnavailable       Reason = "Unavailable"
	ReasonInternal          Reason = "Internal"
	ReasonDeadlineExceeded  Reason = "DeadlineExceeded"
	ReasonResourceExhausted Reason = "ResourceExhausted"
	ReasonAborted           Reason = "Aborted"
	ReasonUnknown           Reason = "Unknown"
	// ReasonStalled: the service accepted the call and then sent nothing.
	ReasonStalled Reason = "Stalled"

	// ReasonTruncated: the driver ended its listing early, as if complete, too often.
	ReasonTruncated Reason = "Truncated"
	// ReasonMalformed: the listing breaks the rules: offsets that do not increase, a
	// capacity or type that changes, ranges outside of the volume.
	ReasonMalformed Reason = "Malformed"
	// ReasonSpotCheck: blocks reported unchanged did change.
	ReasonSpotCheck Reason = "SpotCheckFailed"
)

// Reasons are all reasons: the values of a metric's label.
var Reasons = []Reason{
	ReasonNoService, ReasonNoChangeID, ReasonBaseMismatch, ReasonVolumeMismatch, ReasonSizeMismatch,
	ReasonFailedPrecondition, ReasonNotFound, ReasonUnimplemented, ReasonOutOfRange, ReasonInvalidArgument,
	ReasonConnectionFailed, ReasonUnavailable, ReasonInternal, ReasonDeadlineExceeded, ReasonResourceExhausted,
	ReasonAborted, ReasonUnknown, ReasonStalled, ReasonTruncated, ReasonMalformed, ReasonSpotCheck,
}

// FallbackReason returns the reason of an error after which another source may be asked. It
// returns false for every other error: that ends the backup.
func FallbackReason(err error) (Reason, bool) {
	var e *Error
	if !errors.As(err, &e) || e.Reason == "" {
		return "", false
	}
	return e.Reason, true
}
