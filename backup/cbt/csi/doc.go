// Package csi asks a CSI driver which blocks of a snapshot hold data, or changed
// since another snapshot: the SnapshotMetadata service of KEP-3314, spoken to the
// driver's external-snapshot-metadata sidecar.
//
// # Use
//
//	session, err := csi.Open(ctx, csi.Options{
//		Endpoint:  csi.Endpoint{Address: "metadata.storage.svc:6443", CABundle: pem, Audience: "metadata"},
//		TokenFile: "/var/run/secrets/varve/metadata/token",
//		Target:    csi.Snapshot{Namespace: "varve", Name: "backup-7",
//			Handle: "snap-42", ChangeID: "snap-42", VolumeHandle: "vol-1"},
//		Base:      &csi.Snapshot{Handle: "snap-41", ChangeID: "snap-41", VolumeHandle: "vol-1"},
//	})
//	defer session.Close()
//	opt := backup.Options{Disk: device, ...}
//	opt.Source, opt.Fallback = session.Ladder()
//	opt.OnFallback = func(f blocktree.Fallback) { event(f); fallbacks.WithLabelValues(f.Reason).Inc() }
//	point, record, err := backup.Run(ctx, repo, opt)
//
// The engine asks the rungs of the ladder in order: Delta (what changed), Allocated
// (what holds data), Whole (read and compare everything). A rung that cannot answer
// fails with a cbt.Reason and the next one is asked; a service that refuses our
// credentials ends the backup (cbt.ErrDenied), because a user has to grant
// something. Whichever rung answers, the new point is recorded with the target's change
// ID, snapshot handle and volume handle, so that the next increment can be a delta.
//
// Options is plain data beside the token source, clock and dialer, and goes through
// JSON: a controller writes it, a mover reads it. Package csikube fills it from a
// cluster; nothing here knows Kubernetes' API.
//
// # When the listing is complete
//
// The protocol's only sign of completeness is a clean end of the stream, and drivers end
// cleanly when they are cancelled too: the sidecar does so after ten minutes. So after
// each clean end the service is asked again from the end of the last range, until
// nothing more comes. A stream that breaks is taken up at that offset as well; the
// first range may then begin before it, and is clipped.
//
// What a driver leaves out on purpose cannot be seen here. The engine's spot check
// reads a sample of the blocks reported unchanged.
//
// # Memory and concurrency
//
// Ranges are handed on as they come and nothing is kept but the last offset; the engine
// keeps two bits per block. A Session may be used by one goroutine at a time; its
// Stats by any.
package csi
