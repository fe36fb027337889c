package browse

import (
	"archive/tar"
	"bytes"
	"fmt"
	"path"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/varve-io/varve/fusefs/diskfs"
)

// A file with holes in the form that GNU tar calls PAX 1.0 ("Storing Sparse Files" in its
// manual): extended records GNU.sparse.major, minor, name and realsize; a header whose name
// informs readers that do not support it; and as content a map of decimal numbers, one per
// line (the number of pieces; the offset and length of each), padded to 512 bytes, and then
// the pieces. archive/tar reads this but does not write it.

const (
	tarBlock = 512
	// smallestHole is the smallest hole worth an entry in the map.
	smallestHole = 64 << 10
	// maxPieces bounds the map; more pieces are merged.
	maxPieces = 1 << 16
)

// piece is a range of a file, in bytes. All but the file's last end on a block of tar.
type piece struct{ off, length int64 }

// dataOf lists the data of a file with holes, nil if it has no large ones. A damaged part of
// its map is a hole, and counted in lost.
func dataOf(f diskfs.File, size int64, lost *damage) ([]piece, error) {
	list, total := []piece{}, int64(0)
	err := eachData(f, size, lost, func(x diskfs.Extent) error {
		start, end := x.Offset/tarBlock*tarBlock, min(size, (x.Offset+x.Length+tarBlock-1)/tarBlock*tarBlock)
		if n := len(list); n > 0 && (start-list[n-1].off-list[n-1].length < smallestHole || n == maxPieces) {
			total += end - list[n-1].off - list[n-1].length
			list[n-1].length = end - list[n-1].off
			return nil
		}
		list, total = append(list, piece{start, end - start}), total+end-start
		return nil
	})
	if err != nil {
		return nil, err
	}
	if size-total < smallestHole {
		return nil, nil
	}
	if n := len(list); n == 0 || list[n-1].off+list[n-1].length < size {
		list = append(list, piece{off: size}) // marks the end of the file
	}
	return list, nil
}

// sparse writes a file with holes.
func (t *tarrer) sparse(f diskfs.File, h *tar.Header, data []piece, lost *damage) error {
	var index bytes.Buffer
	fmt.Fprintf(&index, "%d\n", len(data))
	stored := int64(0)
	for _, p := range data {
		fmt.Fprintf(&index, "%d\n%d\n", p.off, p.length)
		stored += p.length
	}
	pad(&index)
	stored += int64(index.Len())

	// Numbers and names that do not fit the header are in the records.
	dir, base := path.Split(h.Name)
	name := dir + "GNUSparseFile.0/" + base
	records := map[string]string{
		"GNU.sparse.major": "1", "GNU.sparse.minor": "0", "GNU.sparse.name": h.Name, "GNU.sparse.realsize": strconv.FormatInt(h.Size, 10),
		"path": name, "size": strconv.FormatInt(stored, 10), "uid": strconv.Itoa(h.Uid), "gid": strconv.Itoa(h.Gid),
		"mtime": seconds(h.ModTime), "atime": seconds(h.AccessTime), "ctime": seconds(h.ChangeTime),
	}
	for k, v := range h.PAXRecords {
		records[k] = v
	}
	var extended bytes.Buffer
	keys := make([]string, 0, len(records))
	for k := range records {
		keys = append(keys, k)
	}
	slices.Sort(keys)
	for _, k := range keys {
		extended.WriteString(record(k, records[k]))
	}
	size := extended.Len()
	pad(&extended)

	if err := t.w.Flush(); err != nil { // the file before is complete
		return err
	}
	for _, b := range [][]byte{
		header("PaxHeaders.0/"+base, 'x', 0o644, int64(size)), extended.Bytes(),
		header(name, tar.TypeReg, h.Mode, stored), index.Bytes(),
	} {
		if _, err := t.out.Write(b); err != nil {
			return err
		}
	}
	for _, p := range data {
		if err := t.copy(t.out, f, p.off, p.length, lost); err != nil {
			return err
		}
	}
	_, err := t.out.Write(make([]byte, -stored&(tarBlock-1)))
	return err
}

// pad pads to whole blocks.
func pad(b *bytes.Buffer) { b.Write(make([]byte, -b.Len()&(tarBlock-1))) }

// record returns a record of an extended header: its own length in decimal, key and value.
func record(key, value string) string {
	rest := " " + key + "=" + value + "\n"
	n := len(rest)
	for n != len(rest)+len(strconv.Itoa(n)) {
		n = len(rest) + len(strconv.Itoa(n))
	}
	return strconv.Itoa(n) + rest
}

// seconds formats seconds since 1970, with a fraction.
func seconds(at time.Time) string {
	s, ns := at.Unix(), int64(at.Nanosecond())
	if ns == 0 {
		return strconv.FormatInt(s, 10)
	}
	sign := ""
	if s < 0 {
		sign, s, ns = "-", -s-1, 1e9-ns
	}
	return fmt.Sprintf("%s%d.%09d", sign, s, ns)
}

// header returns a header block of POSIX tar ("ustar"); what does not fit is in the records.
func header(name string, typ byte, mode, size int64) []byte {
	b := make([]byte, tarBlock)
	copy(b[:100], strings.ToValidUTF8(name, "_"))
	octal := func(b []byte, v int64) {
		if s := strconv.FormatInt(v, 8); len(s) < len(b) {
			copy(b, strings.Repeat("0", len(b)-1-len(s))+s)
		}
	}
	octal(b[100:108], mode)
	octal(b[108:116], 0)
	octal(b[116:124], 0)
	octal(b[124:136], size)
	octal(b[136:148], 0)
	b[156] = typ
	copy(b[257:], "ustar\x0000")
	octal(b[329:337], 0)
	octal(b[337:345], 0)
	copy(b[148:156], "        ")
	sum := int64(0)
	for _, c := range b {
		sum += int64(c)
	}
	octal(b[148:155], sum)
	return b
}
