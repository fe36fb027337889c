package blocktree

import (
	"fmt"
	"slices"
	"strings"
)

// DiskIdentity is what distinguishes a disk from another one of the same name.
type DiskIdentity struct {
	// TableID is the partition table's own ID: "gpt GUID" or "mbr 1a2b3c4d".
	TableID string `json:"tableID,omitempty"`
	// Signatures of the disk, or of its partitions, by partition, without swap space, which
	// is remade without loss.
	Signatures []DiskSignature `json:"signatures,omitempty"`
	// Serial is the hardware's name of the disk: a WWN or a serial number.
	Serial string `json:"serial,omitempty"`
	// Blank means that there was no signature, and zeroes at both ends of the disk.
	Blank bool `json:"blank,omitempty"`
}

// DiskSignature is a file system, or a member of something that spans disks.
type DiskSignature struct {
	Partition int    `json:"partition,omitempty"` // 0 for the whole disk
	Type      string `json:"type"`                // in libblkid's words: "ext4", "LVM2_member"
	UUID      string `json:"uuid,omitempty"`
}

func (s DiskSignature) String() string {
	text := s.Type
	if s.UUID != "" {
		text += " with UUID " + s.UUID
	}
	if s.Partition > 0 {
		text += fmt.Sprintf(" in partition %d", s.Partition)
	}
	return text
}

// sameContent reports whether two signatures are of one file system, wherever on the
// disk it is.
func (s DiskSignature) sameContent(o DiskSignature) bool { return s.Type == o.Type && s.UUID == o.UUID }

func (d *DiskIdentity) has(s DiskSignature) bool {
	return slices.ContainsFunc(d.Signatures, s.sameContent)
}

// String describes in a few words what the disk holds.
func (d *DiskIdentity) String() string {
	switch {
	case len(d.Signatures) > 0:
		const shown = 3
		var list []string
		for _, s := range d.Signatures[:min(len(d.Signatures), shown)] {
			list = append(list, s.String())
		}
		if n := len(d.Signatures) - shown; n > 0 {
			list = append(list, fmt.Sprintf("%d more", n))
		}
		return strings.Join(list, ", ")
	case d.TableID != "":
		return "a partition table (" + d.TableID + ") without file systems"
	case d.Blank:
		return "nothing, it is blank"
	}
	return "no file system that is known"
}

// Differs returns why now cannot be the disk d, or "" if it may be. What is on the disk
// decides: a copy on other hardware, or read through a snapshot, is the same disk. If nothing
// on it has an identity, the serials decide.
func (d *DiskIdentity) Differs(now *DiskIdentity) string {
	const held = "it held %s, and holds %s now"
	same := true
	switch {
	case len(d.Signatures) > 0:
		same = slices.ContainsFunc(d.Signatures, now.has)
	case d.TableID != "":
		same = d.TableID == now.TableID
	case d.Blank:
		// It was empty: the first file system loses nothing.
	case now.Blank || now.TableID != "" || len(now.Signatures) > 0:
		same = false
	case d.Serial != "" && now.Serial != "" && d.Serial != now.Serial:
		return fmt.Sprintf("its serial was %q, and is %q now", d.Serial, now.Serial)
	}
	if same {
		return ""
	}
	text := fmt.Sprintf(held, d, now)
	if d.Serial != "" && now.Serial != "" && d.Serial != now.Serial {
		text += fmt.Sprintf("; its serial was %q, and is %q now", d.Serial, now.Serial)
	}
	return text
}

// Recognises reports whether now is known to be the disk d: they share a signature with a
// UUID, a partition table, or, if neither has either, a serial.
func (d *DiskIdentity) Recognises(now *DiskIdentity) bool {
	if d.Differs(now) != "" {
		return false
	}
	for _, s := range d.Signatures {
		if s.UUID != "" && now.has(s) {
			return true
		}
	}
	return d.TableID != "" && d.TableID == now.TableID ||
		len(d.Signatures) == 0 && len(now.Signatures) == 0 && d.Serial != "" && d.Serial == now.Serial
}

// Changes lists what is worth a note although the disk is the same one.
func (d *DiskIdentity) Changes(now *DiskIdentity) []string {
	var out []string
	if d.Serial != "" && now.Serial != "" && d.Serial != now.Serial {
		out = append(out, fmt.Sprintf("the disk's serial was %q before and is %q now; its content is the same disk's", d.Serial, now.Serial))
	}
	for _, s := range d.Signatures {
		if !now.has(s) {
			out = append(out, fmt.Sprintf("%s is no longer on the disk", s))
		}
	}
	return out
}
