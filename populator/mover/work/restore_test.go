package work

import (
	"bytes"
	"log/slog"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/varve-io/varve/api/v1alpha1"
	"github.com/varve-io/varve/backup"
	"github.com/varve-io/varve/backup/disk"
	"github.com/varve-io/varve/backup/points"
	"github.com/varve-io/varve/backup/repository/repotest"
	"github.com/varve-io/varve/internal/probe"
	"github.com/varve-io/varve/populator/mover"
	"github.com/varve-io/varve/populator/store"
)

// ext4Magic is the minimum of an ext4 disk: a superblock with the magic, a few sizes and
// a feature that ext3 lacks (extents).
func ext4Magic(p []byte) {
	sb := p[1024:2048]
	clear(sb)
	sb[0x38], sb[0x39] = 0x53, 0xef
	sb[0], sb[4], sb[0x18], sb[0x20+1], sb[0x28] = 16, 0xff, 2, 0x80, 16
	sb[0x60] = 0x40
}

func TestRestore(t *testing.T) {
	const size = 5<<20 + 4096
	data := make([]byte, size)
	rng := rand.NewChaCha8([32]byte{1})
	_, _ = rng.Read(data[:1<<20])
	_, _ = rng.Read(data[4<<20:])
	ext4Magic(data)
	dir := t.TempDir()
	write := func(name string, p []byte) string {
		t.Helper()
		path := filepath.Join(dir, name)
		if err := os.WriteFile(path, p, 0o600); err != nil {
			t.Fatal(err)
		}
		return path
	}
	repo := repotest.New(t).Open(t)
	src, err := disk.Open(write("source", data), disk.Options{})
	if err != nil {
		t.Fatal(err)
	}
	defer src.Close()
	_, rec, err := backup.Run(t.Context(), repo, backup.Options{Disk: src, Volume: points.Volume{Namespace: "shop", Name: "db", Cluster: "test"}})
	if err != nil {
		t.Fatal(err)
	}
	_, dump, err := backup.RunStream(t.Context(), repo, backup.StreamOptions{Reader: strings.NewReader("rows"), Volume: points.Volume{Namespace: "shop", Name: "dump", Cluster: "test"}})
	if err != nil {
		t.Fatal(err)
	}
	dirty := bytes.Repeat([]byte{0xa5}, size+8192)
	for _, tc := range []struct {
		name, point string
		device      []byte
		loop        bool // as a block device
		reason      string
	}{
		{name: "a block device", point: rec.ID, device: dirty[:size+4096], loop: true},
		{name: "a larger device full of something else", point: rec.ID, device: dirty},
		{name: "a device of the same size", point: rec.ID, device: dirty[:size]},
		{name: "a short device", point: rec.ID, device: dirty[:4<<20], reason: v1alpha1.ReasonDeviceShort},
		{name: "a point that is gone", point: "00000000000000000000000000000000", device: dirty, reason: v1alpha1.ReasonNoRecoveryPoint},
		{name: "a stream", point: dump.ID, device: dirty, reason: v1alpha1.ReasonInvalidSpec},
	} {
		t.Run(tc.name, func(t *testing.T) {
			path := write("device", tc.device)
			device := path
			if tc.loop {
				device = loopDevice(t, path)
			}
			e := Environment{Device: device, Probe: probe.Type, Log: &bytes.Buffer{}, Logger: slog.New(slog.DiscardHandler)}
			res, err := restore(t.Context(), e, mover.Task{Restore: &mover.RestoreTask{PointID: tc.point}}, &store.Open{Repository: repo})
			if tc.reason != "" {
				got := failure(t.Context(), err)
				if got.Reason != tc.reason || got.Again != (tc.reason == v1alpha1.ReasonDeviceShort) {
					t.Errorf("reason %s (%v), again %v, want %s", got.Reason, err, got.Again, tc.reason)
				}
				if tc.reason == v1alpha1.ReasonDeviceShort && res.Restore.DeviceBytes != int64(len(tc.device)) {
					t.Errorf("says that the device has %d bytes", res.Restore.DeviceBytes)
				}
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			have, err := os.ReadFile(path)
			if err != nil {
				t.Fatal(err)
			}
			if !bytes.Equal(have[:size], data) {
				t.Error("the device does not hold the point")
			}
			if r := res.Restore; r.VerifiedBytes != size || r.FileSystem != "ext4" || r.DeviceBytes != int64(len(tc.device)) {
				t.Errorf("result %+v", r)
			}
		})
	}
}

// loopDevice is a block device over a file.
func loopDevice(t *testing.T, file string) string {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("a loop device needs root")
	}
	out, err := exec.Command("losetup", "--find", "--show", file).CombinedOutput()
	if err != nil {
		t.Skipf("a loop device needs losetup and free devices: %v: %s", err, out)
	}
	dev := strings.TrimSpace(string(out))
	t.Cleanup(func() {
		if out, err := exec.Command("losetup", "--detach", dev).CombinedOutput(); err != nil {
			t.Errorf("detach %s: %v: %s", dev, err, out)
		}
	})
	return dev
}
