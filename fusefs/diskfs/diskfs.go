// Package diskfs reads the file systems inside a disk image, without a mount,
// without root and without trusting the image.
//
// # Structure
//
// A format's reader (packages ext4, xfs, …) implements [Inodes]: numbered inodes
// over an io.ReaderAt. New makes a [FileSystem] of any Inodes: paths,
// symbolic links, io/fs. Who walks by paths (a command line, a copy) takes the
// FileSystem; who walks by inode numbers (a FUSE server) takes the Inodes.
// Package disk ties them together with what internal/probe recognises on a disk.
//
// # Laziness and concurrency
//
// Opening reads superblocks and, where the volume was not unmounted cleanly, its
// journal; all else is read when it is asked for. An image never changes while it
// is open. Every method of every type here may be called by many goroutines at
// once, except Read, Seek and ReadDir on one and the same opened file.
//
// # Hostile images
//
// Every number in an image is a claim. Readers check lengths and pointers before
// use, bound their loops, and return [ErrCorrupt] with the place rather
// than wrong bytes; they never panic, and never allocate by an unchecked number.
// Names are bytes other than '/' and NUL, of 1 to MaxName bytes, never "." or "..";
// a reader reports an entry that breaks this as corrupt. They need not be UTF-8.
package diskfs

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"iter"
	"time"

	"github.com/varve-io/varve/internal/probe"
)

// FileSystem is a file system inside an image, by paths.
//
// Paths are as in [fs.ValidPath] (slash-separated, unrooted, "." is the root),
// but need not be UTF-8: see [ValidPath]. Open, ReadDir, ReadFile and Stat follow
// symbolic links as a process chrooted into the volume would: absolute targets
// and ".." never leave it. Lstat, ReadLink and Xattrs do not follow the last
// element.
//
// Open gives a [File] for anything but directories, and an [fs.ReadDirFile] for
// those. FileInfo.Sys is a *[Stat] throughout. Errors are *[fs.PathError] around
// fs.ErrNotExist, fs.ErrInvalid, syscall.ENOTDIR, syscall.ELOOP, [ErrCorrupt],
// [ErrUnsupported] or the error of the underlying ReaderAt.
type FileSystem interface {
	fs.ReadDirFS
	fs.StatFS
	fs.ReadFileFS
	fs.ReadLinkFS // ReadLink, Lstat

	// Xattrs lists the extended attributes of name, in order of their names. Those that
	// can be read come with the error that says what cannot; ReadDir does likewise with
	// the entries of a directory.
	Xattrs(name string) ([]Xattr, error)

	// Inodes is what the FileSystem stands on.
	Inodes() Inodes
}

// File is an opened file that is not a directory. ReadAt follows io.ReaderAt and
// reads holes and preallocated ranges as zeroes. Special files have no content.
type File interface {
	fs.File
	io.Seeker
	io.ReaderAt
	ExtentFinder
}

// ExtentFinder finds the ranges of a file that hold data; what lies between them
// reads as zeroes.
type ExtentFinder interface {
	// NextData gives the first range of data that ends after off, cut to begin at
	// off or later and to end at the file's size or earlier; io.EOF if none is left.
	// Ranges follow each other; neighbours may touch, since they need not be
	// neighbours on the device. Preallocated ranges that were never written are no
	// data.
	NextData(off int64) (Extent, error)
}

// Extent is a range of a file that holds data. Units are bytes.
type Extent struct {
	Offset int64 // in the file
	Length int64 // > 0
	// Device is where the range lies on the volume's ReaderAt, contiguously, or -1
	// where that cannot be said (inline or compressed data).
	Device int64
}

// Inodes is a file system inside an image, by inode numbers.
type Inodes interface {
	// Info describes the volume.
	Info() Info
	// Root is the number of the root directory.
	Root() uint64
	// Inode reads one inode. A number out of range, or an inode not in use, is
	// fs.ErrNotExist; one whose checks fail is ErrCorrupt.
	Inode(ino uint64) (Inode, error)
}

