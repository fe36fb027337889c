package ociimage

import (
	"bytes"
	"crypto/sha256"
	"debug/buildinfo"
	"debug/elf"
	"encoding/hex"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"os"
	"path"
	"runtime/debug"
	"strings"
	"time"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"golang.org/x/crypto/x509roots/fallback/bundle"
)

// StaticApp is an image of one static Go binary, like distroless: users, certificate
// authorities, the binary and its bill of materials, no shell, not root.
type StaticApp struct {
	Binary  string // path of the binary
	Name    string // its name in the image, below /usr/local/bin
	Version string
	Source  string // the project's address, for the labels
	Created time.Time
	// Compress the layer, which takes longer than all else.
	Compress bool
}

// Build makes the image and its SPDX document, which is also in the image.
func (a StaticApp) Build() (img v1.Image, sbom []byte, err error) {
	info, err := checkStatic(a.Binary)
	if err != nil {
		return nil, nil, err
	}
	arch := setting(info, "GOARCH")
	sbom, err = a.spdx(info)
	if err != nil {
		return nil, nil, err
	}
	target := path.Join("/usr/local/bin", a.Name)
	files := append(Base(),
		File{Path: target, Mode: 0o755, Source: a.Binary},
		File{Path: "/etc/ssl/certs/ca-certificates.crt", Mode: 0o644, Data: authorities()},
		File{Path: path.Join("/usr/share/sbom", a.Name+".spdx.json"), Mode: 0o644, Data: sbom},
	)
	img, err = Build(files, Config{Architecture: arch, Entrypoint: []string{target}, User: "65532:65532", Compress: a.Compress, Created: a.Created,
		Env: []string{"PATH=/usr/local/bin", "SSL_CERT_FILE=/etc/ssl/certs/ca-certificates.crt", "HOME=/home/nonroot"},
		Labels: map[string]string{
			"org.opencontainers.image.title":    a.Name,
			"org.opencontainers.image.version":  a.Version,
			"org.opencontainers.image.source":   a.Source,
			"org.opencontainers.image.revision": setting(info, "vcs.revision"),
			"org.opencontainers.image.licenses": "Apache-2.0",
		}})
	return img, sbom, err
}

// checkStatic refuses a binary that would not start in an image without libraries.
func checkStatic(file string) (*debug.BuildInfo, error) {
	info, err := buildinfo.ReadFile(file)
	if err != nil {
		return nil, fmt.Errorf("%s is no Go binary: %w", file, err)
	}
	e, err := elf.Open(file)
	if err != nil {
		return nil, err
	}
	defer func() { _ = e.Close() }()
	for _, p := range e.Progs {
		if p.Type == elf.PT_INTERP {
			return nil, fmt.Errorf("%s is linked dynamically; build it with CGO_ENABLED=0", file)
		}
	}
	if setting(info, "GOARCH") == "" {
		return nil, errors.New("the binary does not tell its architecture")
	}
	return info, nil
}

func setting(info *debug.BuildInfo, key string) string {
	for _, s := range info.Settings {
		if s.Key == key {
			return s.Value
		}
	}
	return ""
}

// authorities is the Mozilla set of the pinned module, so that an image does not depend
// on the machine that built it. Roots with constraints that a plain bundle cannot express
// are left out.
func authorities() []byte {
	var b bytes.Buffer
	for root := range bundle.Roots() {
		if root.Constraint == nil {
			_ = pem.Encode(&b, &pem.Block{Type: "CERTIFICATE", Bytes: root.Certificate}) // a Buffer takes all
		}
	}
	return b.Bytes()
}

type spdxDocument struct {
	Version       string             `json:"spdxVersion"`
	License       string             `json:"dataLicense"`
	ID            string             `json:"SPDXID"`
	Name          string             `json:"name"`
	Namespace     string             `json:"documentNamespace"`
	Creation      spdxCreation       `json:"creationInfo"`
	Packages      []spdxPackage      `json:"packages"`
	Relationships []spdxRelationship `json:"relationships"`
}

type spdxCreation struct {
	Created  string   `json:"created"`
	Creators []string `json:"creators"`
}

type spdxPackage struct {
	ID         string         `json:"SPDXID"`
	Name       string         `json:"name"`
	Version    string         `json:"versionInfo,omitempty"`
	Download   string         `json:"downloadLocation"`
	Analyzed   bool           `json:"filesAnalyzed"`
	Declared   string         `json:"licenseDeclared"`
	Concluded  string         `json:"licenseConcluded"`
	Copyright  string         `json:"copyrightText"`
	Checksums  []spdxChecksum `json:"checksums,omitempty"`
	References []spdxRef      `json:"externalRefs,omitempty"`
	Comment    string         `json:"comment,omitempty"`
}

type spdxChecksum struct {
	Algorithm string `json:"algorithm"`
	Value     string `json:"checksumValue"`
}

type spdxRef struct {
	Category string `json:"referenceCategory"`
	Type     string `json:"referenceType"`
	Locator  string `json:"referenceLocator"`
}

type spdxRelationship struct {
	Element string `json:"spdxElementId"`
	Type    string `json:"relationshipType"`
	Related string `json:"relatedSpdxElement"`
}

const unknown = "NOASSERTION"

func goPackage(id, module, version string) spdxPackage {
	p := spdxPackage{ID: "SPDXRef-" + id, Name: module, Version: version, Download: unknown, Declared: unknown, Concluded: unknown, Copyright: unknown}
	purl := "pkg:golang/" + module
	if version != "" {
		purl += "@" + version
	}
	p.References = []spdxRef{{"PACKAGE-MANAGER", "purl", purl}}
	return p
}

// spdx lists what the linker put into the binary: an SPDX 2.3 document.
func (a StaticApp) spdx(info *debug.BuildInfo) ([]byte, error) {
	data, err := os.ReadFile(a.Binary)
	if err != nil {
		return nil, err
	}
	sum := sha256.Sum256(data)
	digest := hex.EncodeToString(sum[:])
	d := spdxDocument{Version: "SPDX-2.3", License: "CC0-1.0", ID: "SPDXRef-DOCUMENT", Name: a.Name + "-" + a.Version,
		Namespace: "https://spdx.org/spdxdocs/" + a.Name + "-" + digest,
		Creation:  spdxCreation{Created: a.Created.UTC().Format(time.RFC3339), Creators: []string{"Tool: varve-ociimage"}}}
	main := goPackage("main", info.Main.Path, a.Version)
	main.Checksums = []spdxChecksum{{"SHA256", digest}}
	d.Packages = append(d.Packages, main, goPackage("stdlib", "stdlib", strings.TrimPrefix(info.GoVersion, "go")))
	d.Relationships = []spdxRelationship{{d.ID, "DESCRIBES", main.ID}, {main.ID, "DEPENDS_ON", "SPDXRef-stdlib"}}
	for i, m := range info.Deps {
		if m.Replace != nil {
			m = m.Replace
		}
		p := goPackage(fmt.Sprintf("module-%d", i), m.Path, m.Version)
		if m.Sum != "" {
			p.Comment = "go.sum " + m.Sum
		}
		d.Packages = append(d.Packages, p)
		d.Relationships = append(d.Relationships, spdxRelationship{main.ID, "DEPENDS_ON", p.ID})
	}
	return json.MarshalIndent(d, "", "  ")
}
