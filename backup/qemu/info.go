package qemu

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
)

// Info is what qemu-img says of an image file.
type Info struct {
	Format  string
	Size    int64 // of the disk, in bytes
	Bitmaps []BitmapInfo
	Corrupt bool
	// DataFile is the file that holds the bytes, if that is another one.
	DataFile string
	// DataFileRaw means that the data file is the disk as a raw image. QEMU reserves all of it whenever the disk grows.
	DataFileRaw bool
}

// BitmapInfo is a persistent bitmap of a qcow2's own.
type BitmapInfo struct {
	Name        string   `json:"name"`
	Granularity int64    `json:"granularity"`
	Flags       []string `json:"flags"`
}

// Recording reports whether the bitmap notes each write.
func (b BitmapInfo) Recording() bool { return slices.Contains(b.Flags, "auto") }

// InUse reports whether another process has the bitmap in memory, or the last one that had
// died: then it is inconsistent for ever and can only be removed.
func (b BitmapInfo) InUse() bool { return slices.Contains(b.Flags, "in-use") }

// Bounds of qemu-img's answer: 65535 bitmaps are the most that a qcow2 has.
const maxAnswer = 16 << 20

// parseInfo reads the answer of "qemu-img info --output=json".
func parseInfo(text []byte) (*Info, error) {
	var raw struct {
		Size     *int64 `json:"virtual-size"`
		Format   string `json:"format"`
		Specific struct {
			Data struct {
				Bitmaps  []BitmapInfo `json:"bitmaps"`
				Corrupt  bool         `json:"corrupt"`
				DataFile string       `json:"data-file"`
				Raw      bool         `json:"data-file-raw"`
			} `json:"data"`
		} `json:"format-specific"`
	}
	if err := json.Unmarshal(text, &raw); err != nil {
		return nil, fmt.Errorf("read the answer of qemu-img: %w", err)
	}
	if raw.Size == nil || *raw.Size < 0 || raw.Format == "" {
		return nil, errors.New("read the answer of qemu-img: it names no size or no format")
	}
	specific := raw.Specific.Data
	return &Info{Format: raw.Format, Size: *raw.Size, Bitmaps: specific.Bitmaps, Corrupt: specific.Corrupt, DataFile: specific.DataFile, DataFileRaw: specific.Raw}, nil
}

// Host is the machine where images lie and QEMU's programs run. The zero value is this one.
type Host struct {
	// Command prepares a program to run in a folder of another machine.
	Command func(ctx context.Context, dir string, argv ...string) (*exec.Cmd, error)
}

// ReadInfo is Host.ReadInfo of this machine.
func ReadInfo(ctx context.Context, path, format string) (*Info, error) {
	return Host{}.ReadInfo(ctx, path, format)
}

// ReadInfo describes an image file. It fails with ErrLocked where another process writes to
// it: what would be read is moving.
func (h Host) ReadInfo(ctx context.Context, path, format string) (*Info, error) {
	out, err := h.runAt(ctx, path, "info", "--output=json", "-f", format, "--", absolute(path))
	if err != nil {
		return nil, err
	}
	info, err := parseInfo(out)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	return info, nil
}

// AddBitmap has a qcow2 record what is written from now on.
func (h Host) AddBitmap(ctx context.Context, path, name string) error {
	_, err := h.runAt(ctx, path, "bitmap", "--add", "-f", QCOW2, "--", absolute(path), name)
	return err
}

// RemoveBitmap deletes a bitmap of a qcow2; an inconsistent one too.
func (h Host) RemoveBitmap(ctx context.Context, path, name string) error {
	_, err := h.runAt(ctx, path, "bitmap", "--remove", "-f", QCOW2, "--", absolute(path), name)
	return err
}

