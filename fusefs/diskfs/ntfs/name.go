package ntfs

import (
	"unicode/utf16"
	"unicode/utf8"
)

// text reads UTF-16 as it stands in an image. Halves of surrogate pairs that are alone,
// which NTFS allows, become three bytes each as in WTF-8: two names stay two.
func text(b []byte) string {
	out := make([]byte, 0, len(b))
	for len(b) >= 2 {
		r := rune(le.Uint16(b))
		b = b[2:]
		if utf16.IsSurrogate(r) {
			if len(b) >= 2 {
				if pair := utf16.DecodeRune(r, rune(le.Uint16(b))); pair != utf8.RuneError {
					out = utf8.AppendRune(out, pair)
					b = b[2:]
					continue
				}
			}
			out = append(out, 0xe0|byte(r>>12), 0x80|byte(r>>6&0x3f), 0x80|byte(r&0x3f))
			continue
		}
		out = utf8.AppendRune(out, r)
	}
	return string(out)
}
