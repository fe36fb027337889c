// Package mover defines how the controller moves data: the pod that does it, its task,
// and its result.
//
// A mover is a Job in Varve's namespace, one pod and one attempt. Its Task is JSON without
// secrets in its environment; the store's credentials are files of a mounted Secret. It has
// no Kubernetes API credentials. It returns a Result in the container's termination message,
// and shows its progress as log lines. The controller makes the next attempt if one is
// needed.
//
// Package work is the other side, which runs in the pod.
package mover

import (
	"encoding/json"
	"fmt"
	"strings"
	"time"
	"unicode/utf8"

	corev1 "k8s.io/api/core/v1"

	"github.com/varve-io/varve/api/v1alpha1"
	"github.com/varve-io/varve/backup"
	"github.com/varve-io/varve/backup/blocktree"
	"github.com/varve-io/varve/backup/cbt/csi"
	"github.com/varve-io/varve/backup/points"
	"github.com/varve-io/varve/populator/store"
)

// ProtocolVersion is the version of Task and Result. A mover refuses a Task of another
// version: the controller and its movers have the same image.
const ProtocolVersion = 1

// Places in a mover's file system, and the variable with its Task.
const (
	// TaskVariable has the Task, or its beginning: the rest is in VARVE_TASK_1,
	// VARVE_TASK_2 and so on.
	TaskVariable = "VARVE_TASK"
	// DevicePath is the block device that is read or written.
	DevicePath = "/dev/varve"
	// StoreDir has the store's credentials, a file for each key.
	StoreDir = "/var/run/varve/store"
	// TokenFile is the token for the driver's SnapshotMetadata service.
	TokenFile = "/var/run/varve/metadata/token"
	// ScratchDir is writable, and deleted with the pod.
	ScratchDir = "/var/lib/varve"
	// StreamSocket is where a mover waits for a stream, or for who reads one.
	StreamSocket = ScratchDir + "/stream.sock"
	// ConfigDir is writable and in memory: the connection's configuration contains the
	// credentials, which must not be on a node's disk.
	ConfigDir = "/var/run/varve/connection"
	// VolumeDir is the claim of a volume storage.
	VolumeDir = "/var/run/varve/volume"
	// TerminationPath is the file for the Result.
	TerminationPath = "/dev/termination-log"
)

// maxVariable bounds a piece of a Task: Linux starts no process with a variable of 128 KiB.
const maxVariable = 96 << 10

// maxResult bounds a Result: the kubelet keeps 4096 bytes of a termination message.
const maxResult = 4096

// Action is what a mover does: the last word of its command line, varve mover ACTION.
type Action string

// Actions.
const (
	ActionBackup   Action = "backup"
	ActionRestore  Action = "restore"
	ActionMaintain Action = "maintain"
	ActionDump     Action = "dump"
	ActionFeed     Action = "feed"
)

// Task is a mover's task. Exactly the member that Action names is set; maintain has none.
type Task struct {
	Version int            `json:"version"`
	Action  Action         `json:"action"`
	Store   store.Settings `json:"store"`
	Backup  *BackupTask    `json:"backup,omitempty"`
	Restore *RestoreTask   `json:"restore,omitempty"`
	Dump    *DumpTask      `json:"dump,omitempty"`
	Feed    *FeedTask      `json:"feed,omitempty"`
}

// BackupTask makes a recovery point of the device.
type BackupTask struct {
	Volume points.Volume `json:"volume"`
	// Full reuses no block of a parent.
	Full bool `json:"full,omitempty"`
	// Time of the snapshot, which is the point's.
	Time time.Time `json:"time"`
	// Claim that was backed up, for the point's record.
	Claim blocktree.Claim `json:"claim"`
	// Consistency is how the moment of the snapshot was made, and Group the points made with
	// this one, for the record; nil for none.
	Consistency *blocktree.Consistency `json:"consistency,omitempty"`
	Group       *blocktree.Group       `json:"group,omitempty"`
	// Changed says where changed blocks are reported and which snapshot is read. An
	// existing point of that snapshot is the result: an earlier attempt made it.
	Changed csi.Options `json:"changed"`
	// VerifyUnchanged is the share of the blocks reported unchanged to read, 0 to 1.
	VerifyUnchanged float64 `json:"verifyUnchanged"`
	// NamespaceUID is set if the store treats namespaces of one name and several UIDs as
	// different: points of others are neither listed nor deleted.
	NamespaceUID string `json:"namespaceUID,omitempty"`
	// Retention to apply to the volume once the point exists; nil for none.
	Retention *backup.Policy `json:"retention,omitempty"`
}

