package ext4

import "fmt"

// POSIX ACLs are stored in a form of their own: version 1, entries of 4 bytes (tag,
// permissions) or 8 (with a user or group ID). The kernel presents version 2 with
// entries of 8 bytes throughout (include/uapi/linux/posix_acl_xattr.h).
const (
	aclStoredVersion    = 1
	aclPresentedVersion = 2
	aclNoID             = 0xffffffff

	aclUserObj  = 0x01
	aclUser     = 0x02
	aclGroupObj = 0x04
	aclGroup    = 0x08
	aclMask     = 0x10
	aclOther    = 0x20
)

// presentACL gives a stored ACL in the form of getxattr(2).
func presentACL(stored []byte) ([]byte, error) {
	if len(stored) < 4 || le.Uint32(stored) != aclStoredVersion {
		return nil, fmt.Errorf("no ACL of version %d", aclStoredVersion)
	}
	out := le.AppendUint32(nil, aclPresentedVersion)
	for e := stored[4:]; len(e) > 0; {
		if len(e) < 4 {
			return nil, fmt.Errorf("entry of %d bytes", len(e))
		}
		tag, id, length := le.Uint16(e), uint32(aclNoID), 4
		switch tag {
		case aclUserObj, aclGroupObj, aclMask, aclOther:
		case aclUser, aclGroup:
			if length = 8; len(e) < length {
				return nil, fmt.Errorf("entry of %d bytes", len(e))
			}
			id = le.Uint32(e[4:])
		default:
			return nil, fmt.Errorf("tag %#x", tag)
		}
		out = le.AppendUint16(out, tag)
		out = le.AppendUint16(out, le.Uint16(e[2:]))
		out = le.AppendUint32(out, id)
		e = e[length:]
	}
	return out, nil
}
