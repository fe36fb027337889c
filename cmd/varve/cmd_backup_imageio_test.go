package main

import (
	"bytes"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/varve-io/varve/backup/imageio/imageiotest"
)

// transferFile is the URI of a service's transfer, with its URL in a file.
func transferFile(t *testing.T, s *imageiotest.Server) string {
	t.Helper()
	file := filepath.Join(t.TempDir(), "url")
	if err := os.WriteFile(file, []byte(s.URL+"\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	return "imageio://" + file + "?tls-ca=" + s.CA
}

// TestBackupOfTransfers backs two disks of oVirt up as a group, makes an increment of one, and
// restores it to an upload.
func TestBackupOfTransfers(t *testing.T) {
	env, _ := newBackupEnv(t)
	disk := bytes.Repeat([]byte("oVirt's "), 1<<18)
	clear(disk[1<<20:])
	start := func(dirty ...imageiotest.Range) string {
		return transferFile(t, imageiotest.Start(t, imageiotest.Config{Disk: disk, ReadOnly: true, Pieces: 99_999, Dirty: dirty}))
	}
	out := mustRun(t, env, "backup", "root="+start(), "data="+start(), "--volume", "shop/vm", "--change-id", "monday").stdout
	if strings.Count(out, "oVirt transfer, changes by allocation") != 2 || !strings.Contains(out, "2 recovery points") {
		t.Errorf("the group:\n%s", out)
	}
	copy(disk[1<<19:], "changed")
	now := start(imageiotest.Range{Offset: 1 << 19, Length: 4096})
	if out = mustRun(t, env, "source", "info", now, "--volume", "shop/vm-root", "--base-change-id", "monday").stdout; !strings.Contains(out, "oVirt transfer of 2 MiB") || !strings.Contains(out, "reads 4 KiB, changes by imageio") {
		t.Errorf("the source:\n%s", out)
	}
	out = mustRun(t, env, "backup", now, "--volume", "shop/vm-root", "--base-change-id", "monday", "--change-id", "tuesday").stdout
	if !strings.Contains(out, "incremental backup") || !strings.Contains(out, "oVirt transfer, changes by imageio") {
		t.Errorf("the increment:\n%s", out)
	}
	out = mustRun(t, env, "backup", now, "--volume", "shop/vm-root", "--base-change-id", "monday", "--change-id", "wednesday").stdout
	if !strings.Contains(out, "changes by allocation") || !strings.Contains(out, "instead of imageio: BaseMismatch") {
		t.Errorf("of a checkpoint that the parent is not:\n%s", out)
	}

	old := bytes.Repeat([]byte{7}, len(disk))
	up := imageiotest.Start(t, imageiotest.Config{Disk: old})
	out = mustRun(t, env, "restore", "shop/vm-root@latest", transferFile(t, up), "--verify").stdout
	if up.Lose(); !bytes.Equal(up.Disk(), disk) || !strings.Contains(out, "verified") {
		t.Errorf("the upload holds another disk:\n%s", out)
	}
	if seen := up.Seen(); seen.Requests["PUT"] == 0 || seen.ZeroBytes != 1<<20 {
		t.Errorf("the upload saw %+v", seen)
	}
	down := imageiotest.Start(t, imageiotest.Config{Disk: old, ReadOnly: true})
	if r := runVarve(t, env, "restore", "shop/vm-root@latest", transferFile(t, down)); r.code != exitRefused || !strings.Contains(r.stderr, "start an upload") {
		t.Errorf("to a download: exit code %d\n%s", r.code, r.stderr)
	}
	for _, args := range [][]string{{"backup", down.URL, "--volume", "shop/vm-root"}, {"restore", "shop/vm-root@latest", up.URL}, {"source", "info", down.URL}} {
		r := runVarve(t, env, args...)
		if r.code != exitUsage || !strings.Contains(r.stderr, "imageio:///PATH") || strings.Contains(r.stderr, imageiotest.Ticket) {
			t.Errorf("varve %s with a URL: exit code %d\n%s", args[0], r.code, r.stderr)
		}
	}
}
