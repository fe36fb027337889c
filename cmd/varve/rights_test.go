package main

import (
	"math/rand/v2"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/minio/minio-go/v7"

	"github.com/varve-io/varve/backup/repository/repotest/servers"
	"github.com/varve-io/varve/fusefs/diskfs/diskfstest"
)

// rightsRow is a command and its result with few rights. Reading commands always work; the
// errors of others name the missing right.
type rightsRow struct {
	args    string // DISK is a disk, NEW a file that does not exist
	reading bool
	// missing is what a writing command reports with a key that may only get and list, and
	// with one that may also write but not delete.
	missing, missingDelete string
}

var rightsTable = []rightsRow{
	{args: "list", reading: true},
	{args: "show shop/db@latest", reading: true},
	{args: "diff shop/db@latest~1 shop/db@latest", reading: true},
	{args: "ls shop/db@latest:/etc", reading: true},
	{args: "cat shop/db@latest:/etc/app.conf", reading: true},
	{args: "cp shop/db@latest:/etc/app.conf NEW", reading: true},
	{args: "find shop/db@latest:/ --name *.conf", reading: true},
	{args: "tree shop/db@latest:/etc", reading: true},
	{args: "stat shop/db@latest:/etc/app.conf", reading: true},
	{args: "restore shop/db@latest NEW", reading: true},
	{args: "verify", reading: true},
	{args: "verify --read 100%", reading: true},
	{args: "repo status", reading: true},
	{args: "prune --keep-latest 1 --dry-run", reading: true},
	{args: "backup DISK --volume shop/db", missing: "write and delete", missingDelete: "delete"},
	{args: "backup DISK --volume shop/other", missing: "write and delete", missingDelete: "delete"},
	{args: "pin shop/db@latest mine", missing: "delete", missingDelete: "delete"},
	{args: "forget shop/db@latest~1 --yes", missing: "delete", missingDelete: "delete"},
	{args: "prune --keep-latest 1", missing: "delete", missingDelete: "delete"},
	{args: "maintenance run --full", missing: "delete", missingDelete: "delete"},
	{args: "verify --quarantine", reading: true}, // nothing is damaged
}

func (row rightsRow) run(t *testing.T, env testEnv, image string) result {
	t.Helper()
	args := strings.NewReplacer("DISK", image, "NEW", filepath.Join(t.TempDir(), "new")).Replace(row.args)
	return runVarve(t, env, strings.Fields(args)...)
}

// newRightsImage makes a disk with a file system, of which some blocks change with each call.
func newRightsImage(t *testing.T, env testEnv) string {
	t.Helper()
	src := filepath.Join(env["HOME"], "src")
	if err := os.MkdirAll(filepath.Join(src, "etc"), 0o755); err != nil {
		t.Fatal(err)
	}
	noise := make([]byte, 1<<20)
	rng := rand.NewChaCha8([32]byte{7})
	_, _ = rng.Read(noise) // never fails
	for name, data := range map[string][]byte{"etc/app.conf": []byte("port=1\n"), "noise": noise} {
		if err := os.WriteFile(filepath.Join(src, name), data, 0o640); err != nil {
			t.Fatal(err)
		}
	}
	image := filepath.Join(env["HOME"], "disk.img")
	diskfstest.Run(t, "mke2fs", "-q", "-F", "-t", "ext4", "-d", src, image, "8M")
	return image
}

// TestRightsOfCommands runs commands with restricted keys of an object storage.
func TestRightsOfCommands(t *testing.T) {
	address, rights := servers.StartS3Rights(t)
	if err := servers.S3Client(t, address).MakeBucket(t.Context(), "rights", minio.MakeBucketOptions{}); err != nil {
		t.Fatal(err)
	}
	env := newTestEnv(t)
	env["VARVE_S3_SECRET_ACCESS_KEY"] = servers.S3SecretKey
	image := newRightsImage(t, env)
	storage := []string{"s3", "--bucket", "rights", "--endpoint", address, "--disable-tls", "--access-key-id", servers.S3AccessKey, "--no-cache"}
	mustRun(t, env, append([]string{"repo", "create"}, storage...)...)
	for i := range 3 {
		changeByte(t, image, 4<<20+int64(i))
		mustRun(t, env, "backup", image, "--volume", "shop/db")
	}
	changeByte(t, image, 5<<20) // so that a backup has something to store
	before := mustRun(t, env, "list").stdout
	for _, key := range []struct {
		name string
		deny []string
	}{
		{"get and list", []string{http.MethodPut, http.MethodPost, http.MethodDelete}},
		{"get, list and put", []string{http.MethodPost, http.MethodDelete}},
	} {
		for _, row := range rightsTable {
			t.Run(key.name+"/"+strings.ReplaceAll(row.args, "/", "-"), func(t *testing.T) {
				rights.Deny(key.deny...)
				defer rights.Deny()
				missing := row.missing
				if len(key.deny) == 2 {
					missing = row.missingDelete
				}
				r := row.run(t, env, image)
				switch {
				case row.reading && r.code != exitOK:
					t.Errorf("exit code %d: %s", r.code, r.stderr)
				case !row.reading && (r.code != exitRefused || !strings.Contains(r.stderr, "may not "+missing+" objects in S3 bucket rights")):
					t.Errorf("exit code %d, want %d and that the right to %s is missing: %s", r.code, exitRefused, missing, r.stderr)
				}
				// One request for each right, and for each lease.
				if n := rights.Denied(); n > 2 {
					t.Errorf("%d requests were denied: they were tried again", n)
				}
				if n := rights.Done(http.MethodPut); n > 1 || row.reading && n > 0 {
					t.Errorf("%d objects were written", n)
				}
			})
		}
	}
	if after := mustRun(t, env, "list").stdout; after != before {
		t.Errorf("commands without rights changed what there is: before\n%safter\n%s", before, after)
	}
	rights.Deny(http.MethodPut, http.MethodPost, http.MethodDelete)
	mustRun(t, env, append([]string{"repo", "connect"}, storage...)...)
	rights.Deny()
	for _, row := range rightsTable {
		if r := row.run(t, env, image); r.code != exitOK {
			t.Errorf("%s with all rights: exit code %d: %s", row.args, r.code, r.stderr)
		}
	}
}

// TestRightsInDirectory is the same for a directory mounted read-only.
func TestRightsInDirectory(t *testing.T) {
	env := newTestEnv(t)
	image := newRightsImage(t, env)
	dir := filepath.Join(env["HOME"], "repo")
	mustRun(t, env, "repo", "create", "filesystem", "--path", dir)
	for i := range 3 {
		changeByte(t, image, 4<<20+int64(i))
		mustRun(t, env, "backup", image, "--volume", "shop/db")
	}
	mountOver(t, dir)(true)
	for _, row := range rightsTable {
		t.Run(strings.ReplaceAll(row.args, "/", "-"), func(t *testing.T) {
			r := row.run(t, env, image)
			switch {
			case row.reading && r.code != exitOK:
				t.Errorf("exit code %d: %s", r.code, r.stderr)
			case !row.reading && (r.code != exitRefused || !strings.Contains(r.stderr, "may not write in directory "+dir) || !strings.Contains(r.stderr, "read-only file system")):
				t.Errorf("exit code %d: %s", r.code, r.stderr)
			}
		})
	}
}
