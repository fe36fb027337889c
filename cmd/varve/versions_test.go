package main

import (
	"bytes"
	"encoding/json"
	"os"
	"path/filepath"
	"testing"

	"github.com/varve-io/varve/fusefs/diskfs/diskfstest"
)

func TestVersionsOfAFile(t *testing.T) {
	diskfstest.NeedTool(t, "debugfs")
	env := newFilesEnv(t)
	image := filepath.Join(env["HOME"], "disk.img")
	again := func() { mustRun(t, env, "backup", image, "--volume", "shop/db") }
	again() // nothing changed

	// Another file is written: its blocks share stored ones with /data.
	diskfstest.Run(t, "debugfs", "-w", "-R", "write "+filepath.Join(env["HOME"], "src/etc/other")+" /more", image)
	again()

	// A byte of /data changes, and its metadata does not.
	b, err := os.ReadFile(image)
	if err != nil {
		t.Fatal(err)
	}
	changeByte(t, image, int64(bytes.Index(b, bytes.Repeat([]byte("d"), 50_000)))+20_000)
	again()

	diskfstest.Run(t, "debugfs", "-w", "-R", "rm /data", image)
	again()

	var list []fileVersion
	out := mustRun(t, env, "ls", "--versions", "shop/db:/data", "-o", "json").stdout
	if err := json.Unmarshal([]byte(out), &list); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	if len(list) != 3 || list[0].Points != 3 || list[1].Points != 1 || list[2].Points != 1 ||
		list[0].File == nil || list[0].File.Size != 100_000 || list[1].File == nil || list[2].File != nil {
		t.Errorf("the versions are\n%s", out)
	}
	for _, c := range []struct {
		args []string
		code int
	}{
		{[]string{"ls", "--versions", "shop/db"}, exitUsage},
		{[]string{"ls", "--versions", "shop/nothing:/data"}, exitNotFound},
	} {
		if r := runVarve(t, env, c.args...); r.code != c.code {
			t.Errorf("%v: exit code %d, want %d\n%s", c.args, r.code, c.code, r.stderr)
		}
	}
}
