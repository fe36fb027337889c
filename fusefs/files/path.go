package files

import (
	"errors"
	"fmt"
	"strings"

	"github.com/varve-io/varve/backup/points"
)

// ErrPath means that a path in a recovery point has no leading slash.
var ErrPath = errors.New("a path begins with /")

// SplitPath splits POINT:/PATH. Both a point's name and a path may contain ":/" and '@', so
// it splits at the first ":/" after the name of a point.
func SplitPath(names points.Names, arg string) (*points.Point, string, error) {
	var first error
	for i := 0; ; {
		n := strings.Index(arg[i:], ":/")
		if n < 0 {
			break
		}
		i += n
		p, err := names.Read(arg[:i])
		if err == nil {
			return p, arg[i+1:], nil
		}
		if first == nil || errors.Is(err, points.ErrAmbiguous) {
			first = err
		}
		i += len(":/")
	}
	if first != nil {
		return nil, "", first
	}
	p, err := names.Read(strings.TrimSuffix(arg, ":"))
	if err != nil {
		// A path without its "/": times contain colons, so the last one counts.
		if i := strings.LastIndexByte(arg, ':'); i > 0 {
			if _, other := names.Read(arg[:i]); other == nil {
				return nil, "", fmt.Errorf("%w: %s:/%s, not %s", ErrPath, arg[:i], arg[i+1:], arg)
			}
		}
		return nil, "", fmt.Errorf("%w (files are named POINT:/PATH, for example shop/db@latest:/etc/fstab)", err)
	}
	return p, "/", nil
}
