package nbdattach

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"strconv"
	"strings"
	"unicode"

	"github.com/varve-io/varve/nbdserver/nbdclient"
	"github.com/varve-io/varve/nbdserver/proto"
)

// The kernel keeps a text for each device that identifies its disk (the backend identifier,
// Linux 5.14), and accepts new connections for a device only with the same text. Varve's is
//
//	varve SIZE DESCRIPTION NAME
//
// with the size in bytes and the canonical name of the export. DESCRIPTION is "-" for a
// read-only disk. For a writable one it is a hash of the server's description: a Varve server
// names the overlay there, and another overlay, or a new one, over the same recovery point is
// another disk.
const (
	backendMark = "varve"
	// maxBackend keeps the text well within the page in which the kernel shows it.
	maxBackend = 1024
)

// backendOf returns the text for an export; empty if its name does not fit.
func backendOf(info nbdclient.Info) string {
	text := fmt.Sprintf("%s %d %s %s", backendMark, info.Size, describe(info), info.Name)
	if len(text) > maxBackend || strings.ContainsFunc(text, unicode.IsControl) {
		return ""
	}
	return text
}

func describe(info nbdclient.Info) string {
	if info.Flags&proto.FlagReadOnly != 0 {
		return "-"
	}
	sum := sha256.Sum256([]byte(info.Description))
	return hex.EncodeToString(sum[:8])
}

// parseBackend parses what the kernel shows. The flags of the result say only whether the
// disk is read-only.
func parseBackend(text string) (nbdclient.Info, bool) {
	parts := strings.SplitN(text, " ", 4)
	if len(parts) != 4 || parts[0] != backendMark {
		return nbdclient.Info{}, false
	}
	size, err := strconv.ParseUint(parts[1], 10, 64)
	info := nbdclient.Info{Name: parts[3], Size: size}
	if parts[2] == "-" {
		info.Flags = proto.FlagReadOnly
	}
	return info, err == nil
}

// ErrOtherDisk means that a device to take over is attached to something else.
var ErrOtherDisk = errors.New("detach it first, or choose another device")

// Adopt takes over a device that an earlier process attached to the export of a URI and no
// longer watches: Watch then gives it new connections. The server need not run. An alias such
// as @latest means the point that the device has.
func Adopt(ctx context.Context, u *nbdclient.URI, opt Options) (*Attachment, error) {
	backend := readSys(sysDir(opt.Index), "backend")
	info, ok := parseBackend(backend)
	if !ok {
		return nil, fmt.Errorf("%s is attached, and not known to be by this program: %w", Device(opt.Index), ErrOtherDisk)
	}
	if !mayMean(u.Export, info.Name) {
		d, err := dial(ctx, u, 1)
		if err != nil {
			return nil, fmt.Errorf("%s is attached to %s, and whether that is the same is not known: %w", Device(opt.Index), info.Name, err)
		}
		d.close()
		if d.info.Name != info.Name {
			return nil, fmt.Errorf("%s is attached to %s, not to %s: %w", Device(opt.Index), info.Name, d.info.Name, ErrOtherDisk)
		}
	}
	a := &Attachment{Index: opt.Index, Info: info, connections: opt.Connections, backend: backend, adopted: true}
	if err := opt.check(info); err != nil {
		return nil, err
	}
	return a, nil
}

// mayMean reports whether a user's name leads to an export, without asking the server: it is
// its name, or an alias of its volume whose meaning changes.
func mayMean(asked, name string) bool {
	volume, _, _ := strings.Cut(name, "@")
	return asked == name || strings.HasPrefix(asked, volume+"@latest")
}