// Inode is one file, directory, symbolic link or special file. What it holds has
// been read and checked; content is read when asked for.
type Inode interface {
	// Stat is the inode's metadata. The caller must not change it.
	Stat() *Stat
	// Lookup finds a name in a directory and gives its inode number: syscall.ENOTDIR if
	// the inode is no directory, fs.ErrNotExist if the whole directory was searched and
	// the name is not there. A name that may stand where the directory is damaged is
	// the error of that place.
	// It does not treat "." and ".." specially; they are not found.
	Lookup(name string) (uint64, error)
	// Entries lists a directory in the order of the disk, without "." and "..".
	// An error stands for entries that cannot be read: a caller that continues gets the
	// entries after it. One that is not [Local] ends the listing.
	Entries() iter.Seq2[Dirent, error]
	// Readlink gives the target of a symbolic link as stored; syscall.EINVAL if the
	// inode is none.
	Readlink() (string, error)
	// Xattrs lists the extended attributes, in order of their names. Those that can be
	// read come with the error that says what cannot.
	Xattrs() ([]Xattr, error)
	// ReadAt and NextData read the content of a regular file. Directories answer
	// syscall.EISDIR, others are empty. Where NextData fails with a [*MapError], there
	// may be data after the range that it names.
	io.ReaderAt
	ExtentFinder
}

// Unlisted is an [Inode] whose Lookup may find names that Entries does not list. Who keeps
// the listed names asks Lookup for those.
type Unlisted interface {
	// MayHide reports whether the name can be one of those.
	MayHide(name string) bool
}

// Missing answers for a name that is not among all those that the directory lists.
func Missing(dir Inode, name string) (uint64, error) {
	if u, ok := dir.(Unlisted); ok && u.MayHide(name) {
		return dir.Lookup(name)
	}
	return 0, fs.ErrNotExist
}

// Dirent is an entry of a directory.
type Dirent struct {
	Name string
	Ino  uint64
	// Type is the type bits of an [fs.FileMode] if the directory records them, else
	// [TypeUnknown].
	Type fs.FileMode
}

// TypeUnknown stands in [Dirent] where the type must be read from the inode.
const TypeUnknown = fs.ModeIrregular

// Stat is an inode's metadata as the Linux kernel would show it in stat(2).
type Stat struct {
	Ino        uint64
	Mode       uint32 // S_IFMT, set-id, sticky and permission bits, as st_mode
	Nlink      uint32
	UID, GID   uint32
	Major      uint32 // of block and character devices
	Minor      uint32
	Size       int64
	Blocks     int64 // allocated, in units of 512 bytes, as st_blocks
	BlockSize  int32 // preferred block size of I/O, as st_blksize
	Atime      time.Time
	Mtime      time.Time
	Ctime      time.Time
	Btime      time.Time // creation; zero where the format does not record it
	Generation uint32
	Flags      uint32 // FS_IOC_GETFLAGS bits: immutable 0x10, append-only 0x20, no dump 0x40
}

// Xattr is an extended attribute as the Linux kernel presents it: the name with
// its prefix ("user.", "security.", "trusted.", "system."), POSIX ACLs in the form
// of getxattr(2) (struct posix_acl_xattr_header and its entries).
type Xattr struct {
	Name  string
	Value []byte
}

// Info describes a volume.
type Info struct {
	Type      string // "ext2", "ext3", "ext4", "xfs", "ntfs", "vfat", …
	Label     string
	UUID      string // as blkid prints it; empty where the format has none
	BlockSize int64  // bytes
	Size      int64  // bytes the file system spans
	Free      int64  // bytes not in use, as statfs would say; -1 if not known
	Files     uint64 // inodes in use; 0 if not known
	// Log says what stood in the journal when the image was opened.
	Log LogState
}

// LogState is the state of a volume's journal (or log).
type LogState int

// States of a journal.
const (
	LogNone     LogState = iota // the format or this volume has none
	LogClean                    // nothing to replay
	LogReplayed                 // replayed in memory: what is shown is what a mount would show
	LogIgnored                  // not clean, and not replayed, since Options.Stale asked so
)

// String gives the state in words.
func (s LogState) String() string {
	switch s {
	case LogNone:
		return "none"
	case LogClean:
		return "clean"
	case LogReplayed:
		return "replayed"
	case LogIgnored:
		return "ignored"
	}
	return fmt.Sprintf("LogState(%d)", int(s))
}

