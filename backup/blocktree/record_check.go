package blocktree

import (
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/varve-io/varve/internal/plain"
)

// Bounds of what a record holds.
const (
	// maxGeneration leaves room for any chain and for arithmetic on it.
	maxGeneration = 1 << 40
	// maxText bounds a text or handle, maxLabel a short one, in bytes.
	maxText  = 4 << 10
	maxLabel = 256
)

// unknownToken replaces an invalid code.
const unknownToken = "unknown"

// Check rejects a record with fields that no Varve writes, and makes its texts safe to show.
// Any client that can write to a repository can write anything into a record and its
// manifest's tags, so every reader of either calls it:
//
//	field                                    it reaches                             rule
//	id, parent, lineage                      directories, exports, records, labels  ValidID
//	generation                               order, bitmaps, the child's            1 to 2^40
//	kind                                     lists, labels                          one of two
//	content                                  what the bytes are taken for           none, or a stream
//	size, blockSize                          allocations, arithmetic                Layout.Check; a stream has no blocks
//	time, start, end                         names of points, paths, JSON           years 0 to 9999
//	readErrors                               sums, lists                            ranges of the disk
//	group                                    members of groups, names, deletions    Group.Check
//	consistency (times, durations)           JSON                                   years 0 to 9999, not negative
//	claim.volumeMode                         new claims                             one of two, or none
//	claim.requestBytes, claim.capacity       new claims                             not negative
//	root, zeroBlock, zeroSegment             object look-ups                        OpenRoot parses them
//	source, fallbacks (from, to, reason),    metrics, events, conditions            a token, or "unknown"
//	consistency (level, method)
//	namespace, name, cluster                 lists (a point goes by its manifest)   plain, bounded text
//	changeID, volumeHandle, snapshotHandle   requests to storage, errors, lists     plain, bounded text
//	run                                      a repeated run compares its own        plain, bounded text
//	disk, lineageReason, fallbacks (detail), events, notes, lists                   plain, bounded text
//	notes, claim (others), spotCheck.limit,
//	consistency (others),
//	fileSystem, toolVersion
//	stats, spotCheck                         numbers in lists                       shown as they are
//	Extra                                    JSON output                            encoded as JSON
func (r *Record) Check() error {
	for _, id := range []struct{ what, id string }{{"its parent", r.Parent}, {"its lineage", r.Lineage}} {
		if id.id != "" && !ValidID(id.id) {
			return r.wrong("%s %q is not the ID of a recovery point", id.what, plain.Clip(id.id, maxLabel))
		}
	}
	switch {
	case !ValidID(r.ID):
		return fmt.Errorf("record: %q is not the ID of a recovery point", plain.Clip(r.ID, maxLabel))
	case r.Generation < 1 || r.Generation > maxGeneration:
		return r.wrong("generation %d", r.Generation)
	case r.Kind != KindFull && r.Kind != KindIncremental:
		return r.wrong("kind %q", plain.Clip(r.Kind, maxLabel))
	case !ValidTime(r.Time) || !ValidTime(r.Start) || !ValidTime(r.End):
		return r.wrong("a time is outside of the years 0 to 9999")
	}
	if err := r.checkLayout(); err != nil {
		return err
	}
	if err := r.checkRanges(); err != nil {
		return r.wrong("%w", err)
	}
	if g := r.Group; g != nil {
		if err := g.Check(); err != nil {
			return r.wrong("%w", err)
		}
	}
	if c := r.Consistency; c != nil {
		if err := c.check(r); err != nil {
			return err
		}
	}
	if c := r.Claim; c != nil {
		if !slices.Contains([]string{"", "Block", "Filesystem"}, c.VolumeMode) {
			return r.wrong("volume mode %q", plain.Clip(c.VolumeMode, maxLabel))
		}
		if c.RequestBytes < 0 || c.Capacity < 0 {
			return r.wrong("a claim of %d bytes on a volume of %d", c.RequestBytes, c.Capacity)
		}
	}
	r.clean()
	return nil
}

