// Package stream passes the output of a command in a pod to a mover, completely or not at all, and a recovery
// point from a mover to a command in a pod.
//
// The controller runs the command by an exec in the application's pod, and forwards its standard
// output through an exec in the mover's pod: a mover has no rights in the cluster, and the
// application's pod needs no access to the storage. An output is complete if all of these hold:
//
//   - the command ended with status 0, as reported by the program that runs it (dump.sh);
//   - the program counted as many bytes as arrived, since an exec that was cut can end without
//     an error, and a pipe ends in the same way when its producer ends and when it dies;
//   - the controller then writes the end of the stream (Writer). Without that the mover makes no
//     recovery point.
//
// The other way, a recovery point comes from the mover as frames, each of which the controller has asked for,
// and goes to the command piece by piece (feed.sh). The command sees the end of its input only after the
// last byte: in all other cases it is killed.
//
// The container of the application needs sh, sleep, tee and wc, or dd for a feed, and what the command needs.
package stream
