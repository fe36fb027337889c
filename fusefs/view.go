package fusefs

import (
	"net/url"
	"slices"
	"strings"

	"github.com/varve-io/varve/backup/points"
	"github.com/varve-io/varve/fusefs/diskfs"
)

// view is the catalogue as directories. It is immutable.
type view struct {
	namespaces map[string]map[string]*volumeView
	// links are for volumes of the only other cluster that has them: by namespace and name,
	// their relative paths.
	links   map[string]map[string]string
	ids     map[string]bool
	volumes map[points.Volume]bool // with points
}

// volumeView holds the points of one volume by their names in the tree.
type volumeView struct {
	points map[string]*points.Point
	latest string
}

// newView arranges points, sorted by volume and generation, in directories.
func newView(pts []*points.Point, opt Options) *view {
	v := &view{
		namespaces: map[string]map[string]*volumeView{}, links: map[string]map[string]string{},
		ids: map[string]bool{}, volumes: map[points.Volume]bool{},
	}
	clusters := map[string][]string{} // by the name of a volume, the clusters that have it
	for _, p := range pts {
		if !shown(p, opt) {
			continue
		}
		if !v.volumes[p.Volume] {
			clusters[p.Volume.String()] = append(clusters[p.Volume.String()], p.Volume.Cluster)
		}
		v.ids[p.ID], v.volumes[p.Volume] = true, true
		ns := p.Volume.Namespace
		if p.Volume.Cluster != opt.Cluster {
			ns = p.Volume.Cluster + ":" + ns
		}
		volumes := v.namespaces[element(ns)]
		if volumes == nil {
			volumes = map[string]*volumeView{}
			v.namespaces[element(ns)] = volumes
		}
		vol := volumes[element(p.Volume.Name)]
		if vol == nil {
			vol = &volumeView{points: map[string]*points.Point{}}
			volumes[element(p.Volume.Name)] = vol
		}
		name := pointTime(p)
		if vol.points[name] != nil {
			name += "-" + p.ShortID()
		}
		vol.points[name] = p
		vol.latest = name
	}
	for vol := range v.volumes {
		if vol.Cluster != opt.Cluster && len(clusters[vol.String()]) == 1 {
			v.link(element(vol.Namespace), element(vol.Name), "../"+element(vol.Cluster+":"+vol.Namespace)+"/"+element(vol.Name))
		}
	}
	return v
}

func (v *view) link(namespace, name, target string) {
	if v.namespaces[namespace][name] != nil {
		return // two names with one directory name
	}
	if v.links[namespace] == nil {
		v.links[namespace] = map[string]string{}
	}
	v.links[namespace][name] = target
}

func shown(p *points.Point, opt Options) bool {
	return len(opt.Volumes) == 0 || slices.Contains(opt.Volumes, p.Volume)
}

// pointTime returns the time in the point's name.
func pointTime(p *points.Point) string {
	name := p.Name()
	return element(name[strings.LastIndexByte(name, '@')+1:])
}

// element makes one directory name of text that another program may have written: an invalid
// name is escaped as in URLs.
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
