package probe

import (
	"fmt"
	"strings"
)

// Describe says what a signature is in a few words: `ext4 file system "root" (UUID …)`.
func (s *Signature) Describe() string {
	var b strings.Builder
	switch {
	case s.Type == "swap":
		b.WriteString("swap space")
	case s.Type == "LVM2_member":
		b.WriteString("an LVM physical volume")
	case s.Type == "crypto_LUKS":
		b.WriteString("a LUKS encrypted volume")
	case s.Type == "linux_raid_member":
		fmt.Fprintf(&b, "a member of a Linux RAID array (%s)", s.Array.Describe())
	case s.Usage == FileSystem:
		fmt.Fprintf(&b, "an %s file system", s.Type)
		if !strings.ContainsRune("aeioux", rune(s.Type[0]|0x20)) || strings.HasPrefix(s.Type, "ufs") || strings.HasPrefix(s.Type, "ubifs") || strings.HasPrefix(s.Type, "udf") {
			b.Reset()
			fmt.Fprintf(&b, "a %s file system", s.Type)
		}
	case s.Array != nil:
		fmt.Fprintf(&b, "a member of a %s (%s)", s.Array.Level, s.Type)
	default:
		b.WriteString(s.Type)
	}
	if s.Label != "" {
		fmt.Fprintf(&b, " %q", s.Label)
	}
	if s.UUID != "" {
		fmt.Fprintf(&b, ", UUID %s", s.UUID)
	}
	return b.String()
}

var schemes = map[string]string{
	"gpt": "a GPT partition table", "mbr": "an MBR partition table", "mac": "an Apple partition map",
	"sun": "a Sun disk label", "sgi": "an SGI disk label", "bsd": "a BSD disk label", "aix": "an AIX disk label",
	"ultrix": "an Ultrix disk label", "dasd": "a DASD volume label", "atari": "an Atari partition table",
}

// Describe says in a few words what the table is.
func (t *Table) Describe() string {
	name, ok := schemes[t.Scheme]
	if !ok {
		name = "a partition table (" + t.Scheme + ")"
	}
	if t.Foreign {
		return name
	}
	switch n := len(t.Partitions); n {
	case 0:
		return name + " without partitions"
	case 1:
		return name + " with 1 partition"
	default:
		return fmt.Sprintf("%s with %d partitions", name, n)
	}
}

// Describe says in one line what is on the disk; empty if that is nothing known.
func (c *Contents) Describe() string {
	switch {
	case c.Signature != nil:
		return c.Signature.Describe()
	case c.Table == nil:
		return ""
	}
	text := c.Table.Describe()
	var found []string
	for i, s := range c.Volumes {
		if s != nil && len(found) < 4 {
			found = append(found, fmt.Sprintf("partition %d: %s", c.Table.Partitions[i].Number, s.Describe()))
		}
	}
	if len(found) > 0 {
		text += " (" + strings.Join(found, "; ") + ")"
	}
	return text
}

// Same reports whether two disks hold the same thing: the same file system, array or pool by its
// UUID, or the same partition table by its ID. Where a format has no such ID, its type decides.
func (c *Contents) Same(other *Contents) bool {
	switch {
	case c.Signature != nil && other.Signature != nil:
		a, b := c.Signature, other.Signature
		if a.UUID != "" || b.UUID != "" {
			return a.UUID == b.UUID && a.MemberUUID == b.MemberUUID
		}
		return a.Type == b.Type
	case c.Table != nil && other.Table != nil:
		return c.Table.Scheme == other.Table.Scheme && c.Table.ID == other.Table.ID
	}
	return c.Empty() && other.Empty()
}
