package csidriver

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"strings"
)

func run(ctx context.Context, name string, args ...string) (string, error) {
	out, err := exec.CommandContext(ctx, name, args...).CombinedOutput()
	text := strings.TrimSpace(string(out))
	if err != nil {
		return text, fmt.Errorf("%s %s: %w: %s", name, strings.Join(args, " "), err, text)
	}
	return text, nil
}

// copyImage copies an image by reference if the file system can, else only its data,
// keeping holes.
func copyImage(ctx context.Context, from, to string) error {
	_, err := run(ctx, "cp", "--reflink=auto", "--sparse=auto", from, to)
	if err != nil {
		return errors.Join(err, os.RemoveAll(to))
	}
	return nil
}

// loopOf returns the loop device of an image, or "".
func loopOf(ctx context.Context, img string) (string, error) {
	out, err := run(ctx, "losetup", "-j", img, "-n", "-O", "NAME")
	if err != nil {
		return "", err
	}
	first, _, _ := strings.Cut(out, "\n")
	return strings.TrimSpace(first), nil
}

func attachLoop(ctx context.Context, img string) (string, error) {
	if dev, err := loopOf(ctx, img); err != nil || dev != "" {
		return dev, err
	}
	return run(ctx, "losetup", "--find", "--show", img)
}

func detachLoop(ctx context.Context, img string) error {
	if _, err := os.Stat(img); errors.Is(err, os.ErrNotExist) {
		return nil
	}
	dev, err := loopOf(ctx, img)
	if err != nil || dev == "" {
		return err
	}
	_, err = run(ctx, "losetup", "-d", dev)
	return err
}

// flushLoop writes what the device's page cache holds into the image.
func flushLoop(ctx context.Context, img string) error {
	dev, err := loopOf(ctx, img)
	if err != nil || dev == "" {
		return err
	}
	_, err = run(ctx, "blockdev", "--flushbufs", dev)
	return err
}

// mountpoint reports whether something is mounted on p, a directory or a file.
func mountpoint(ctx context.Context, p string) bool {
	out, err := exec.CommandContext(ctx, "findmnt", "-n", "--mountpoint", p).Output()
	return err == nil && len(out) > 0
}

// probeFS returns the file system on a device, or "" if blkid knows none.
func probeFS(ctx context.Context, dev string) string {
	out, _ := run(ctx, "blkid", "-p", "-o", "value", "-s", "TYPE", dev)
	return out
}

func makeFS(ctx context.Context, fsType, dev string) error {
	var err error
	switch fsType {
	case "ext4":
		_, err = run(ctx, "mkfs.ext4", "-q", "-F", "-m", "0", dev)
	case "xfs":
		_, err = run(ctx, "mkfs.xfs", "-q", "-f", dev)
	default:
		err = fmt.Errorf("file system %q is not known; use ext4 or xfs", fsType)
	}
	return err
}

// growExt4 grows an unmounted ext4 to its device. Growing a mounted one needs
// CAP_SYS_RESOURCE, which some machines do not grant.
func growExt4(ctx context.Context, dev string) error {
	if _, err := run(ctx, "e2fsck", "-f", "-p", dev); err != nil {
		var exit *exec.ExitError
		if !errors.As(err, &exit) || exit.ExitCode() > 1 { // 1: errors corrected
			return err
		}
	}
	_, err := run(ctx, "resize2fs", dev)
	return err
}
