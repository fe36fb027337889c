package browse

import (
	"encoding/binary"
	"fmt"
	"strings"
)

// Archives hold access lists as text (records of star, which GNU tar and bsdtar also write);
// GNU tar does not restore them as attributes.
var aclRecords = map[string]string{
	"system.posix_acl_access":  "SCHILY.acl.access",
	"system.posix_acl_default": "SCHILY.acl.default",
}

// aclText converts an access list of getxattr(2) (posix_acl_xattr.h: a version, then per
// entry a tag and permissions of 16 bits and a number of 32 bits, little-endian) to the text
// form of acl(5), with numbers for names; false if it is invalid.
func aclText(value []byte) (string, bool) {
	const head, size, version = 4, 8, 2
	if len(value) < head || (len(value)-head)%size != 0 || binary.LittleEndian.Uint32(value) != version {
		return "", false
	}
	var out []string
	for b := value[head:]; len(b) > 0; b = b[size:] {
		perm, id := binary.LittleEndian.Uint16(b[2:]), binary.LittleEndian.Uint32(b[4:])
		if perm > 7 {
			return "", false
		}
		var who string
		switch binary.LittleEndian.Uint16(b) {
		case 0x01:
			who = "user:"
		case 0x02:
			who = fmt.Sprintf("user:%d", id)
		case 0x04:
			who = "group:"
		case 0x08:
			who = fmt.Sprintf("group:%d", id)
		case 0x10:
			who = "mask:"
		case 0x20:
			who = "other:"
		default:
			return "", false
		}
		p := []byte("rwx")
		for i := range p {
			if perm&(4>>i) == 0 {
				p[i] = '-'
			}
		}
		out = append(out, who+":"+string(p))
	}
	return strings.Join(out, ","), true
}
