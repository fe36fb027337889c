package nbdserver

// hold takes the memory that a reply of n bytes holds beyond what its request has: a few bytes
// of a cached block keep the whole block. If that is too much, the reply becomes a copy, for
// which the request has the memory.
func (c *conn) hold(r *request, pieces []Piece, n int) {
	if more := held(pieces) - bufferCost(n); more > 0 && !c.mem.grow(&r.mem, more) {
		copyPieces(pieces)
	}
}

// held returns how many bytes of memory pieces hold. A block that several are parts of counts
// once.
func held(pieces []Piece) (n int64) {
	var block *byte // the last byte of the last block
	for i := range pieces {
		p := &pieces[i]
		if p.Held <= len(p.Data) {
			n += int64(len(p.Data))
			continue
		}
		if p.Owner == nil && p.Data != nil {
			end := &p.Data[:cap(p.Data)][cap(p.Data)-1]
			if end == block {
				continue
			}
			block = end
		}
		n += int64(p.Held)
	}
	return n
}

// copyPieces copies lent bytes to a buffer, and releases them.
func copyPieces(pieces []Piece) {
	n := 0
	for i := range pieces {
		n += len(pieces[i].Data)
	}
	buf := getBuffer(n)
	at := 0
	for i := range pieces {
		p := &pieces[i]
		if p.Data != nil {
			end := at + copy(buf.b[at:], p.Data)
			p.Data, at = buf.b[at:end:end], end
		}
		if p.Owner != nil {
			p.Owner.Release()
		}
		p.Held, p.Owner = 0, nil
	}
	pieces[len(pieces)-1].Owner = buf // released with the last reply
}