// DumpTask makes a recovery point of a stream that comes by StreamSocket.
type DumpTask struct {
	Volume points.Volume `json:"volume"`
	// Time is that of the state in the stream.
	Time time.Time `json:"time"`
	// Claim whose application prints it, for the point's record.
	Claim blocktree.Claim `json:"claim"`
	// Run is the UID of the run. An existing point of this volume that it made is the result: the
	// result of an earlier attempt was lost.
	Run string `json:"run"`
	// Consistency and Group are as in BackupTask.
	Consistency *blocktree.Consistency `json:"consistency,omitempty"`
	Group       *blocktree.Group       `json:"group,omitempty"`
	// NamespaceUID and Retention are as in BackupTask.
	NamespaceUID string         `json:"namespaceUID,omitempty"`
	Retention    *backup.Policy `json:"retention,omitempty"`
}

// FeedTask gives the stream of a recovery point to who connects to StreamSocket.
type FeedTask struct {
	PointID string `json:"pointID"`
}

// RestoreTask writes a recovery point to the device, reads it back and compares.
type RestoreTask struct {
	PointID string `json:"pointID"`
	// Delta reads the device first and writes only what differs.
	Delta bool `json:"delta,omitempty"`
}

// Result is a mover's result.
type Result struct {
	Version int  `json:"version"`
	OK      bool `json:"ok"`
	// Reason is a condition reason, and Message the same for users, if it is not OK.
	Reason  string `json:"reason,omitempty"`
	Message string `json:"message,omitempty"`
	// Again says that a retry may help.
	Again bool `json:"again,omitempty"`

	// Point that was made, and the storage's names of its sources.
	Point          *v1alpha1.PointSummary `json:"point,omitempty"`
	SnapshotHandle string                 `json:"snapshotHandle,omitempty"`
	ChangeID       string                 `json:"changeID,omitempty"`
	// Points that the volume has in the repository, newest first, at most
	// MaxListed, and how many there are.
	Listed     []ListedPoint `json:"listed,omitempty"`
	PointCount int64         `json:"pointCount,omitempty"`

	// NewLineage is why the point begins a lineage of its volume; empty if it does not.
	NewLineage string `json:"newLineage,omitempty"`

	Restore *RestoreResult `json:"restore,omitempty"`
	// Removed is the number of points deleted by retention, and KeepError why it could
	// not be applied; the new point is not affected.
	Removed int64 `json:"removed,omitempty"`
	// ByFloor counts the points that only the store's floor kept.
	ByFloor   int64  `json:"byFloor,omitempty"`
	KeepError string `json:"keepError,omitempty"`
	// Reclaimed bytes by maintenance.
	Reclaimed int64 `json:"reclaimed,omitempty"`
}

// ListedPoint is a recovery point in few bytes.
type ListedPoint struct {
	ID   string    `json:"i"`
	Time time.Time `json:"t"`
}

// RestoreResult is what a restore did.
type RestoreResult struct {
	// FileSystem found in the written data; empty if none is known.
	FileSystem string `json:"fileSystem,omitempty"`
	// DeviceBytes is the size of the device; PointBytes of the disk written to it.
	DeviceBytes   int64 `json:"deviceBytes"`
	PointBytes    int64 `json:"pointBytes"`
	WrittenBytes  int64 `json:"writtenBytes"`
	VerifiedBytes int64 `json:"verifiedBytes"`
}

// Encode returns the Result as a termination message, shortened to at most 4096 bytes.
func (r Result) Encode() []byte {
	r.Version = ProtocolVersion
	r.Message, r.KeepError, r.NewLineage = clip(r.Message, 1500), clip(r.KeepError, 300), clip(r.NewLineage, 300)
	for {
		p, err := json.Marshal(r)
		if err == nil && len(p) <= maxResult {
			return p
		}
		switch {
		case len(r.Listed) > 0:
			r.Listed = r.Listed[:len(r.Listed)/2]
		case r.Point != nil && len(r.Point.Fallbacks) > 0:
			point := *r.Point
			point.Fallbacks = nil
			r.Point = &point
		case len(r.Message) > 200:
			r.Message = clip(r.Message, 200)
		default:
			return []byte(`{"version":1,"reason":"MoverFailed","message":"the result does not fit into a termination message","again":true}`)
		}
	}
}

