package ociimage

import (
	"archive/tar"
	"bytes"
	"encoding/json"
	"errors"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// buildApp compiles a program as the project's own image is made.
func buildApp(t *testing.T, cgo string) string {
	t.Helper()
	dir := t.TempDir()
	src := "package main\nimport (\"net\";\"os/user\")\nfunc main() { _, _ = user.Current(); _, _ = net.LookupHost(\"localhost\"); println(\"hello\") }\n"
	for name, text := range map[string]string{"main.go": src, "go.mod": "module example.invalid/app\n\ngo 1.26\n"} {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	cmd := exec.Command("go", "build", "-trimpath", "-buildvcs=false", "-ldflags", "-s -w -buildid=", "-o", "app", ".")
	cmd.Dir = dir
	cmd.Env = append(os.Environ(), "CGO_ENABLED="+cgo) // GOFLAGS too: the standard library is compiled with them already
	if out, err := cmd.CombinedOutput(); err != nil {
		if cgo == "1" {
			t.Skipf("no C compiler here: %v", err)
		}
		t.Fatalf("%v: %s", err, out)
	}
	return filepath.Join(dir, "app")
}

func TestStaticAppIsReproducible(t *testing.T) {
	var archives [][]byte
	for range 2 {
		app := StaticApp{Binary: buildApp(t, "0"), Name: "app", Version: "v1", Created: time.Unix(1700000000, 0), Compress: true}
		img, sbom, err := app.Build()
		if err != nil {
			t.Fatal(err)
		}
		file := filepath.Join(t.TempDir(), "app.tar")
		if err := WriteArchive(file, "example.invalid/app:v1", img); err != nil {
			t.Fatal(err)
		}
		b, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		archives = append(archives, b)

		cf, err := img.ConfigFile()
		if err != nil {
			t.Fatal(err)
		}
		if cf.Config.User != "65532:65532" || cf.Config.Entrypoint[0] != "/usr/local/bin/app" || cf.OS != "linux" || cf.Architecture == "" {
			t.Errorf("the configuration is %+v", cf)
		}
		var doc spdxDocument
		if err := json.Unmarshal(sbom, &doc); err != nil {
			t.Fatal(err)
		}
		if doc.Version != "SPDX-2.3" || len(doc.Packages) < 2 || doc.Packages[1].Name != "stdlib" || doc.Packages[1].Version == "" {
			t.Errorf("the bill of materials is %s", sbom)
		}
		layers, err := img.Layers()
		if err != nil || len(layers) != 1 {
			t.Fatalf("%d layers, %v", len(layers), err)
		}
		r, err := layers[0].Uncompressed()
		if err != nil {
			t.Fatal(err)
		}
		seen := map[string]*tar.Header{}
		for tr := tar.NewReader(r); ; {
			h, err := tr.Next()
			if errors.Is(err, io.EOF) {
				break
			}
			if err != nil {
				t.Fatal(err)
			}
			seen[h.Name] = h
			if h.Mode&0o6000 != 0 || h.Uid != 0 || h.ModTime.Unix() != 1700000000 {
				t.Errorf("entry %+v", h)
			}
			if h.Name == "etc/ssl/certs/ca-certificates.crt" {
				b, err := io.ReadAll(tr)
				if err != nil || bytes.Count(b, []byte("BEGIN CERTIFICATE")) < 50 {
					t.Errorf("only %d bytes of authorities, %v", len(b), err)
				}
			}
		}
		for _, want := range []string{"usr/local/bin/app", "etc/passwd", "etc/ssl/certs/ca-certificates.crt", "usr/share/sbom/app.spdx.json", "tmp/"} {
			if seen[want] == nil {
				t.Errorf("the image has no %s", want)
			}
		}
		if seen["bin/sh"] != nil {
			t.Error("the image has a shell")
		}
	}
	if !bytes.Equal(archives[0], archives[1]) {
		t.Error("two builds differ")
	}
}

func TestDynamicBinaryIsRefused(t *testing.T) {
	_, _, err := StaticApp{Binary: buildApp(t, "1"), Name: "app"}.Build()
	if err == nil || !strings.Contains(err.Error(), "CGO_ENABLED=0") {
		t.Fatalf("got %v", err)
	}
	_, _, err = StaticApp{Binary: "/bin/sh", Name: "app"}.Build()
	if err == nil {
		t.Fatal("a binary that is not Go's was taken")
	}
}
