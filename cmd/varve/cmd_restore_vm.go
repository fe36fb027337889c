package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/varve-io/varve/backup"
	"github.com/varve-io/varve/backup/libvirt"
	"github.com/varve-io/varve/backup/points"
	"github.com/varve-io/varve/backup/qemu"
	"github.com/varve-io/varve/backup/repository"
	"github.com/varve-io/varve/backup/source"
	"github.com/varve-io/varve/internal/bytesize"
)

// errNoDefinition means that a group is of no machine whose definition was kept.
var errNoDefinition = errors.New("the group holds no definition of a virtual machine")

// errDomainExists means that libvirt has a domain of this name already.
var errDomainExists = errors.New("libvirt has this domain already")

// vmFlags say how a virtual machine is restored.
type vmFlags struct {
	vm, define      bool
	connect, vmName string
	served          string // the socket of "varve serve" that has the disks
}

// vmRestore is a machine that is being restored into a directory.
type vmRestore struct {
	dir     string
	text    string // its definition, as it was backed up
	def     *libvirt.Domain
	members []*points.Point // that are written, each to its path
	paths   []string
	formats []string
	served  []*points.Point // those that a server has
	changes libvirt.Changes
	left    []string // disks that the group has no point of
	empty   bool     // the NVRAM is new
}

// maxDefinition bounds a machine's definition, in bytes.
const maxDefinition = 16 << 20

// fileNames are those of the parts of a machine.
var fileNames = map[string]string{
	source.PartXML: "original.xml", source.PartNVRAM: "nvram.fd", source.PartLoader: "loader.fd", source.PartKernel: "kernel", source.PartInitrd: "initrd",
}

// planVM reads the definition of a group's machine, and chooses a file for each of its members.
func (a *app) planVM(ctx context.Context, repo *repository.Repository, g *points.Group, args []string, f restoreFlags) (*vmRestore, error) {
	if len(args) != 1 || strings.Contains(args[0], "=") {
		return nil, usagef("--vm restores into one directory")
	}
	dir, err := filepath.Abs(args[0])
	if err != nil {
		return nil, err
	}
	v := &vmRestore{dir: dir, changes: libvirt.Changes{Disks: map[string]string{}, Served: map[string]libvirt.Export{}, Files: map[string]string{}, Name: f.vm.vmName}}
	socket := ""
	if f.vm.served != "" {
		if socket, err = filepath.Abs(strings.TrimPrefix(f.vm.served, "unix:")); err != nil {
			return nil, err
		}
	}
	members := g.Members()
	for _, p := range members {
		if p.Stream && partName(g, p) == source.PartXML {
			var b bytes.Buffer
			if _, err := backup.RestoreTo(ctx, repo, p, &limitedBuffer{&b, maxDefinition}, backup.RestoreOptions{}); err != nil {
				return nil, err
			}
			v.text = b.String()
		}
	}
	if v.text == "" {
		return nil, fmt.Errorf("%w: %s; restore its disks with --group", errNoDefinition, g)
	}
	if v.def, err = libvirt.ParseDomain(v.text); err != nil {
		return nil, err
	}
	formats := map[string]string{}
	for _, d := range v.def.Disks {
		formats[d.Target] = d.Format
		v.left = append(v.left, d.Target)
	}
	if err := os.MkdirAll(dir, 0o711); err != nil { // QEMU has to reach what is in it
		return nil, fmt.Errorf("restore %s: %w", g, err)
	}
	for _, p := range members {
		name := partName(g, p)
		path, format := fileNames[name], ""
		switch {
		case p.Stream && path == "":
			path = name
		case p.Stream:
			path = filepath.Join(dir, path)
			if on := v.fileOf(name); on != "" {
				if _, err := os.Stat(on); err != nil || name == source.PartNVRAM { // else the host has it
					v.changes.Files[name] = path
				}
			}
		case formats[name] == "":
			return nil, fmt.Errorf("%s: the definition of %s has no such disk; restore the group with --group", p.Volume, v.def.Name)
		case formats[name] == qemu.Raw:
			path = name + ".img"
		default:
			format, path = formats[name], name+"."+formats[name]
		}
		if !filepath.IsAbs(path) {
			path = filepath.Join(dir, path)
		}
		if !p.Stream {
			v.left = slices.DeleteFunc(v.left, func(d string) bool { return d == name })
			if socket != "" {
				v.served, v.changes.Served[name] = append(v.served, p), libvirt.Export{Socket: socket, Name: p.ID}
				continue
			}
			v.changes.Disks[name] = path
		}
		v.members, v.paths, v.formats = append(v.members, p), append(v.paths, path), append(v.formats, format)
	}
	v.changes.Drop = v.left
	if v.def.NVRAM != "" && v.changes.Name != "" && v.changes.Files[source.PartNVRAM] == "" {
		// Of a remote libvirt it is not backed up. The first machine may be there, and two must not
		// write to one file.
		v.changes.Files[source.PartNVRAM], v.empty = filepath.Join(dir, fileNames[source.PartNVRAM]), true
	}
	return v, a.checkDefine(ctx, v, f)
}

