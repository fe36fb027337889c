// Package mover is how the controller has data moved: the pod that does it, what that pod
// is told, and what it answers.
//
// A mover is a Job in Varve's namespace, one pod and one attempt. It is told what to do by a
// Task, JSON without secrets in its environment, and finds the store's
// credentials as files of a mounted Secret. It has no Kubernetes API credentials. It
// answers with a Result in the container's termination message, and shows its progress as
// log lines. The controller makes the next attempt if one is called for.
//
// The other side, what runs in the pod, is package work.
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
	"github.com/varve-io/varve/populator/store"
)

// ProtocolVersion is of Task and Result. A mover refuses a Task of another version: the
// controller and its movers are of one image.
const ProtocolVersion = 1

// Places in a mover's file system, and the variable with its Task.
const (
	// TaskVariable has the Task, or its beginning: what does not fit is in VARVE_TASK_1,
	// VARVE_TASK_2 and so on.
	TaskVariable = "VARVE_TASK"
	// DevicePath is the block device that is read or written.
	DevicePath = "/dev/varve"
	// StoreDir has the store's credentials, a file for each key.
	StoreDir = "/var/run/varve/store"
	// TokenFile is the token for the driver's SnapshotMetadata service.
	TokenFile = "/var/run/varve/metadata/token"
	// ScratchDir is writable, and gone with the pod.
	ScratchDir = "/var/lib/varve"
	// ConfigDir is writable and in memory: the connection's configuration has the
	// credentials in it, which are on no node's disk.
	ConfigDir = "/var/run/varve/connection"
	// VolumeDir is the claim of a volume storage.
	VolumeDir = "/var/run/varve/volume"
	// TerminationPath takes the Result.
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
)

// Task is what a mover is told. Exactly the member that Action names is set; maintain
// has none.
type Task struct {
	Version int            `json:"version"`
	Action  Action         `json:"action"`
	Store   store.Settings `json:"store"`
	Backup  *BackupTask    `json:"backup,omitempty"`
	Restore *RestoreTask   `json:"restore,omitempty"`
}

// BackupTask makes a recovery point of the device.
type BackupTask struct {
	Volume backup.Volume `json:"volume"`
	// Full takes no block from a parent.
	Full bool `json:"full,omitempty"`
	// Time of the snapshot, which is the point's.
	Time time.Time `json:"time"`
	// Claim that was backed up, for the point's record.
	Claim blocktree.Claim `json:"claim"`
	// Changed says where changed blocks are told and which snapshot is read. A point
	// of that snapshot that is there already is the answer: an earlier attempt made it.
	Changed csi.Options `json:"changed"`
	// VerifyUnchanged is the share of the blocks reported unchanged to read, 0 to 1.
	VerifyUnchanged float64 `json:"verifyUnchanged"`
	// NamespaceUID is set where the store takes namespaces of one name and several UIDs
	// for several: points of others are neither listed nor removed.
	NamespaceUID string `json:"namespaceUID,omitempty"`
	// Retention to apply to the volume once the point is there; nil for none.
	Retention *backup.Policy `json:"retention,omitempty"`
}

// RestoreTask writes a recovery point to the device, reads it back and compares.
type RestoreTask struct {
	PointID string `json:"pointID"`
}

// Result is what a mover answers.
type Result struct {
	Version int  `json:"version"`
	OK      bool `json:"ok"`
	// Reason is a condition reason, and Message the same for people, if it is not OK.
	Reason  string `json:"reason,omitempty"`
	Message string `json:"message,omitempty"`
	// Again says that another attempt may help.
	Again bool `json:"again,omitempty"`

	// Point that was made, and what the storage calls what it was made of.
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
	// Removed points by retention, and KeepError why it could not be applied; the
	// point itself is not affected.
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
	// FileSystem found in what was written; empty if none is known.
	FileSystem string `json:"fileSystem,omitempty"`
	// DeviceBytes is the size of the device; PointBytes of the disk written to it.
	DeviceBytes   int64 `json:"deviceBytes"`
	PointBytes    int64 `json:"pointBytes"`
	WrittenBytes  int64 `json:"writtenBytes"`
	VerifiedBytes int64 `json:"verifiedBytes"`
}

// Encode is the Result as a termination message: at most 4096 bytes, whatever it takes.
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

// Variables are the Task as a container's environment.
func (t Task) Variables() ([]corev1.EnvVar, error) {
	p, err := json.Marshal(t)
	if err != nil {
		return nil, err
	}
	// In a variable's value the kubelet takes $(NAME) for another's, and $$ for one $.
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

// ReadTask reads the Task that an environment holds, and checks it.
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
	has := map[Action]bool{ActionBackup: t.Backup != nil, ActionRestore: t.Restore != nil, ActionMaintain: true}
	if !has[t.Action] {
		return t, fmt.Errorf("%s does not say what to %s", TaskVariable, t.Action)
	}

	return t, nil
}

// Progress of a mover, a line of its log.
type Progress struct {
	Phase string `json:"phase"`
	Done  int64  `json:"done"`  // bytes
	Total int64  `json:"total"` // bytes; 0 while unknown
}

// progressMark begins a line with a Progress.
const progressMark = `{"varve":"progress",`

// Line is the log line, without its end.
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

// Percent done, 0 to 100; nil while that is unknown.
func (p Progress) Percent() *int32 {
	if p.Total <= 0 {
		return nil
	}
	n := int32(min(float64(p.Done)/float64(p.Total), 1) * 100)

	return &n
}
