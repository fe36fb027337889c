package main

import (
	"bytes"
	"encoding/json"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/varve-io/varve/fusefs/diskfs/diskfstest"
	"github.com/varve-io/varve/fusefs/files"
)

// diffFilesOf runs "varve diff --files -o json".
func diffFilesOf(t *testing.T, env testEnv, from, to string) []files.Change {
	t.Helper()
	out := mustRun(t, env, "diff", "--files", from, to, "-o", "json").stdout
	var list []files.Change
	for dec := json.NewDecoder(strings.NewReader(out)); dec.More(); {
		var c files.Change
		if err := dec.Decode(&c); err != nil {
			t.Fatalf("%v\n%s", err, out)
		}
		list = append(list, c)
	}
	return list
}

func summary(list []files.Change) string {
	var out []string
	for _, c := range list {
		out = append(out, strings.TrimSpace(c.Change+" "+c.Path+" "+strings.Join(c.What, ",")))
	}
	return strings.Join(out, "\n")
}

func TestDiffFiles(t *testing.T) {
	diskfstest.NeedTool(t, "debugfs")
	env := newFilesEnv(t)
	image := filepath.Join(env["HOME"], "disk.img")
	again := func() { mustRun(t, env, "backup", image, "--volume", "shop/db") }
	debugfs := func(command string) { diskfstest.Run(t, "debugfs", "-w", "-R", command, image) }

	debugfs("write " + filepath.Join(env["HOME"], "src/data") + " /zulu")
	debugfs("mkdir /alpha")
	debugfs("write " + filepath.Join(env["HOME"], "src/etc/other") + " /alpha/one")
	debugfs("rm /etc/other")
	debugfs("set_inode_field /etc/app.conf mode 0100600")
	debugfs("set_inode_field /etc/app.conf uid 77")
	debugfs("symlink /link /somewhere")
	debugfs("ea_set /etc user.name value")
	// A byte of /data changes, and its metadata does not.
	b, err := os.ReadFile(image)
	if err != nil {
		t.Fatal(err)
	}
	changeByte(t, image, int64(bytes.Index(b, bytes.Repeat([]byte("d"), 50_000)))+20_000)
	again()

	want := `added /alpha
added /alpha/one
changed /data content
changed /etc attributes
changed /etc/app.conf mode,owner
removed /etc/other
added /link
added /zulu`
	got := diffFilesOf(t, env, "shop/db@latest~1", "shop/db@latest")
	if summary(got) != want {
		t.Errorf("the changes are\n%s\nwant\n%s", summary(got), want)
	}
	for _, c := range got {
		if (c.From == nil) != (c.Change == "added") || (c.To == nil) != (c.Change == "removed") {
			t.Errorf("%s %s has %+v and %+v", c.Change, c.Path, c.From, c.To)
		}
	}
	if got := diffFilesOf(t, env, "shop/db@latest", "shop/db@latest"); len(got) != 0 {
		t.Errorf("a point differs from itself:\n%s", summary(got))
	}
	back := diffFilesOf(t, env, "shop/db@latest", "shop/db@latest~1")
	swap := strings.NewReplacer("added", "removed", "removed", "added")
	if summary(back) != swap.Replace(want) {
		t.Errorf("the other way round the changes are\n%s", summary(back))
	}
	out := mustRun(t, env, "diff", "--files", "shop/db@latest~1", "shop/db@latest").stdout
	for _, line := range []string{"+ /alpha/one\n", "- /etc/other\n", "M /etc/app.conf  (mode, owner)\n", "4 added, 1 removed, 3 changed\n"} {
		if !strings.Contains(out, line) {
			t.Errorf("the table has no line %q:\n%s", line, out)
		}
	}

	// A file takes the place of a directory.
	debugfs("rm /alpha/one")
	debugfs("rmdir /alpha")
	debugfs("write " + filepath.Join(env["HOME"], "src/etc/other") + " /alpha")
	again()
	got = diffFilesOf(t, env, "shop/db@latest~1", "shop/db@latest")
	if s := summary(got); !strings.HasPrefix(s, "changed /alpha type") || !strings.Contains(s, "removed /alpha/one") {
		t.Errorf("the changes are\n%s", s)
	}

	mustRun(t, env, "backup", image, "--volume", "shop/other")
	r := runVarve(t, env, "diff", "--files", "shop/db@latest", "shop/other@latest")
	if r.code != exitUsage || !strings.Contains(r.stderr, "different volumes") {
		t.Errorf("two volumes: exit code %d\n%s", r.code, r.stderr)
	}
	if r := runVarve(t, env, "diff", "--stale", "shop/db@latest~1", "shop/db@latest"); r.code != exitUsage {
		t.Errorf("--stale without --files: exit code %d", r.code)
	}
}
