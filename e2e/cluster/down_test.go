package cluster

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

// A crash leaves of a block volume the driver's loop device, held by the kubelet's loop
// device over it.
func TestDetachStackedLoopDevices(t *testing.T) {
	if os.Getuid() != 0 {
		t.Skip("loop devices need root")
	}
	dir := t.TempDir()
	attach := func(file string) string {
		t.Helper()
		dev, err := run(t.Context(), "losetup", "--find", "--show", file)
		if err != nil {
			t.Fatal(err)
		}
		return strings.TrimSpace(dev)
	}
	file := func(name string) string {
		t.Helper()
		path := filepath.Join(dir, name)
		if err := os.WriteFile(path, make([]byte, 1<<20), 0o600); err != nil {
			t.Fatal(err)
		}
		return path
	}
	if err := os.Mkdir(filepath.Join(dir, "run"), 0o700); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		ctx := context.WithoutCancel(t.Context())
		left, err := loopDevices(ctx, dir+"/")
		if err := errors.Join(err, detachLoops(ctx, left)); err != nil {
			t.Error(err)
		}
	})
	lower := attach(file("run/volume.img"))
	upper := attach(lower)
	other := attach(file("other.img"))

	found, err := loopDevices(t.Context(), filepath.Join(dir, "run")+"/")
	if err != nil {
		t.Fatal(err)
	}
	var names []string
	for _, l := range found {
		names = append(names, l.name)
	}
	slices.Sort(names)
	want := []string{lower, upper}
	slices.Sort(want)
	if !slices.Equal(names, want) {
		t.Fatalf("found %v, want %v", found, want)
	}
	if err := detachLoops(t.Context(), found); err != nil {
		t.Fatal(err)
	}
	for _, l := range found {
		if l.attached(t.Context()) {
			t.Errorf("%s is still attached", l.name)
		}
	}
	// A name that another has now is not detached.
	taken := attach(file("taken.img"))
	if err := detachLoops(t.Context(), []loop{{taken, found[0].file}}); err != nil {
		t.Fatal(err)
	}
	if _, err := run(t.Context(), "losetup", taken); err != nil {
		t.Errorf("%s was detached, which has another file: %v", taken, err)
	}
	if _, err := run(t.Context(), "losetup", other); err != nil {
		t.Errorf("%s was detached: %v", other, err)
	}
}
