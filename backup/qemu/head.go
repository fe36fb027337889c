// Package qemu uses QEMU's programs for what Varve does not do itself: disks in image
// files of other formats (qcow2, vmdk, vhdx, vdi, vpc) are read and written through a
// qemu-nbd of our own, and described by qemu-img.
//
// An image file may name other files: a backing file, a data file, extents. What it holds
// was perhaps written by a guest, and QEMU opens what it names, on this machine and with
// our rights. So this package reads the names first, by itself, and refuses those that lead
// out of the image's own folder unless its caller allows it; and QEMU is always given the
// format of a file, and never guesses it.
package qemu

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"regexp"
	"strings"
)

// Formats of image files, by QEMU's names.
const (
	Raw   = "raw"
	QCOW2 = "qcow2"
	VMDK  = "vmdk"
	VHDX  = "vhdx"
	VDI   = "vdi"
	VPC   = "vpc" // .vhd
)

// Head is what the head of an image file says, read by ourselves.
type Head struct {
	// Format of the file; Raw where nothing else was recognised.
	Format string
	// Version of a qcow2, 2 (compat 0.10) or 3.
	Version uint32
	// Backing is the file beneath, BackingFormat its format, empty if the image does not say.
	Backing, BackingFormat string
	// Others are the further files that hold the disk: the data file of a qcow2, the extents
	// of a vmdk.
	Others []string
}

// ErrImage means that the head of an image file is damaged, or asks for what is not
// supported.
var ErrImage = errors.New("the image file cannot be used")

func bad(format string, args ...any) error {
	return fmt.Errorf("%w: "+format, append([]any{ErrImage}, args...)...)
}

// Bounds of what is read of a file's head.
const (
	maxCluster    = 2 << 20 // of a qcow2, which has all its header in the first one
	maxDescriptor = 1 << 20 // of a vmdk
	maxName       = 1023    // of a backing file (QEMU, docs/interop/qcow2.rst)
)

// ReadHead reads the head of an image file of size bytes. A file that is not recognised is
// Raw. Sources: QEMU's docs/interop/qcow2.rst and block/*.c, "VMware Virtual Disks", the
// VHD and VHDX specifications, VirtualBox's VDICore.h.
func ReadHead(r io.ReaderAt, size int64) (*Head, error) {
	head := make([]byte, 512)
	n, err := r.ReadAt(head, 0)
	if err != nil && !errors.Is(err, io.EOF) {
		return nil, fmt.Errorf("read the head of the image: %w", err)
	}
	head = head[:n]
	switch {
	case bytes.HasPrefix(head, []byte("QFI\xfb")):
		return readQCOW2(r)
	case bytes.HasPrefix(head, []byte("KDMV")), bytes.HasPrefix(head, []byte("COWD")), bytes.HasPrefix(head, []byte("# Disk DescriptorFile")):
		return readVMDK(r, head)
	case bytes.HasPrefix(head, []byte("vhdxfile")):
		return &Head{Format: VHDX}, nil
	case n >= 68 && bytes.Equal(head[64:68], []byte{0x7f, 0x10, 0xda, 0xbe}):
		return &Head{Format: VDI}, nil
	case bytes.HasPrefix(head, []byte("conectix")):
		return readVHD(head)
	}
	// A fixed VHD has its footer at the end only.
	if size >= 512 {
		foot := make([]byte, 512)
		if _, err := r.ReadAt(foot, size-512); err == nil && bytes.HasPrefix(foot, []byte("conectix")) {
			return readVHD(foot)
		}
	}
	return &Head{Format: Raw}, nil
}

// Header extensions of qcow2.
const (
	extEnd           = 0
	extBackingFormat = 0xe2792aca
	extDataFile      = 0x44415441
)

// The external data file of a qcow2 is one of its incompatible features.
const featureDataFile = 1 << 2

func readQCOW2(r io.ReaderAt) (*Head, error) {
	b := make([]byte, maxCluster)
	n, err := r.ReadAt(b, 0)
	if err != nil && !errors.Is(err, io.EOF) {
		return nil, fmt.Errorf("read the head of the image: %w", err)
	}
	if b = b[:n]; len(b) < 72 {
		return nil, bad("the qcow2 ends within its header")
	}
	be := binary.BigEndian
	h := &Head{Format: QCOW2, Version: be.Uint32(b[4:])}
	bits := be.Uint32(b[20:])
	switch {
	case h.Version != 2 && h.Version != 3:
		return nil, bad("qcow version %d is not supported", h.Version)
	case bits < 9 || bits > 21:
		return nil, bad("the qcow2 has clusters of 2^%d bytes", bits)
	case be.Uint32(b[32:]) != 0:
		return nil, bad("the qcow2 is encrypted; --raw backs up its bytes as they are")
	}
	// QEMU reads extensions up to the backing file's name or the end of the first cluster.
	end, at := uint64(1)<<bits, uint64(72)
	var features uint64
	if h.Version == 3 {
		if len(b) < 104 {
			return nil, bad("the qcow2 ends within its header")
		}
		features, at = be.Uint64(b[72:]), uint64(be.Uint32(b[100:]))
	}
	backing, length := be.Uint64(b[8:]), uint64(be.Uint32(b[16:]))
	if backing != 0 {
		if backing > end || length > maxName || length > end-backing || backing+length > uint64(len(b)) {
			return nil, bad("the name of the qcow2's backing file is not in its header")
		}
		h.Backing = string(b[backing : backing+length])
		end = backing
	}
	if err := h.readExtensions(b, at, min(end, uint64(len(b)))); err != nil {
		return nil, err
	}
	if features&featureDataFile != 0 && len(h.Others) == 0 {
		return nil, bad("the qcow2 has its data in another file, which it does not name")
	}
	return h, nil
}

