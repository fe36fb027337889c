package fusefs

import (
	"context"
	"encoding/json"
	"syscall"
	"time"

	"github.com/hanwen/go-fuse/v2/fs"
	"github.com/hanwen/go-fuse/v2/fuse"
)

// Info is the content of info.json.
type Info struct {
	Name       string       `json:"name"`
	ID         string       `json:"id"`
	Cluster    string       `json:"cluster"`
	Namespace  string       `json:"namespace"`
	Volume     string       `json:"volume"`
	Time       time.Time    `json:"time"`
	Size       int64        `json:"size"` // bytes
	Kind       string       `json:"kind,omitempty"`
	Generation int64        `json:"generation,omitempty"`
	Parent     string       `json:"parent,omitempty"`
	BlockSize  int64        `json:"blockSize,omitempty"`
	Pins       []string     `json:"pins,omitempty"`
	Foreign    string       `json:"foreign,omitempty"`
	Volumes    []VolumeInfo `json:"volumes,omitempty"` // once files/ was opened
	Fetched    FetchedInfo  `json:"fetched"`
	Overlay    *OverlayInfo `json:"overlay,omitempty"`
}

// VolumeInfo is a partition, a logical volume or the whole disk.
type VolumeInfo struct {
	Name    string `json:"name"` // "" for the whole disk
	Type    string `json:"type,omitempty"`
	Size    int64  `json:"size"`
	Note    string `json:"note,omitempty"`    // about the content, such as that it is one side of a mirror
	Journal string `json:"journal,omitempty"` // once the volume was opened
}

// FetchedInfo is what was read from the repository for the point through this mount. Blocks
// that another point brought into the cache are not counted.
type FetchedInfo struct {
	Bytes  int64 `json:"bytes"` // decoded
	Blocks int64 `json:"blocks"`
}

// OverlayInfo describes what was written to disk.img.
type OverlayInfo struct {
	Used int64 `json:"used"` // bytes of scratch space
}

// Info returns the current state of the point.
func (p *point) Info() Info {
	i := p.info
	out := Info{
		Name: i.Name(), ID: i.ID, Cluster: i.Volume.Cluster, Namespace: i.Volume.Namespace, Volume: i.Volume.Name,
		Time: i.Time, Size: i.Size, Kind: i.Kind, Generation: i.Generation, Parent: i.Parent,
		BlockSize: i.BlockSize, Pins: i.Pins, Foreign: i.Foreign,
	}
	if d := p.held.Load(); d != nil {
		out.Fetched.Bytes, out.Fetched.Blocks = d.Fetched()
		if o := d.Overlay(); o != nil {
			out.Overlay = &OverlayInfo{Used: o.Used()}
		}
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.layout != nil {
		for _, v := range p.layout.Volumes {
			vi := VolumeInfo{Name: v.Name, Type: v.Type, Size: v.Size, Note: v.Note}
			if vol := p.volumes[v]; vol != nil {
				vi.Journal = vol.inodes.Info().Log.String()
			}
			out.Volumes = append(out.Volumes, vi)
		}
	}
	return out
}

// infoNode is info.json. Its text is made at each open.
type infoNode struct {
	fs.Inode
	everyone
	p *point
}

var (
	_ = (fs.NodeOpener)((*infoNode)(nil))
	_ = (fs.NodeReader)((*infoNode)(nil))
	_ = (fs.NodeGetattrer)((*infoNode)(nil))
	_ = (fs.NodeAccesser)((*infoNode)(nil))
)

// text is an open virtual text file.
type text struct{ b []byte }

func (n *infoNode) text() []byte {
	b, err := json.MarshalIndent(n.p.Info(), "", "  ")
	if err != nil {
		return []byte(err.Error() + "\n") // strings and numbers always marshal
	}
	return append(b, '\n')
}

func (n *infoNode) Open(_ context.Context, flags uint32) (fs.FileHandle, uint32, syscall.Errno) {
	if writes(flags) {
		return nil, 0, syscall.EROFS
	}
	return &text{n.text()}, fuse.FOPEN_DIRECT_IO, 0
}

func (n *infoNode) Read(_ context.Context, f fs.FileHandle, dest []byte, off int64) (fuse.ReadResult, syscall.Errno) {
	t, ok := f.(*text)
	if !ok {
		return nil, syscall.EBADF
	}
	return fuse.ReadResultData(part(t.b, off, len(dest))), 0
}

// part returns the bytes of b at off, at most n.
func part(b []byte, off int64, n int) []byte {
	if off < 0 || off >= int64(len(b)) {
		return nil
	}
	b = b[off:]
	return b[:min(len(b), n)]
}

func (n *infoNode) Getattr(_ context.Context, f fs.FileHandle, out *fuse.AttrOut) syscall.Errno {
	var size int
	if t, ok := f.(*text); ok {
		size = len(t.b)
	} else {
		size = len(n.text())
	}
	out.Mode = syscall.S_IFREG | 0o444
	out.Nlink = 1
	out.Uid, out.Gid = n.p.fs.uid, n.p.fs.gid
	out.Size = uint64(size)
	setTimes(&out.Attr, n.p.info.Time)
	return 0
}

// writes reports whether a file is opened for more than reading.
func writes(flags uint32) bool { return flags&syscall.O_ACCMODE != syscall.O_RDONLY }
