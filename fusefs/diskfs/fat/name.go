package fat

import (
	"strings"
	"unicode/utf16"
)

// An entry: name (8+3 bytes), attributes, case (1), creation (1+2+2), access (2),
// first cluster high (2), change (2+2), first cluster low (2), size (4). Long names
// stand before their entry in entries of their own, last part first, 13 UTF-16
// units each, with a checksum of the short name.
const (
	entryAttr     = 11
	entryCase     = 12
	attrReadOnly  = 0x01
	attrVolume    = 0x08
	attrDirectory = 0x10
	attrLong      = 0x0f
	caseBase      = 0x08 // the short name's base is shown in lower case
	caseExt       = 0x10
	entryDeleted  = 0xe5
	longLast      = 0x40
	maxLongParts  = 20
)

// cp437 is the upper half of the code page in which short names stand by default.
var cp437 = []rune("ÇüéâäàåçêëèïîìÄÅÉæÆôöòûùÿÖÜ¢£¥₧ƒáíóúñÑªº¿⌐¬½¼¡«»░▒▓│┤╡╢╖╕╣║╗╝╜╛┐└┴┬├─┼╞╟╚╔╩╦╠═╬╧╨╤╥╙╘╒╓╫╪┘┌█▄▌▐▀αßΓπΣσµτΦΘΩδ∞φε∩≡±≥≤⌠⌡÷≈°∙·√ⁿ²■\u00a0")

// isFile reports whether an entry stands for a file or directory.
func isFile(e []byte) bool {
	return e[0] != 0 && e[0] != entryDeleted && e[entryAttr]&attrVolume == 0 && e[entryAttr]&0x3f != attrLong
}

// longName gathers the parts of a long name.
type longName struct {
	units []uint16 // in order; nil if there is none
	want  int      // the part that comes next
	sum   byte
}

// add takes the next entry of a directory: it gives the name if the entry is a
// file's or directory's, and "" for all others, "." and "..".
func (l *longName) add(e []byte) string {
	if e[entryAttr]&0x3f == attrLong && e[0] != entryDeleted {
		l.part(e)
		return ""
	}
	long := l.take(e)
	if !isFile(e) || e[0] == '.' {
		return ""
	}
	if long != "" {
		return long
	}
	return shortName(e)
}

func (l *longName) part(e []byte) {
	n := int(e[0] &^ longLast)
	if e[0]&longLast != 0 && n >= 1 && n <= maxLongParts {
		l.units, l.want, l.sum = make([]uint16, 13*n), n, e[13]
	}
	if l.units == nil || n == 0 || n != l.want || e[13] != l.sum {
		l.units = nil
		return
	}
	l.want--
	at := l.units[13*(n-1):]
	for i, off := range [13]int{1, 3, 5, 7, 9, 14, 16, 18, 20, 22, 24, 28, 30} {
		at[i] = le.Uint16(e[off:])
	}
}

// take gives the long name if it is whole and belongs to the entry.
func (l *longName) take(e []byte) string {
	units := l.units
	whole := units != nil && l.want == 0 && l.sum == shortSum(e)
	l.units = nil
	if !whole {
		return ""
	}
	for i, u := range units {
		if u == 0 {
			units = units[:i]
			break
		}
	}
	return string(utf16.Decode(units))
}

func shortSum(e []byte) byte {
	var sum byte
	for _, c := range e[:11] {
		sum = sum<<7 | sum>>1
		sum += c
	}
	return sum
}

// shortName shows a short name: the case is that of two flags.
func shortName(e []byte) string {
	raw := [11]byte(e[:11])
	if raw[0] == 0x05 { // stands for what would mean "deleted"
		raw[0] = entryDeleted
	}
	base, ext := strings.TrimRight(shortText(raw[:8]), " "), strings.TrimRight(shortText(raw[8:]), " ")
	if e[entryCase]&caseBase != 0 {
		base = strings.ToLower(base)
	}
	if e[entryCase]&caseExt != 0 {
		ext = strings.ToLower(ext)
	}
	if ext != "" {
		base += "." + ext
	}
	return base
}

func shortText(b []byte) string {
	var s strings.Builder
	for _, c := range b {
		if c < 0x80 {
			s.WriteByte(c)
		} else {
			s.WriteRune(cp437[c-0x80])
		}
	}
	return s.String()
}