func (h *Head) readExtensions(b []byte, at, end uint64) error {
	for at+8 <= end {
		kind, n := binary.BigEndian.Uint32(b[at:]), uint64(binary.BigEndian.Uint32(b[at+4:]))
		at += 8
		if kind == extEnd {
			return nil
		}
		if n > end-at {
			return bad("a header extension of the qcow2 reaches beyond its header")
		}
		text := string(b[at : at+n])
		switch {
		case kind == extBackingFormat && h.BackingFormat == "":
			h.BackingFormat = text
		case kind == extDataFile && len(h.Others) == 0:
			h.Others = []string{text}
		case kind == extBackingFormat, kind == extDataFile:
			return bad("the qcow2 has the same header extension twice")
		}
		at += (n + 7) &^ 7
	}
	return nil
}

// vmdkExtent is a line of a descriptor: access, sectors, type, and the file in quotes, if any.
var vmdkExtent = regexp.MustCompile(`(?m)^[^="\n]*"([^"\r\n]*)"`)

// sparseDescriptor is where QEMU looks for the name of the parent in a sparse vmdk, wherever
// the header says that the descriptor is (block/vmdk.c, vmdk_open), in bytes.
const sparseDescriptor = 512

// readVMDK reads the descriptor: the file itself, or embedded in a sparse one.
func readVMDK(r io.ReaderAt, head []byte) (*Head, error) {
	h := &Head{Format: VMDK}
	if bytes.HasPrefix(head, []byte("# ")) {
		text, err := descriptor(r, 0)
		if err != nil {
			return nil, err
		}
		h.Others = extents(text)
		return h, h.readParent(text)
	}
	text, err := descriptor(r, sparseDescriptor)
	if err == nil {
		err = h.readParent(text)
	}
	if err != nil || bytes.HasPrefix(head, []byte("COWD")) { // an extent of ESX
		return h, err
	}
	if len(head) < 512 {
		return nil, bad("the vmdk ends within its header")
	}
	sector := binary.LittleEndian.Uint64(head[28:])
	if sector == 0 || binary.LittleEndian.Uint64(head[12:]) != 0 {
		return h, nil // the extent of a file with a capacity is that file, whatever it is called
	}
	if sector > 1<<40 {
		return nil, bad("the vmdk's descriptor is at sector %d", sector)
	}
	if text, err = descriptor(r, int64(sector)*512); err != nil {
		return nil, err
	}
	h.Others = extents(text)
	return h, nil
}

// descriptor is the text at an offset, to its first zero byte.
func descriptor(r io.ReaderAt, off int64) (string, error) {
	text := make([]byte, maxDescriptor)
	n, err := r.ReadAt(text, off)
	if err != nil && !errors.Is(err, io.EOF) {
		return "", fmt.Errorf("read the descriptor of the image: %w", err)
	}
	text, _, ended := bytes.Cut(text[:n], []byte{0})
	if !ended && n == maxDescriptor && off != sparseDescriptor {
		return "", bad("the vmdk's descriptor is longer than 1 MiB")
	}
	return string(text), nil
}

func extents(descriptor string) (names []string) {
	for _, m := range vmdkExtent.FindAllStringSubmatch(descriptor, -1) {
		names = append(names, m[1])
	}
	return names
}

// readParent reads the name of the file beneath as QEMU does (block/vmdk.c, vmdk_parent_open):
// the first hint counts, two characters follow it, and the name ends with a quote, perhaps
// lines later.
func (h *Head) readParent(descriptor string) error {
	_, hint, ok := strings.Cut(descriptor, "parentFileNameHint")
	if !ok {
		return nil
	}
	name, _, ok := strings.Cut(hint[min(len(hint), 2):], "\"")
	if !ok {
		return bad("the name of the vmdk's parent does not end")
	}
	if name != "" {
		h.Backing, h.BackingFormat = name, VMDK
	}
	return nil
}

// readVHD reads a footer, or its copy at the head of a dynamic file.
func readVHD(b []byte) (*Head, error) {
	if len(b) < 512 {
		return nil, bad("the vhd ends within its footer")
	}
	switch kind := binary.BigEndian.Uint32(b[60:]); kind {
	case 2, 3:
		return &Head{Format: VPC}, nil
	case 4:
		// QEMU reads it as if the disk beneath were zeroes.
		return nil, bad("the vhd is a differencing disk, which QEMU does not read; merge it into its parent first")
	default:
		return nil, bad("the vhd is of type %d", kind)
	}
}
