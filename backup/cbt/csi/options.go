package csi

import (
	"crypto/x509"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"net"
	"time"
)

// Endpoint says how to reach a driver's sidecar: the spec of its SnapshotMetadataService
// object (cbt.storage.k8s.io/v1beta1).
type Endpoint struct {
	// Address is host:port. If it is empty the driver has no service: Delta and Allocated
	// fail with cbt.ReasonNoService and everything is read and compared.
	Address string `json:"address,omitempty"`
	// CABundle verifies the service's certificate: PEM, one or more certificates. The
	// system's authorities are not used.
	CABundle []byte `json:"caBundle,omitempty"`
	// Audience is the required audience of the token. The token source ensures it, not this
	// package.
	Audience string `json:"audience,omitempty"`
	// Trouble is what is wrong with the object, if it does not suffice to reach the service.
	// Then no call is made, as if the service could not be reached.
	Trouble string `json:"trouble,omitempty"`
}

// Snapshot is one snapshot as the cluster and the storage name it.
type Snapshot struct {
	// Namespace and Name of the VolumeSnapshot object. The base needs neither.
	Namespace string `json:"namespace,omitempty"`
	Name      string `json:"name,omitempty"`
	// Handle is status.snapshotHandle of its VolumeSnapshotContent.
	Handle string `json:"handle"`
	// ChangeID is the base of a delta: the handle with most drivers (see the function
	// ChangeID). Empty if the driver did not provide it; then the next backup is no delta.
	ChangeID string `json:"changeID,omitempty"`
	// VolumeHandle is the storage's name of the volume that was snapshotted.
	VolumeHandle string `json:"volumeHandle,omitempty"`
}

// Options of a Session. Options that are not data are not in its JSON.
type Options struct {
	Endpoint Endpoint `json:"endpoint"`

	// TokenFile is a projected service account token for the endpoint's audience, read for
	// each call. Tokens, if set, replaces it. One of them is required unless there is no
	// address.
	TokenFile string      `json:"tokenFile,omitempty"`
	Tokens    TokenSource `json:"-"`

	// Target is the snapshot being backed up. The caller has seen it bound and ready: v1.1.0
	// of the sidecar crashes on a snapshot without a status. Namespace, Name, Handle and
	// VolumeHandle are required.
	Target Snapshot `json:"target"`
	// Base is the snapshot that the cluster keeps as the base of the next delta; nil if none.
	// If it is not the one that the parent point was made from, no delta is requested.
	// Without it the driver is asked by what the parent point recorded: for some the base
	// need not exist.
	Base *Snapshot `json:"base,omitempty"`

	// MaxResults bounds the ranges of one message; 0 leaves it to the driver.
	MaxResults int32 `json:"maxResults,omitempty"`
	// Retry says how broken calls are continued.
	Retry Retry `json:"retry,omitzero"`
	// StallTimeout is how long a call may send nothing before it counts as broken; 0 for 15
	// minutes. The sidecar itself ends calls after ten.
	StallTimeout time.Duration `json:"stallTimeout,omitempty"`

	// Log receives tolerated errors; nil for no log.
	Log *slog.Logger `json:"-"`

	// Clock and Random (numbers from 0 to 1 for the jitter of the backoff) are replaced by
	// tests, as is Dialer, net.Dialer's DialContext.
	Clock  Clock          `json:"-"`
	Random func() float64 `json:"-"`
	Dialer DialFunc       `json:"-"`
}

// Retry bounds the repeats of calls that broke. The wait before the nth repeat in a row is
// random in the upper half of Base*2^(n-1), at most Max. A new range restarts the row.
type Retry struct {
	// Attempts in a row without a new range; 0 for 7 (about a minute).
	Attempts int `json:"attempts,omitempty"`
	// Base and Max of the wait; 0 for a second and 30 seconds.
	Base time.Duration `json:"base,omitempty"`
	Max  time.Duration `json:"max,omitempty"`
	// Breaks in all, progress or not, clean early ends included; 0 for 1000: a week of
	// ten minutes each.
	Breaks int `json:"breaks,omitempty"`
}

const (
	defaultAttempts     = 7
	defaultRetryBase    = time.Second
	defaultRetryMax     = 30 * time.Second
	defaultBreaks       = 1000
	defaultStallTimeout = 15 * time.Minute

	// maxMessage bounds a message: some 700,000 ranges, 70 MB in memory.
	maxMessage = 16 << 20
	// cautiousResults is requested after a message was too large.
	cautiousResults = 10_000
)

// withDefaults sets defaults and rejects what cannot work.
func (o Options) withDefaults() (Options, error) {
	if o.Retry.Attempts <= 0 {
		o.Retry.Attempts = defaultAttempts
	}

	if o.Retry.Base <= 0 {
		o.Retry.Base = defaultRetryBase
	}

	if o.Retry.Max <= 0 {
		o.Retry.Max = max(defaultRetryMax, o.Retry.Base)
	}

	if o.Retry.Breaks <= 0 {
		o.Retry.Breaks = defaultBreaks
	}

	if o.StallTimeout <= 0 {
		o.StallTimeout = defaultStallTimeout
	}

	if o.Log == nil {
		o.Log = slog.New(slog.DiscardHandler)
	}

	if o.Clock == nil {
		o.Clock = systemClock{}
	}

	if o.Random == nil {
		o.Random = rand.Float64
	}

	if o.Dialer == nil {
		o.Dialer = dial
	}

	if o.Tokens == nil && o.TokenFile != "" {
		o.Tokens = TokenFile(o.TokenFile)
	}
	return o, o.check()
}

func (o Options) check() error {
	t := o.Target

	switch {
	case t.Namespace == "" || t.Name == "":
		return errors.New("the target needs the namespace and name of its VolumeSnapshot")
	case t.Handle == "":
		return fmt.Errorf("VolumeSnapshot %s/%s has no snapshot handle: wait until it is bound and readyToUse", t.Namespace, t.Name)
	case t.VolumeHandle == "":
		return fmt.Errorf("the volume handle of VolumeSnapshot %s/%s is not given: take it from the PersistentVolume that was snapshotted",
			t.Namespace, t.Name)
	case o.MaxResults < 0:
		return fmt.Errorf("MaxResults is %d", o.MaxResults)
	case o.Endpoint.Address != "" && o.Endpoint.Trouble == "" && o.Tokens == nil:
		return fmt.Errorf("no token for %s: give a TokenFile or a TokenSource", o.Endpoint.Address)
	}
	return nil
}

// check returns why the service cannot be reached with this endpoint.
func (e Endpoint) check() error {
	if e.Trouble != "" {
		return errors.New(e.Trouble)
	}

	if e.Address == "" {
		return nil
	}

	if _, _, err := net.SplitHostPort(e.Address); err != nil {
		return fmt.Errorf("the address of the SnapshotMetadataService is not host:port: %w", err)
	}

	_, err := e.pool()
	return err
}

func (e Endpoint) pool() (*x509.CertPool, error) {
	pool := x509.NewCertPool()
	if !pool.AppendCertsFromPEM(e.CABundle) {
		return nil, errors.New("the CA bundle of the SnapshotMetadataService holds no certificate in PEM")
	}
	return pool, nil
}
