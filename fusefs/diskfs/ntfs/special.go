package ntfs

import (
	"fmt"
	"strings"
	"syscall"
)

// Reparse tags, [MS-FSCC] 2.1.2.1.
const (
	tagMountPoint = 0xa0000003
	tagSymlink    = 0xa000000c
	tagLXSymlink  = 0xa000001d
	tagAFUnix     = 0x80000023
	tagLXFIFO     = 0x80000024
	tagLXChar     = 0x80000025
	tagLXBlock    = 0x80000026

	maxReparse = 16 << 10 // MAXIMUM_REPARSE_DATA_BUFFER_SIZE
	maxTarget  = 4095     // bytes of a target that Linux takes (PATH_MAX)
)

// tagNames are those that leave no content to read here.
var tagNames = map[uint32]string{
	0x80000013: "deduplicated file",
	0x80000017: "file compressed by the Windows Overlay Filter (CompactOS)",
	0x8000001b: "application execution link",
	0xc0000004: "file in hierarchical storage",
}

// special distinguishes links, devices and the like from plain files: by a reparse point, by
// the content that Interix and ntfs-3g give them, or by attributes of WSL.
func (n *inode) special(flags uint32) error {
	var major, minor uint32
	if ea := n.rec.find(attrEA, ""); ea != nil {
		major, minor = n.attributes(ea)
	}
	if point := n.rec.find(attrReparse, ""); point != nil {
		b, err := n.small(point, attrReparse, maxReparse)
		if err != nil {
			return err
		}
		if err := n.reparse(b); err != nil {
			return err
		}
	} else if flags&fileSystem != 0 && n.is(syscall.S_IFREG) {
		if err := n.interix(); err != nil {
			return err
		}
	}
	if n.is(syscall.S_IFCHR) || n.is(syscall.S_IFBLK) {
		if major|minor != 0 {
			n.stat.Major, n.stat.Minor = major, minor
		}
	}
	return nil
}

// small reads an attribute of at most limit bytes.
func (n *inode) small(a *attribute, typ uint32, limit int64) ([]byte, error) {
	if a.size > limit {
		return nil, corrupt(fmt.Sprintf("record %d", n.rec.ino), "attribute %#x of %d bytes", typ, a.size)
	}
	s, err := n.rec.stream(n.fs, typ, a.name)
	if err != nil {
		return nil, err
	}
	b := make([]byte, s.size)
	return b, s.read(b, 0)
}

// setType makes the file one of another type; its permissions stay.
func (n *inode) setType(typ uint32) { n.stat.Mode = n.stat.Mode&^syscall.S_IFMT | typ }

// link makes the file a symbolic link.
func (n *inode) link(target string) error {
	if target == "" || len(target) > maxTarget || strings.IndexByte(target, 0) >= 0 {
		return corrupt(fmt.Sprintf("record %d", n.rec.ino), "link to %d bytes", len(target))
	}
	n.target = target
	n.stat.Mode = syscall.S_IFLNK | 0o777
	return nil
}

// reparse reads a reparse point: tag (4), length of its data (2+2), the data. Those of
// Windows' links: place and length of the target, the same of what is shown (2 each),
// flags (4, symbolic links only), texts.
func (n *inode) reparse(b []byte) error {
	where := fmt.Sprintf("record %d reparse point", n.rec.ino)
	if len(b) < 8 || int(le.Uint16(b[4:])) > len(b)-8 {
		return corrupt(where, "%d bytes", len(b))
	}
	tag, data := le.Uint32(b), b[8:8+int(le.Uint16(b[4:]))]
	switch tag {
	case tagSymlink, tagMountPoint:
		texts := 8
		if tag == tagSymlink {
			texts = 12
		}
		if len(data) < texts {
			return corrupt(where, "%d bytes of a link", len(data))
		}
		at, length := int(le.Uint16(data)), int(le.Uint16(data[2:]))
		relative := tag == tagSymlink && le.Uint32(data[8:])&1 != 0
		if data = data[texts:]; at > len(data) || length > len(data)-at {
			return corrupt(where, "target at %d, %d bytes of %d", at, length, len(data))
		}
		return n.link(windowsTarget(text(data[at:at+length]), relative))
	case tagLXSymlink: // version (4), the target as Linux has it
		if len(data) < 4 {
			return corrupt(where, "%d bytes of a link", len(data))
		}
		return n.link(string(data[4:]))
	case tagAFUnix:
		n.setType(syscall.S_IFSOCK)
	case tagLXFIFO:
		n.setType(syscall.S_IFIFO)
	case tagLXChar:
		n.setType(syscall.S_IFCHR)
	case tagLXBlock:
		n.setType(syscall.S_IFBLK)
	default:
		name := tagNames[tag]
		if tag&0xffff0fff == 0x9000001a {
			name = "file kept in a cloud"
		} else if name == "" {
			name = "reparse point"
		}
		n.refuse = unsupported("%s (reparse tag %#x, record %d)", name, tag, n.rec.ino)
	}
	return nil
}

