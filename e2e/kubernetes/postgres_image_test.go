package kubernetes

import (
	"errors"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"runtime"
	"strings"
	"sync"
	"time"

	"github.com/varve-io/varve/e2e/cluster/ociimage"
)

const (
	postgresImage = "e2e.local/postgres:1"
	busybox       = "/bin/busybox" // of the package busybox-static
)

// postgresDir is Debian's PostgreSQL on this machine: /usr/lib/postgresql/N.
func (s *site) postgresDir() string {
	s.T.Helper()
	found, err := filepath.Glob("/usr/lib/postgresql/*/bin/postgres")
	if err != nil || len(found) == 0 {
		s.T.Skip("Debian's PostgreSQL is not installed; make setup installs it")
	}
	return filepath.Dir(filepath.Dir(found[len(found)-1]))
}

// importPostgres makes an image of Debian's PostgreSQL as installed on this machine, with
// the libraries it is linked to, and imports it into the cluster.
func (s *site) importPostgres() {
	s.T.Helper()
	dir := s.postgresDir()
	var programs []string
	for _, bin := range []string{"postgres", "initdb", "psql", "pg_ctl", "pg_dump"} {
		programs = append(programs, filepath.Join(dir, "bin", bin))
	}
	s.importImage(postgresImage, dir+"/bin", programs, dir, "/usr/share/postgresql/"+filepath.Base(dir), "/usr/share/zoneinfo/UTC", "/usr/share/zoneinfo/Etc")
}

// imported are the images that this process has brought to its cluster.
var imported struct {
	sync.Mutex
	names map[string]bool
}

// importImage makes an image of files and folders of this machine and of BusyBox, with the
// libraries that programs are linked to, and imports it into the cluster, once. Its user is 999,
// postgres.
func (s *site) importImage(name, path string, programs []string, roots ...string) {
	s.T.Helper()
	imported.Lock()
	defer imported.Unlock()
	if imported.names[name] {
		return
	}
	files := append(ociimage.Base(), ociimage.File{Path: "/bin/busybox", Mode: 0o755, Source: busybox})
	applets, err := exec.Command(busybox, "--list").Output()
	if err != nil {
		s.T.Fatal(err)
	}
	for a := range strings.FieldsSeq(string(applets)) {
		if a != "busybox" {
			files = append(files, ociimage.File{Path: "/bin/" + a, Mode: fs.ModeSymlink, Link: "busybox"})
		}
	}
	have := map[string]bool{}
	add := func(path string) {
		if have[path] {
			return
		}
		have[path] = true
		files = append(files, ociimage.File{Path: path, Mode: 0o755, Source: path}) // a link's target, under its own name
	}
	for _, root := range append(roots, programs...) {
		if err := filepath.WalkDir(root, func(p string, e fs.DirEntry, err error) error {
			if err != nil || e.IsDir() || strings.Contains(p, "llvmjit") || strings.Contains(p, "/bitcode/") {
				return err
			}
			if info, err := os.Stat(p); err != nil || !info.Mode().IsRegular() {
				return nil // a link to what is not needed here
			}
			add(p)
			return nil
		}); err != nil && !errors.Is(err, fs.ErrNotExist) {
			s.T.Fatal(err)
		}
	}
	lib := regexp.MustCompile(`(/\S+) \(0x`)
	for _, bin := range programs {
		out, err := exec.Command("ldd", bin).Output()
		if err != nil {
			s.T.Fatal(err)
		}
		for _, m := range lib.FindAllStringSubmatch(string(out), -1) {
			add(m[1])
		}
	}
	for i := range files {
		if files[i].Path == "/etc/passwd" {
			files[i].Data = append(files[i].Data, "postgres:x:999:999:postgres:/tmp:/bin/sh\n"...)
		}
	}
	img, err := ociimage.Build(files, ociimage.Config{Architecture: runtime.GOARCH, User: "999:999", Created: time.Unix(0, 0),
		Env: []string{"PATH=" + path + ":/bin", "LC_ALL=C"}})
	if err != nil {
		s.T.Fatal(err)
	}
	archive := filepath.Join(s.T.TempDir(), "image.tar")
	if err := ociimage.WriteArchive(archive, name, img); err != nil {
		s.T.Fatal(err)
	}
	if err := s.Cluster.ImportImage(s.T.Context(), archive); err != nil {
		s.T.Fatal(err)
	}
	if imported.names == nil {
		imported.names = map[string]bool{}
	}
	imported.names[name] = true
}
