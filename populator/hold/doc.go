// Package hold holds applications still while their volumes are snapshotted: a database has
// flushed and takes no writes, a file system is frozen.
//
// Each application is held by one exec in its pod, from before the cut of the snapshot until after
// it. The exec runs a small shell program (hold.sh), which freezes, reports that, answers a
// challenge after the cut, and thaws: on request, when the stream ends, when the controller is
// silent, when its time is over, and when one of its own processes is killed. So the death of the
// controller, the API server, the kubelet or a process of the program leaves no application frozen.
// The death of the container ends all processes of the program: what does not end with a session is
// then thawed by another exec in the same pod, if there can be one (again.go). A snapshot is called
// consistent only if the program that froze reports after the cut, over the same stream, that it did
// not thaw before.
//
// Programs are POSIX sh; the container needs sh, sleep, and what the commands of the hook
// need.
package hold
