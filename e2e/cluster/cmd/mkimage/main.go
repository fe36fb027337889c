// mkimage writes the image of a static Go binary as an OCI archive, with its bill of
// materials beside it:
//
//	mkimage -binary bin/varve -name varve:dev -o bin/varve-image.tar -sbom bin/varve.spdx.json
//
// SOURCE_DATE_EPOCH dates all entries, so that the same binary gives the same image.
package main

import (
	"errors"
	"flag"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"strconv"
	"time"

	"github.com/varve-io/varve/e2e/cluster/ociimage"
)

func main() {
	if err := run(); err != nil {
		slog.Error("mkimage", "err", err)
		os.Exit(1)
	}
}

func run() error {
	binary := flag.String("binary", "", "the static binary")
	name := flag.String("name", "", "the image's name with its tag, such as varve:dev")
	version := flag.String("version", "dev", "the version, for labels and bill of materials")
	source := flag.String("source", "https://github.com/varve-io/varve", "the project's address, for the labels")
	out := flag.String("o", "", "the archive to write")
	sbomFile := flag.String("sbom", "", "where to write the bill of materials; empty: only into the image")
	compress := flag.Bool("compress", true, "compress the layer, as for a registry")
	flag.Parse()
	if *binary == "" || *name == "" || *out == "" {
		return errors.New("-binary, -name and -o are required")
	}
	created := time.Unix(0, 0)
	if s := os.Getenv("SOURCE_DATE_EPOCH"); s != "" {
		n, err := strconv.ParseInt(s, 10, 64)
		if err != nil {
			return fmt.Errorf("SOURCE_DATE_EPOCH: %w", err)
		}
		created = time.Unix(n, 0)
	}
	img, sbom, err := ociimage.StaticApp{Binary: *binary, Name: filepath.Base(*binary), Version: *version, Source: *source, Created: created, Compress: *compress}.Build()
	if err != nil {
		return err
	}
	if *sbomFile != "" {
		if err := os.WriteFile(*sbomFile, sbom, 0o644); err != nil {
			return err
		}
	}
	if err := ociimage.WriteArchive(*out, *name, img); err != nil {
		return err
	}
	digest, err := img.Digest()
	if err != nil {
		return err
	}
	slog.Info("image", "name", *name, "digest", digest.String(), "archive", *out)
	return nil
}
