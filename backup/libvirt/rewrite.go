package libvirt

import (
	"encoding/xml"
	"errors"
	"fmt"
	"io"
	"maps"
	"slices"
	"strings"
)

// Changes of a domain's definition, for one that was restored elsewhere. Everything else stays
// byte by byte, whatever libvirt has in it.
type Changes struct {
	// Disks are the new files of disks, by target.
	Disks map[string]string
	// Served are the NBD exports that take the place of disks, by target.
	Served map[string]Export
	// Drop are the targets of disks that are removed.
	Drop []string
	// Files are the new paths of loader, nvram, kernel and initrd, by that name.
	Files map[string]string
	// Name, if not empty, makes it another domain: without the UUID and the MAC addresses.
	Name string
}

// Export is a disk on an NBD server of this host, raw bytes.
type Export struct {
	Socket string // path of the unix socket
	Name   string
}

// edit replaces a part of a text.
type edit struct {
	from, to int64
	text     string
}

// element is one that is open.
type element struct {
	start xml.StartElement
	from  int64 // of its start tag
	body  int64 // after it
}

// disk is a disk element that is open.
type diskElement struct {
	target string
	cut    []edit // what does not fit another source
	driver []edit // how the old image is read
}

// Rewrite changes a domain's XML.
func Rewrite(text string, c Changes) (string, error) {
	d := xml.NewDecoder(strings.NewReader(text))
	var open []element
	var edits []edit
	var disk *diskElement
	done := map[string]bool{}
	for {
		from := d.InputOffset()
		token, err := d.Token()
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			return "", fmt.Errorf("read the domain's XML: %w", err)
		}
		switch t := token.(type) {
		case xml.StartElement:
			open = append(open, element{t.Copy(), from, d.InputOffset()})
			switch path(open) {
			case "domain/devices/disk":
				disk = &diskElement{}
			case "domain/devices/disk/target":
				if disk != nil {
					disk.target = attribute(t, "dev")
				}
			}
		case xml.EndElement:
			e, where := open[len(open)-1], path(open)
			open = open[:len(open)-1]
			all, body := edit{from: e.from, to: d.InputOffset()}, edit{from: e.body, to: from}
			switch where {
			case "domain/name":
				if c.Name != "" {
					edits = append(edits, body.with(escape(c.Name)))
				}
			case "domain/uuid", "domain/devices/interface/mac":
				if c.Name != "" {
					edits = append(edits, all)
				}
			case "domain/os/loader", "domain/os/nvram", "domain/os/kernel", "domain/os/initrd":
				if to := c.Files[e.start.Name.Local]; to != "" {
					if body.from == body.to && all.to == body.to { // <nvram/>
						return "", fmt.Errorf("read the domain's XML: %s has no path", where)
					}
					edits = append(edits, body.with(escape(to)))
				}
			case "domain/devices/disk/driver":
				if disk != nil {
					disk.driver = append(disk.driver, all)
				}
			case "domain/devices/disk/source", "domain/devices/disk/backingStore", "domain/devices/disk/mirror":
				if disk != nil {
					disk.cut = append(disk.cut, all)
				}
			case "domain/devices/disk":
				served, isServed := c.Served[disk.target]
				switch to := c.Disks[disk.target]; {
				case slices.Contains(c.Drop, disk.target):
					edits = append(edits, all)
				case isServed:
					done[disk.target] = true
					edits = append(edits, edit{e.from, e.body, startTag(e.start, "type", "network") + served.source()})
					edits = append(append(edits, disk.cut...), disk.driver...)
				case to != "":
					done[disk.target] = true
					edits = append(edits, edit{e.from, e.body, startTag(e.start, "type", "file") + "<source file='" + escape(to) + "'/>"})
					edits = append(edits, disk.cut...)
				}
				disk = nil
			}
		}
	}
	for _, target := range slices.Concat(slices.Collect(maps.Keys(c.Disks)), slices.Collect(maps.Keys(c.Served))) {
		if !done[target] {
			return "", fmt.Errorf("the domain has no disk %s", target)
		}
	}
	return apply(text, edits), nil
}

func (e Export) source() string {
	return "<driver name='qemu' type='raw'/><source protocol='nbd' name='" + escape(e.Name) + "'><host transport='unix' socket='" + escape(e.Socket) + "'/></source>"
}

func (e edit) with(text string) edit {
	e.text = text
	return e
}

// apply makes edits that do not overlap.
func apply(text string, edits []edit) string {
	slices.SortFunc(edits, func(a, b edit) int { return int(a.from - b.from) })
	var out strings.Builder
	at := int64(0)
	for _, e := range edits {
		out.WriteString(text[at:e.from])
		out.WriteString(e.text)
		at = e.to
	}
	out.WriteString(text[at:])
	return out.String()
}

func path(open []element) string {
	names := make([]string, len(open))
	for i, e := range open {
		names[i] = e.start.Name.Local
	}
	return strings.Join(names, "/")
}

func attribute(e xml.StartElement, name string) string {
	for _, a := range e.Attr {
		if a.Name.Local == name && a.Name.Space == "" {
			return a.Value
		}
	}
	return ""
}

// startTag is a start tag with an attribute of another value. A disk has no namespaces.
func startTag(e xml.StartElement, name, value string) string {
	attrs := map[string]string{}
	for _, a := range e.Attr {
		if a.Name.Space == "" {
			attrs[a.Name.Local] = a.Value
		}
	}
	attrs[name] = value
	var out strings.Builder
	out.WriteString("<" + e.Name.Local)
	for _, k := range slices.Sorted(maps.Keys(attrs)) {
		fmt.Fprintf(&out, " %s='%s'", k, escape(attrs[k]))
	}
	return out.String() + ">"
}

func escape(s string) string {
	var out strings.Builder
	_ = xml.EscapeText(&out, []byte(s)) // a Builder does not fail
	return out.String()
}
