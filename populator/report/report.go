// Package report informs users about their objects: by events, each once, and by
// conditions that keep the time of their last change.
package report

import (
	"fmt"
	"time"

	lru "github.com/hashicorp/golang-lru/v2/expirable"
	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/tools/record"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"github.com/varve-io/varve/internal/plain"
)

// Events writes events on users' objects. An event is not repeated for a while: a
// reconcile that meets the same trouble every few seconds makes one event. Safe for
// concurrent use.
type Events struct {
	recorder record.EventRecorder
	said     *lru.LRU[said, struct{}]
}

type said struct {
	uid             types.UID
	reason, message string
}

const (
	saidEntries = 8192
	saidFor     = 30 * time.Minute
	// maxMessage is the API server's limit of an event's message, in bytes.
	maxMessage = 1024
)

// NewEvents writes them through a recorder.
func NewEvents(r record.EventRecorder) *Events {
	return &Events{recorder: r, said: lru.NewLRU[said, struct{}](saidEntries, nil, saidFor)}
}

// Normal reports a success.
func (e *Events) Normal(o client.Object, reason, format string, args ...any) {
	e.say(o, corev1.EventTypeNormal, reason, fmt.Sprintf(format, args...))
}

// Warning reports what a person may have to check.
func (e *Events) Warning(o client.Object, reason, format string, args ...any) {
	e.say(o, corev1.EventTypeWarning, reason, fmt.Sprintf(format, args...))
}

func (e *Events) say(o client.Object, kind, reason, message string) {
	message = clip(message, maxMessage)
	key := said{o.GetUID(), reason, message}
	if e.said.Contains(key) {
		return
	}
	e.said.Add(key, struct{}{})
	e.recorder.Event(o, kind, reason, message)
}

// Seen returns when an event was last seen; writers fill in different time fields.
func Seen(e *corev1.Event) time.Time {
	t := e.LastTimestamp.Time
	if e.Series != nil && e.Series.LastObservedTime.After(t) {
		t = e.Series.LastObservedTime.Time
	}
	for _, other := range []time.Time{e.EventTime.Time, e.CreationTimestamp.Time} {
		if t.IsZero() {
			t = other
		}
	}
	return t
}

// maxCondition bounds a condition's message, in bytes. The API server accepts 32 KiB; a
// ProtectedVolume's whole status stays below 16.
const maxCondition = 4 << 10

// clip makes one plain line of a text, which may contain words of a repository or a driver,
// and truncates it to so many bytes.
func clip(s string, n int) string { return plain.Clip(plain.Line(s), n) }

// Condition sets a condition and reports whether it changed.
func Condition(list *[]metav1.Condition, o client.Object, kind string, status metav1.ConditionStatus, reason, message string) bool {
	message = clip(message, maxCondition)
	return meta.SetStatusCondition(list, metav1.Condition{
		Type: kind, Status: status, Reason: reason, Message: message, ObservedGeneration: o.GetGeneration(),
	})
}