// windowsTarget writes a target with slashes. An absolute one is taken as a path on this
// volume: \??\C:\Users is /Users.
func windowsTarget(s string, relative bool) string {
	s = strings.ReplaceAll(s, `\`, "/")
	if relative {
		return s
	}
	s = strings.TrimPrefix(s, "/??/")
	if len(s) >= 2 && s[1] == ':' {
		s = s[2:]
	}
	return "/" + strings.TrimLeft(s, "/")
}

// interix reads what Interix and ntfs-3g write into files with the attribute "system":
// "IntxLNK\1" and the target in UTF-16, "IntxCHR\0" or "IntxBLK\0" and two numbers of
// 8 bytes. Their pipes and sockets, which are files of 0 and 1 bytes, cannot be distinguished
// from others and stay files.
func (n *inode) interix() error {
	const magic, device = 8, 24
	if n.stat.Size <= magic || n.stat.Size > magic+2*maxTarget {
		return nil
	}
	s, err := n.content()
	if err != nil {
		return nil //nolint:nilerr // reported to readers of the file
	}
	b := make([]byte, s.size)
	if err := s.read(b, 0); err != nil {
		return err
	}
	switch head := string(b[:magic]); {
	case head == "IntxLNK\x01":
		return n.link(text(b[magic:]))
	case (head == "IntxCHR\x00" || head == "IntxBLK\x00") && len(b) == device:
		n.stat.Major, n.stat.Minor = uint32(le.Uint64(b[8:])), uint32(le.Uint64(b[16:]))
		if n.setType(syscall.S_IFCHR); head[4] == 'B' {
			n.setType(syscall.S_IFBLK)
		}
	}
	return nil
}

// attributes takes owner and mode from the extended attributes of WSL, and gives a
// device's numbers. An entry: distance to the next (4), flags (1), length of the name
// (1) and of the value (2), the name, a zero, the value. What is damaged is left out:
// the file can be read without.
func (n *inode) attributes(ea *attribute) (major, minor uint32) {
	b, err := n.small(ea, attrEA, maxXattr)
	if err != nil {
		return 0, 0
	}
	for len(b) >= 8 {
		next, name, value := le.Uint32(b), int(b[5]), int(le.Uint16(b[6:]))
		if 8+name+1+value > len(b) {
			break
		}
		v := b[8+name+1:][:value]
		switch key := string(b[8 : 8+name]); {
		case key == "$LXUID" && value == 4:
			n.stat.UID = le.Uint32(v)
		case key == "$LXGID" && value == 4:
			n.stat.GID = le.Uint32(v)
		case key == "$LXMOD" && value == 4: // the type is what the record says
			n.stat.Mode = n.stat.Mode&syscall.S_IFMT | le.Uint32(v)&0o7777
		case key == "$LXDEV" && value == 8:
			major, minor = le.Uint32(v), le.Uint32(v[4:])
		}
		if next < 8 || next > uint32(len(b)) {
			break
		}
		b = b[next:]
	}
	return major, minor
}
