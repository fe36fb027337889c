package xfs

import (
	"encoding/binary"
	"fmt"
)

// aclNames are the trusted attributes that hold access control lists.
var aclNames = map[string]string{
	"SGI_ACL_FILE":    "system.posix_acl_access",
	"SGI_ACL_DEFAULT": "system.posix_acl_default",
}

const (
	aclEntryDisk = 12 // tag, id, permissions, padding
	aclVersion   = 2  // POSIX_ACL_XATTR_VERSION

	aclUser  = 0x02
	aclGroup = 0x08
)

// presentACL turns an access control list as XFS keeps it (number of entries; for each
// tag and id of 32 bits, permissions of 16 bits, padding; big-endian) into what
// getxattr(2) gives (version; for each tag and permissions of 16 bits, id of 32
// bits; little-endian).
func presentACL(b []byte) ([]byte, error) {
	if len(b) < 4 {
		return nil, fmt.Errorf("list of %d bytes", len(b))
	}
	n := int64(be32(b, 0))
	if n*aclEntryDisk != int64(len(b)-4) {
		return nil, fmt.Errorf("list of %d entries in %d bytes", n, len(b))
	}
	out := binary.LittleEndian.AppendUint32(nil, aclVersion)
	for b = b[4:]; len(b) > 0; b = b[aclEntryDisk:] {
		tag, id := be32(b, 0), be32(b, 4)
		if tag > 0xffff {
			return nil, fmt.Errorf("entry with tag %#x", tag)
		}
		if tag != aclUser && tag != aclGroup {
			id = 0xffffffff // of no one in particular
		}
		out = binary.LittleEndian.AppendUint16(out, uint16(tag))
		out = binary.LittleEndian.AppendUint16(out, be16(b, 8))
		out = binary.LittleEndian.AppendUint32(out, id)
	}
	return out, nil
}
