package fusefs

import (
	"net/url"
	"slices"
	"strings"

	"github.com/varve-io/varve/backup"
	"github.com/varve-io/varve/fusefs/diskfs"
)

// view is the catalogue as directories. It is immutable.
type view struct {
	namespaces map[string]map[string]*volumeView
	ids        map[string]bool
	volumes    map[backup.Volume]bool // that have points
}

// volumeView is the points of one volume under the names they have in the tree.
type volumeView struct {
	points map[string]*backup.Point
	latest string
}

// newView sorts points, which come by volume and generation, into directories.
func newView(points []*backup.Point, opt Options) *view {
	v := &view{namespaces: map[string]map[string]*volumeView{}, ids: map[string]bool{}, volumes: map[backup.Volume]bool{}}
	clusters := map[string]bool{}
	for _, p := range points {
		if shown(p, opt) {
			clusters[p.Volume.Cluster] = true
		}
	}
	for _, p := range points {
		if !shown(p, opt) {
			continue
		}
		v.ids[p.ID], v.volumes[p.Volume] = true, true
		ns := p.Volume.Namespace
		if len(clusters) > 1 && p.Volume.Cluster != opt.Cluster {
			ns = p.Volume.Cluster + ":" + ns
		}
		volumes := v.namespaces[element(ns)]
		if volumes == nil {
			volumes = map[string]*volumeView{}
			v.namespaces[element(ns)] = volumes
		}
		vol := volumes[element(p.Volume.Name)]
		if vol == nil {
			vol = &volumeView{points: map[string]*backup.Point{}}
			volumes[element(p.Volume.Name)] = vol
		}
		name := pointTime(p)
		if vol.points[name] != nil {
			name += "-" + p.ShortID()
		}
		vol.points[name] = p
		vol.latest = name
	}
	return v
}

func shown(p *backup.Point, opt Options) bool {
	return len(opt.Volumes) == 0 || slices.Contains(opt.Volumes, p.Volume)
}

// pointTime is the time in the point's own name.
func pointTime(p *backup.Point) string {
	name := p.Name()
	return element(name[strings.LastIndexByte(name, '@')+1:])
}

// element makes one directory name of what another program may have written:
// what cannot be one is escaped as in URLs.
func element(s string) string {
	if diskfs.ValidName(s) && len(s) <= maxElement {
		return s
	}
	s = strings.ReplaceAll(url.PathEscape(s), "%", "=")
	if s == "" || s == "." || s == ".." {
		return "=" + s
	}
	return s[:min(len(s), maxElement)]
}

// maxElement is the longest name in a directory on Linux in bytes (NAME_MAX).
const maxElement = 255