// Options say how to open a volume. Each format has
//
//	func Open(r io.ReaderAt, size int64, opt diskfs.Options) (*FS, error)
//
// whose result implements Inodes. r must allow concurrent calls and is not closed. An
// error of r that concerns only the bytes asked for should match [ErrLost].
type Options struct {
	// Stale opens the state on disk without replaying the journal. It can be wrong,
	// not just old: a directory may be empty that held thousands of files.
	Stale bool
}

// Sentinel errors; test with errors.Is.
var (
	// ErrUnsupported: the image needs something that the reader does not have. The
	// error is an *UnsupportedError and names it.
	ErrUnsupported = errors.New("not supported")
	// ErrCorrupt: the image contradicts its format. The error is a *CorruptError and
	// names the place.
	ErrCorrupt = errors.New("corrupt file system")
	// ErrDirtyLog: the journal is not clean and cannot be replayed in memory. It
	// comes joined with the reason: an UnsupportedError or a CorruptError.
	ErrDirtyLog = errors.New("journal needs recovery")
	// ErrNotRecognised: no signature that is known.
	ErrNotRecognised = probe.ErrNotRecognised
)

// UnsupportedError names the feature that is missing. It matches ErrUnsupported.
type UnsupportedError struct {
	Type    string // file system: "ext4", "xfs", …
	Feature string // in the format's own words: "encrypt", "realtime device", …
	// Advice says what to do; empty means to mount the volume with the kernel.
	Advice string
}

func (e *UnsupportedError) Error() string {
	advice := e.Advice
	if advice == "" {
		advice = "mount the volume with the kernel instead (varve mount --kernel)"
	}
	return fmt.Sprintf("%s: %s is not supported; %s", e.Type, e.Feature, advice)
}

// Is makes errors.Is(err, ErrUnsupported) true.
func (e *UnsupportedError) Is(target error) bool { return target == ErrUnsupported }

// CorruptError names the place where an image contradicts its format. It matches
// ErrCorrupt.
type CorruptError struct {
	Type  string // file system: "ext4", "xfs", …
	Where string // "superblock", "inode 12", "inode 12 extent tree block 3311", …
	What  string // "checksum mismatch", "length 70000 exceeds block size 4096", …
}

func (e *CorruptError) Error() string {
	return fmt.Sprintf("%s: %s: %s: corrupt file system", e.Type, e.Where, e.What)
}

// Is makes errors.Is(err, ErrCorrupt) true.
func (e *CorruptError) Is(target error) bool { return target == ErrCorrupt }

// DirtyLogError wraps the reason why a journal cannot be replayed: it matches
// ErrDirtyLog and whatever reason matches, and says what to do. A kernel mounts what is
// not supported here, and refuses a journal that is damaged.
func DirtyLogError(reason error) error {
	if errors.Is(reason, ErrCorrupt) {
		return fmt.Errorf("%w, and it is damaged, so that the kernel would not mount the volume either (accept the state on disk with --stale, or restore the disk and repair the copy): %w",
			ErrDirtyLog, reason)
	}
	return fmt.Errorf("%w, and this one cannot be replayed in memory (mount with the kernel, or accept the state on disk with --stale): %w",
		ErrDirtyLog, reason)
}

// ValidPath reports whether name can be given to a FileSystem: as [fs.ValidPath],
// but any bytes other than '/' and NUL may stand in an element, UTF-8 or not.
func ValidPath(name string) bool {
	if name == "." {
		return true
	}
	for {
		i := 0
		for i < len(name) && name[i] != '/' {
			i++
		}
		if !ValidName(name[:i]) {
			return false
		}
		if i == len(name) {
			return true
		}
		name = name[i+1:]
	}
}

// ValidName reports whether name can be an entry of a directory: 1 to MaxName bytes,
// none of them '/' or NUL, and neither "." nor "..". Readers must not let any
// other name out of an image.
func ValidName(name string) bool {
	if name == "" || len(name) > MaxName || name == "." || name == ".." {
		return false
	}
	for i := 0; i < len(name); i++ {
		if name[i] == '/' || name[i] == 0 {
			return false
		}
	}
	return true
}

// MaxName is the greatest length of a name in bytes. NTFS and FAT allow 255 UTF-16
// units, which can be up to 765 bytes of UTF-8, so 765 it is; the formats of Linux
// cannot express more than 255 bytes.
const MaxName = 765
