package ext4

// inlineData gives the content of an inode with inline_data: up to 60 bytes where
// the block map would be, the rest in the value of the attribute system.data. What
// the file's size has beyond that is zeroes.
func (n *inode) inlineData() ([]byte, error) {
	attrs, damage := n.inodeAttrs()
	data := append([]byte(nil), n.block60()...)
	for _, a := range attrs {
		if a.index != attrIndexSystem || a.name != "data" {
			continue
		}
		if a.inode != 0 {
			return data, corrupt(n.where(), "inline data in inode %d", a.inode)
		}
		return append(data, a.value...), nil
	}
	if damage != nil {
		return data, damage
	}
	return data, corrupt(n.where(), "inline data without its attribute system.data")
}