// fileOf is the path of a part in the definition.
func (v *vmRestore) fileOf(part string) string {
	switch part {
	case source.PartNVRAM:
		return v.def.NVRAM
	case source.PartLoader:
		return v.def.Loader
	case source.PartKernel:
		return v.def.Kernel
	case source.PartInitrd:
		return v.def.Initrd
	}
	return ""
}

// partName is what distinguishes a member of a group from the others.
func partName(g *points.Group, p *points.Point) string {
	return strings.TrimPrefix(p.Volume.Name, g.Name.Name+"-")
}

// limitedBuffer fails where more is written than it may hold.
type limitedBuffer struct {
	buf   *bytes.Buffer
	limit int
}

func (l *limitedBuffer) Write(p []byte) (int, error) {
	if l.buf.Len()+len(p) > l.limit {
		return 0, fmt.Errorf("the definition of the machine is larger than %s", bytesize.Format(int64(l.limit)))
	}
	return l.buf.Write(p)
}

// checkDefine refuses to define a domain that is there, before anything is written.
func (a *app) checkDefine(ctx context.Context, v *vmRestore, f restoreFlags) error {
	if !f.vm.define {
		return nil
	}
	return a.withLibvirt(ctx, f, func(conn *libvirt.Conn) error {
		name := v.def.Name
		if v.changes.Name != "" {
			name = v.changes.Name
		}
		for _, id := range []string{name, v.def.UUID} {
			if id == v.def.UUID && v.changes.Name != "" || id == "" {
				continue
			}
			_, err := conn.Domain(&libvirt.URI{Domain: id})
			if err == nil {
				return fmt.Errorf("%w: %s; nothing was written; undefine it, or give the restored one another name with --vm-name", errDomainExists, id)
			}
			if !errors.Is(err, libvirt.ErrNoDomain) {
				return err
			}
		}
		return nil
	})
}

func (a *app) withLibvirt(ctx context.Context, f restoreFlags, do func(*libvirt.Conn) error) error {
	uri, err := libvirt.ParseURI(f.vm.connect)
	if err != nil {
		return &usageError{err}
	}
	if uri.Remote() {
		return usagef("--connect %s: the disks are restored to this machine, so its own libvirt has to define them: libvirt:///", f.vm.connect)
	}
	conn, err := libvirt.Dial(ctx, uri, "", "")
	if err != nil {
		return err
	}
	return errors.Join(do(conn), conn.Close())
}

// finish writes the definition, and has libvirt take it.
func (v *vmRestore) finish(ctx context.Context, a *app, f restoreFlags) (path string, err error) {
	text, err := libvirt.Rewrite(v.text, v.changes)
	if err != nil {
		return "", err
	}
	path = filepath.Join(v.dir, "domain.xml")
	// It may hold passwords of consoles.
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		return "", err
	}
	if !f.vm.define {
		return path, nil
	}
	err = a.withLibvirt(ctx, f, func(conn *libvirt.Conn) error {
		_, err := conn.Define(text)
		return err
	})
	if err != nil {
		return path, fmt.Errorf("the disks are restored to %s, but libvirt refused %s: %w; correct it and run 'virsh define %s'", v.dir, path, err, path)
	}
	return path, nil
}

// write says what became of the machine.
func (v *vmRestore) write(t *table, res groupRestoreResult, f restoreFlags) {
	for _, d := range v.left {
		t.line("  the machine has no disk %s any more: it was not backed up", d)
	}
	if v.empty {
		t.line("  the NVRAM was not backed up: the machine has a new one, which libvirt makes of its template")
	}
	if len(v.served) > 0 {
		t.line("no disk was written: the machine uses them while this runs:")
		t.line("  varve serve --writable --listen unix:%s %s", strings.TrimPrefix(f.vm.served, "unix:"), strings.Join(res.Served, " "))
	}
	if res.Defined {
		t.line("defined in libvirt from %s", res.Definition)
		return
	}
	t.line("definition: %s; 'virsh define' takes it", res.Definition)
}