func clip(s string, n int) string {
	if len(s) <= n {
		return s
	}
	return strings.ToValidUTF8(s[:n], "") + "..."
}

// DecodeResult reads a termination message. ok is false if it is no Result: the mover was
// killed before it could write one, or is of another version.
func DecodeResult(message string) (r Result, ok bool) {
	if len(message) > maxResult || json.Unmarshal([]byte(message), &r) != nil || r.Version != ProtocolVersion {
		return Result{}, false
	}
	return r, r.OK || r.Reason != ""
}

// Variables returns the Task as a container's environment.
func (t Task) Variables() ([]corev1.EnvVar, error) {
	p, err := json.Marshal(t)
	if err != nil {
		return nil, err
	}
	// In a variable's value the kubelet replaces $(NAME) by another's, and $$ by one $.
	text := strings.ReplaceAll(string(p), "$", `\u0024`)
	var out []corev1.EnvVar
	for len(text) > maxVariable {
		n := maxVariable
		for !utf8.RuneStart(text[n]) {
			n--
		}
		out = append(out, corev1.EnvVar{Name: taskVariable(len(out)), Value: text[:n]})
		text = text[n:]
	}
	return append(out, corev1.EnvVar{Name: taskVariable(len(out)), Value: text}), nil
}

// taskVariable is the name of a Task's i-th variable.
func taskVariable(i int) string {
	if i == 0 {
		return TaskVariable
	}
	return fmt.Sprintf("%s_%d", TaskVariable, i)
}

// ReadTask reads and checks the Task in an environment.
func ReadTask(lookup func(name string) (string, bool)) (Task, error) {
	var text strings.Builder
	for i := 0; ; i++ {
		piece, ok := lookup(taskVariable(i))
		if !ok {
			return decodeTask(text.String())
		}
		text.WriteString(piece)
	}
}

func decodeTask(text string) (Task, error) {
	var t Task
	if err := json.Unmarshal([]byte(text), &t); err != nil {
		return t, fmt.Errorf("%s: %w", TaskVariable, err)
	}
	if t.Version != ProtocolVersion {
		return t, fmt.Errorf("%s has version %d, this mover speaks %d: controller and mover must be of one image", TaskVariable, t.Version, ProtocolVersion)
	}
	has := map[Action]bool{ActionBackup: t.Backup != nil, ActionRestore: t.Restore != nil, ActionMaintain: true, ActionDump: t.Dump != nil, ActionFeed: t.Feed != nil}
	if !has[t.Action] {
		return t, fmt.Errorf("%s does not say what to %s", TaskVariable, t.Action)
	}
	return t, nil
}

// Progress of a mover, a line of its log.
type Progress struct {
	Phase string `json:"phase"` // PhaseBackup and so on
	Done  int64  `json:"done"`  // bytes
	Total int64  `json:"total"` // bytes; 0 while unknown
}

// Phases of movers' work, from backup.Progress.
const (
	PhaseBackup    = "backup"     // the volume is read and stored
	PhaseSpotCheck = "spot check" // some blocks that were reported unchanged are read and compared
	PhaseRestore   = "restore"    // the point is written
	PhaseVerify    = "verify"     // it is read back and compared
)

// progressMark begins a line with a Progress.
const progressMark = `{"varve":"progress",`

// Line returns the log line, without its end.
func (p Progress) Line() string {
	b, err := json.Marshal(p)
	if err != nil {
		return ""
	}
	return progressMark + string(b[1:])
}

// LastProgress finds the newest progress in the tail of a log.
func LastProgress(log string) (p Progress, ok bool) {
	lines := strings.Split(log, "\n")
	for i := len(lines) - 1; i >= 0; i-- {
		rest, is := strings.CutPrefix(lines[i], progressMark)
		if is && json.Unmarshal([]byte("{"+rest), &p) == nil && p.Done >= 0 && p.Total >= 0 {
			return p, true
		}
	}
	return Progress{}, false
}

// Percent returns the part done, 0 to 100; nil while that is unknown.
func (p Progress) Percent() *int32 {
	if p.Total <= 0 {
		return nil
	}
	n := int32(min(float64(p.Done)/float64(p.Total), 1) * 100)
	return &n
}
