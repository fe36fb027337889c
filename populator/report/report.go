// Package report tells users what becomes of their objects: events, each once, and
// conditions that keep the time of their last change.
package report

import (
	"fmt"
	"strings"
	"time"

	lru "github.com/hashicorp/golang-lru/v2/expirable"
	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/tools/record"
	"sigs.k8s.io/controller-runtime/pkg/client"
)

// Events on users' objects. One that was said already is not said again for a while: a
// reconcile that meets the same trouble every few seconds is one event. Safe for
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
	// maxMessage is what the API server takes of an event's message, in bytes.
	maxMessage = 1024
)

// NewEvents says them through a recorder.
func NewEvents(r record.EventRecorder) *Events {
	return &Events{recorder: r, said: lru.NewLRU[said, struct{}](saidEntries, nil, saidFor)}
}

// Normal tells of what went as it should.
func (e *Events) Normal(o client.Object, reason, format string, args ...any) {
	e.say(o, corev1.EventTypeNormal, reason, fmt.Sprintf(format, args...))
}

// Warning tells of what somebody may have to look at.
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

// maxCondition bounds a condition's message, in bytes. The API server takes 32 KiB; a
// ProtectedVolume's whole status is to stay below 16.
const maxCondition = 4 << 10

// clip cuts a text to so many bytes, between characters.
func clip(s string, n int) string {
	if len(s) <= n {
		return s
	}

	return strings.ToValidUTF8(s[:n-3], "") + "..."
}

// Condition sets a condition and says whether that changed anything.
func Condition(list *[]metav1.Condition, o client.Object, kind string, status metav1.ConditionStatus, reason, message string) bool {
	message = clip(message, maxCondition)

	return meta.SetStatusCondition(list, metav1.Condition{
		Type: kind, Status: status, Reason: reason, Message: message, ObservedGeneration: o.GetGeneration(),
	})
}