func (r *Record) checkLayout() error {
	switch r.Content {
	case "":
		if err := (Layout{Size: r.Size, BlockSize: r.BlockSize}).Check(); err != nil {
			return r.wrong("%w", err)
		}
	case ContentStream:
		if r.Size < 0 || r.Size > MaxSize || r.BlockSize != 0 || r.Kind != KindFull || r.Disk != nil || len(r.ReadErrors) > 0 {
			return r.wrong("a stream of %d bytes in blocks of %d", r.Size, r.BlockSize)
		}
	default:
		return r.wrong("its content %q is not known; a newer version of Varve may read it", plain.Clip(r.Content, maxLabel))
	}
	return nil
}

func (r *Record) wrong(format string, args ...any) error {
	return fmt.Errorf("record of %s: "+format, append([]any{plain.Clip(r.ID, maxLabel)}, args...)...)
}

// checkRanges checks that unread ranges are within the disk, sorted and apart, so that their
// lengths add up to no more than its size.
func (r *Record) checkRanges() error {
	end := int64(0)
	for _, bad := range r.ReadErrors {
		if bad.Offset < end || bad.Length < 0 || bad.Length > r.Size-bad.Offset {
			return fmt.Errorf("an unread range of %d bytes at %d of a disk of %d", bad.Length, bad.Offset, r.Size)
		}
		end = bad.End()
	}
	return nil
}

// clean makes all texts safe to show.
func (r *Record) clean() {
	token := func(list ...*string) {
		for _, s := range list {
			if *s != "" && !plain.Token(*s) {
				*s = unknownToken
			}
		}
	}
	text := func(limit int, list ...*string) {
		for _, s := range list {
			*s = plain.Clip(*s, limit)
		}
	}
	text(maxLabel, &r.Namespace, &r.Name, &r.Cluster, &r.Root, &r.ZeroBlock, &r.ZeroSegment, &r.Run, &r.FileSystem, &r.ToolVersion)
	text(maxText, &r.ChangeID, &r.SnapshotHandle, &r.VolumeHandle, &r.LineageReason)
	token(&r.Source)
	for i := range r.Fallbacks {
		f := &r.Fallbacks[i]
		token(&f.From, &f.To, &f.Reason)
		text(maxText, &f.Detail)
	}
	for i := range r.Notes {
		text(maxText, &r.Notes[i])
	}
	if r.Consistency != nil {
		r.Consistency.clean()
	}
	if r.SpotCheck != nil {
		text(maxLabel, &r.SpotCheck.Limit)
	}
	if c := r.Claim; c != nil {
		text(maxLabel, &c.UID, &c.NamespaceUID, &c.StorageClass, &c.Driver)
		for i := range c.AccessModes {
			text(maxLabel, &c.AccessModes[i])
		}
	}
	if d := r.Disk; d != nil {
		text(maxLabel, &d.TableID, &d.Serial)
		for i := range d.Signatures {
			text(maxLabel, &d.Signatures[i].Type, &d.Signatures[i].UUID)
		}
	}
}

// ErrHandle means that a handle would change when it is read back.
var ErrHandle = errors.New("a handle is at most 4096 bytes without control characters")

// CheckHandle rejects a change ID, volume handle or snapshot handle that a reader of the
// record would change.
func CheckHandle(s string) error {
	if plain.Clip(s, maxText) != s {
		return ErrHandle
	}
	return nil
}

// ValidTime reports whether a time can be written in a name and as JSON in UTC.
func ValidTime(t time.Time) bool {
	y := t.UTC().Year()
	return y >= 0 && y <= 9999
}

// ValidID reports whether s is the ID of a recovery point: 32 lower-case hexadecimal digits.
// IDs name directories, exports and records, and any writer to a repository can write invalid
// ones.
func ValidID(s string) bool {
	return len(s) == 32 && strings.Trim(s, "0123456789abcdef") == ""
}
