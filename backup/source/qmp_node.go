package source

import (
	"context"
	"fmt"
	"regexp"
	"slices"
	"strings"

	"github.com/varve-io/varve/backup/qemu/qmp"
)

// qmpNode is what query-named-block-nodes says of a node.
type qmpNode struct {
	Name   string `json:"node-name"`
	Driver string `json:"drv"`
	RO     bool   `json:"ro"`
	Image  struct {
		Size     int64 `json:"virtual-size"`
		Actual   int64 `json:"actual-size"`
		Specific struct {
			Data struct {
				Compat string `json:"compat"`
				Raw    bool   `json:"data-file-raw"`
			} `json:"data"`
		} `json:"format-specific"`
	} `json:"image"`
	Bitmaps []qmpBitmap `json:"dirty-bitmaps"`
}

type qmpBitmap struct {
	Name         string `json:"name"`
	Count        int64  `json:"count"` // dirty bytes
	Granularity  int64  `json:"granularity"`
	Recording    bool   `json:"recording"`
	Busy         bool   `json:"busy"`
	Inconsistent bool   `json:"inconsistent"`
}

// persistent reports whether the node's image stores bitmaps. Another node has them in memory,
// until QEMU ends.
func (n *qmpNode) persistent() bool {
	return n.Driver == "qcow2" && n.Image.Specific.Data.Compat != "0.10"
}

func (n *qmpNode) bitmap(name string) *qmpBitmap {
	for i := range n.Bitmaps {
		if n.Bitmaps[i].Name == name {
			return &n.Bitmaps[i]
		}
	}
	return nil
}

// usable says why a bitmap cannot be used; empty if it can.
func (n *qmpNode) usable(name string) string {
	b := n.bitmap(name)
	switch {
	case b == nil && !n.persistent():
		return fmt.Sprintf("the disk has no bitmap %s: QEMU has those of a %s disk in memory, until it ends", name, n.Driver)
	case b == nil:
		return fmt.Sprintf("the disk's top image has no bitmap %s", name)
	case n.Image.Specific.Data.Raw: // nothing would show that the disk shrank and grew again, as in imageBitmaps
		return "the image keeps its bytes in a raw data file, of which a bitmap misses what another size changed"
	case b.Inconsistent:
		return fmt.Sprintf("the bitmap %s is inconsistent: a QEMU did not end properly", name)
	case b.Busy:
		return fmt.Sprintf("the bitmap %s is in use by another operation of QEMU", name)
	case !b.Recording:
		return fmt.Sprintf("the bitmap %s is disabled, so it missed what was written", name)
	}
	return ""
}

// diskName is what ends the name of a volume.
var diskName = regexp.MustCompile(`^[A-Za-z0-9_][A-Za-z0-9_.-]{0,99}$`)

// qmpDisk is a disk of a machine: the root node of a device.
type qmpDisk struct {
	name string
	node qmpNode
}

// readNodes lists all nodes by name.
func readNodes(ctx context.Context, c *qmp.Conn) (map[string]qmpNode, error) {
	var list []qmpNode
	// Flat: without the chain of images beneath each.
	if err := c.Do(ctx, "query-named-block-nodes", map[string]any{"flat": true}, &list); err != nil {
		return nil, err
	}
	out := make(map[string]qmpNode, len(list))
	for _, n := range list {
		out[n.Name] = n
	}
	return out, nil
}

// working are the nodes that a job puts above a disk for as long as it runs.
var working = map[string]bool{"copy-before-write": true, "backup-top": true, "mirror_top": true, "commit_top": true}

// readDisks lists the machine's writable disks, by its devices. A qemu-storage-daemon has none:
// there it is what it exports.
func readDisks(ctx context.Context, c *qmp.Conn) ([]qmpDisk, error) {
	nodes, err := readNodes(ctx, c)
	if err != nil {
		return nil, err
	}
	var devices []struct {
		Device   string `json:"device"`
		QDev     string `json:"qdev"`
		Inserted *struct {
			Node string `json:"node-name"`
		} `json:"inserted"`
	}
	var disks []qmpDisk
	add := func(name, node string) error {
		n, ok := nodes[node]
		if !ok || n.RO || slices.ContainsFunc(disks, func(d qmpDisk) bool { return d.node.Name == node }) {
			return nil // a CD, or a second device of one disk
		}
		if working[n.Driver] {
			return fmt.Errorf("%w: QEMU runs a job (%s) on the disk at %s; wait until it has ended", ErrMachineBusy, n.Driver, node)
		}
		if !diskName.MatchString(name) {
			return fmt.Errorf("the disk at %q has no name that could end that of a volume: give its device an id", node)
		}
		disks = append(disks, qmpDisk{name, n})
		return nil
	}
	if err := c.Do(ctx, "query-block", nil, &devices); err != nil && !qmp.NoCommand(err) {
		return nil, err
	}
	if len(devices) == 0 {
		exports, err := readExports(ctx, c)
		if err != nil {
			return nil, err
		}
		for _, e := range exports {
			if !strings.HasPrefix(e.ID, "varve-") {
				if err := add(e.Node, e.Node); err != nil {
					return nil, err
				}
			}
		}
	}
	for _, d := range devices {
		if d.Inserted == nil {
			continue
		}
		if err := add(deviceName(d.Device, d.QDev, d.Inserted.Node), d.Inserted.Node); err != nil {
			return nil, err
		}
	}
	slices.SortFunc(disks, func(a, b qmpDisk) int { return strings.Compare(a.name, b.name) })
	for i := 1; i < len(disks); i++ {
		if disks[i].name == disks[i-1].name {
			return nil, fmt.Errorf("two disks are called %s: give their devices ids", disks[i].name)
		}
	}
	return disks, nil
}

// deviceName is the name of a disk that is the same for each run: its drive's, its device's id,
// or its node's. The device's path is /machine/peripheral/ID/virtio-backend, or that of one
// without an id, which is numbered by when it was added.
func deviceName(drive, qdev, node string) string {
	if drive != "" {
		return drive
	}
	if rest, ok := strings.CutPrefix(qdev, "/machine/peripheral/"); ok {
		id, _, _ := strings.Cut(rest, "/")
		return id
	}
	if qdev != "" && !strings.Contains(qdev, "/") {
		return qdev
	}
	if !strings.HasPrefix(node, "#") {
		return node
	}
	return ""
}

// qmpExport is one of query-block-exports.
type qmpExport struct {
	ID   string `json:"id"`
	Type string `json:"type"`
	Node string `json:"node-name"`
}

func readExports(ctx context.Context, c *qmp.Conn) ([]qmpExport, error) {
	var list []qmpExport
	err := c.Do(ctx, "query-block-exports", nil, &list)
	return list, err
}

// qmpJob is one of query-jobs.
type qmpJob struct {
	ID     string `json:"id"`
	Status string `json:"status"`
	Error  string `json:"error"`
}

func readJobs(ctx context.Context, c *qmp.Conn) ([]qmpJob, error) {
	var list []qmpJob
	err := c.Do(ctx, "query-jobs", nil, &list)
	return list, err
}
