package source

import (
	"context"
	"fmt"
	"io"
	"os"
	"path/filepath"
)

// maxPart bounds a file of a machine that is kept beside its disks, in bytes. An initrd is the
// largest of them.
const maxPart = 512 << 20

// PartXML is the name of the part that holds the definition of a machine, and PartNVRAM that of
// what its firmware keeps.
const (
	PartXML    = "xml"
	PartNVRAM  = "nvram"
	PartLoader = "loader"
	PartKernel = "kernel"
	PartInitrd = "initrd"
)

// readParts reads what a start of the domain needs beside its disks: over ssh by the other machine's
// shell, over TLS by libvirt's storage driver.
func (m *libvirtMachine) readParts(ctx context.Context) {
	m.parts = append(m.parts, Part{PartXML, []byte(m.xml)})
	for _, p := range []struct{ name, path string }{
		{PartNVRAM, m.def.NVRAM}, {PartLoader, m.def.Loader}, {PartKernel, m.def.Kernel}, {PartInitrd, m.def.Initrd},
	} {
		if p.path == "" {
			continue
		}
		read := readBounded
		switch m.uri.Transport {
		case "ssh":
			read = func(path string) ([]byte, error) { return m.conn.ReadFile(ctx, m.uri, path, maxPart) }
		case "tls":
			read = m.readFolder
		}
		b, err := read(p.path)
		if err != nil {
			m.notes = append(m.notes, fmt.Sprintf("the %s of the machine is not backed up: %v", p.name, err))
			continue
		}
		m.parts = append(m.parts, Part{p.name, b})
	}
}

// readFolder reads a file of libvirt's machine.
func (m *libvirtMachine) readFolder(path string) (b []byte, err error) {
	f, err := m.conn.OpenFolder(filepath.Dir(path))
	if err != nil {
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	if b, err = f.ReadFile(filepath.Base(path), maxPart); err != nil {
		err = fmt.Errorf("%s: %w", path, err)
	}
	if err := f.Close(); err != nil {
		m.notes = append(m.notes, fmt.Sprintf("a storage pool that shows %s stays in libvirt until the next backup: %v", filepath.Dir(path), err))
	}
	return b, err
}

func readBounded(path string) ([]byte, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	if info, err := f.Stat(); err != nil || !info.Mode().IsRegular() {
		return nil, fmt.Errorf("%s is not a regular file", path)
	}
	b, err := io.ReadAll(io.LimitReader(f, maxPart+1))
	if err == nil && len(b) > maxPart {
		err = fmt.Errorf("%s is larger than %d bytes", path, maxPart)
	}
	return b, err
}