// Create makes an image file of size bytes, which reads as zeroes. A vhd keeps that size to
// the byte, where QEMU would else round it to cylinders.
func Create(ctx context.Context, path, format string, size int64) error {
	args := []string{"create", "-q", "-f", format}
	if format == VPC {
		args = append(args, "-o", "force_size=on")
	}
	_, err := Host{}.runAt(ctx, path, append(args, "--", absolute(path), fmt.Sprint(size))...)
	return err
}

// Errors that callers decide by.
var (
	// ErrLocked means that another process has the image open.
	ErrLocked = errors.New("the image is in use by another process, such as a running virtual machine")
	// ErrNoProgram means that QEMU's programs are not installed.
	ErrNoProgram = errors.New("a program of QEMU is missing")
)

// runAt runs qemu-img on an image and returns what it printed. It runs in the image's folder: QEMU looks for a data file with
// a relative name in the working directory, and CheckReferences in the image's.
func (h Host) runAt(ctx context.Context, image string, args ...string) ([]byte, error) {
	const program = "qemu-img"
	cmd, err := h.command(ctx, filepath.Dir(absolute(image)), append([]string{program}, args...)...)
	if err != nil {
		return nil, err
	}
	stdout, stderr := &head{limit: maxAnswer}, &head{limit: 4 << 10}
	cmd.Stdout, cmd.Stderr = stdout, stderr
	err = cmd.Run()
	switch {
	case ctx.Err() != nil:
		return nil, context.Cause(ctx)
	case err != nil:
		return nil, Explain(program, stderr.String(), err)
	case stdout.cut:
		return nil, fmt.Errorf("%s printed more than %d bytes", program, maxAnswer)
	}
	return stdout.buf.Bytes(), nil
}

func (h Host) command(ctx context.Context, dir string, argv ...string) (*exec.Cmd, error) {
	if h.Command != nil {
		return h.Command(ctx, dir, argv...)
	}
	path, err := find(argv[0])
	if err != nil {
		return nil, err
	}
	cmd := exec.CommandContext(ctx, path, argv[1:]...)
	cmd.Env, cmd.Dir = Environment(), dir
	return cmd, nil
}

func find(program string) (string, error) {
	path, err := exec.LookPath(program)
	if err != nil {
		return "", fmt.Errorf("%w: %s; it is in the package qemu-utils (Debian) or qemu-img (Fedora)", ErrNoProgram, program)
	}
	return path, nil
}

// Explain is the error of a program that failed, with what it printed.
func Explain(program, printed string, err error) error {
	text := strings.TrimPrefix(strings.TrimSpace(printed), program+": ")
	if i := strings.IndexByte(text, '\n'); i >= 0 && strings.Contains(text[i:], "Is another process") {
		text = text[:i]
	}
	text = strings.ReplaceAll(text, "\n", "; ")
	switch {
	case strings.Contains(text, `Failed to get`) && strings.Contains(text, "lock"):
		return fmt.Errorf("%w (%s)", ErrLocked, text)
	case text == "":
		return fmt.Errorf("%s: %w", program, err)
	}
	return fmt.Errorf("%s: %s", program, text)
}

// Environment is what QEMU's programs, and Ceph's, are given: none of our secrets.
func Environment() []string {
	env := []string{"LC_ALL=C"}
	for _, name := range []string{"PATH", "HOME", "TMPDIR", "CEPH_CONF", "CEPH_ARGS"} {
		if v, ok := os.LookupEnv(name); ok {
			env = append(env, name+"="+v)
		}
	}
	return env
}

// absolute gives a path that QEMU takes for one: "x:y.qcow2" would be a protocol.
func absolute(path string) string {
	if full, err := filepath.Abs(path); err == nil {
		return full
	}
	return path
}

// head keeps the beginning of what is written to it.
type head struct {
	buf   bytes.Buffer
	limit int
	cut   bool
}

func (h *head) Write(p []byte) (int, error) {
	if room := h.limit - h.buf.Len(); len(p) > room {
		h.buf.Write(p[:room])
		h.cut = true
	} else {
		h.buf.Write(p)
	}
	return len(p), nil
}

func (h *head) String() string { return h.buf.String() }
