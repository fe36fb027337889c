package disk

import "bytes"

// containers are the magic bytes of files that hold a disk in a form of their own, from the
// formats' specifications (QEMU's docs/interop/qcow2.rst, VMware's and Microsoft's papers).
var containers = []struct {
	name   string
	offset int
	magic  []byte
}{
	{"qcow2", 0, []byte("QFI\xfb")},
	{"QED", 0, []byte("QED\x00")},
	{"VMDK", 0, []byte("KDMV")},
	{"VMDK", 0, []byte("COWD")},
	{"VMDK", 0, []byte("# Disk DescriptorFile")},
	{"VHDX", 0, []byte("vhdxfile")},
	{"VHD", 0, []byte("conectix")},
	{"VDI", 64, []byte{0x7f, 0x10, 0xda, 0xbe}},
}

// Container names the format of a file that is not a disk byte for byte but holds one, such as
// qcow2; empty for a plain disk, and for a device. Never an error: what cannot be read will be
// noticed by who reads it in earnest.
func (s *Source) Container() string {
	if s.device {
		return ""
	}

	head := make([]byte, 4096) // a multiple of what direct I/O wants
	n, _ := s.ReadAt(head, 0)  // fewer at the end of the file, or of what can be read
	head = head[:n]

	for _, c := range containers {
		if bytes.HasPrefix(head[min(c.offset, len(head)):], c.magic) {
			return c.name
		}
	}

	return ""
}
