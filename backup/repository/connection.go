package repository

import (
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"

	"github.com/kopia/kopia/repo"
	"github.com/kopia/kopia/repo/content"
)

// A connection is two files. The configuration file is Kopia's own
// (kopia repo/local_config.go), so that a stock `kopia --config-file` works with it;
// Kopia rewrites it and drops unknown fields, so Varve keeps its own data beside it, in
// <file>.varve. Both have mode 0600: storage credentials are in the first. Neither holds
// the password.

// maintenanceUser and maintenanceHost are the identity of every Varve client:
// Kopia lets only the owner of a repository run maintenance, and with one name for all,
// any machine may. Recovery points carry their own source and never this name.
const (
	maintenanceUser = "varve"
	maintenanceHost = "repository"
)

// sideFile is Varve's own data about a connection.
type sideFile struct {
	Cluster  string `json:"cluster,omitempty"`  // name of this cluster or machine
	UniqueID string `json:"uniqueID,omitempty"` // of the repository connected to, in hexadecimal

	trial bool // while a connection is made: the kind of repository is not known yet
}

func sidePath(configFile string) string { return configFile + ".varve" }

func readSideFile(configFile string) (sideFile, error) {
	var s sideFile
	p, err := os.ReadFile(sidePath(configFile))
	if errors.Is(err, fs.ErrNotExist) { // connected by stock Kopia
		return s, nil
	}
	if err == nil {
		err = json.Unmarshal(p, &s)
	}
	if err != nil {
		return s, fmt.Errorf("read %s: %w; delete it, or connect again with 'varve repo connect'", sidePath(configFile), err)
	}
	return s, nil
}

// Connected returns ErrNotConnected if no configuration file names a repository. It
// contacts no storage and needs no password.
func Connected(configFile string) error {
	_, err := readConnection(configFile)
	return err
}

// readConnection reads the configuration file.
func readConnection(configFile string) (*repo.LocalConfig, error) {
	lc, err := repo.LoadConfigFromFile(configFile)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, &stateError{kind: ErrNotConnected, cause: err, text: fmt.Sprintf(
			"not connected to a repository (no %s): run 'varve repo create' or 'varve repo connect'", configFile)}
	}
	if err != nil {
		return nil, &stateError{kind: ErrNotConnected, cause: err, text: fmt.Sprintf(
			"cannot read the configuration file %s (%s): connect again with 'varve repo connect'", configFile, brief(err))}
	}
	if lc.Storage == nil && lc.APIServer == nil {
		return nil, &stateError{kind: ErrNotConnected, text: fmt.Sprintf(
			"the configuration file %s names no repository: connect again with 'varve repo connect'", configFile)}
	}
	return lc, nil
}

func placeOf(lc *repo.LocalConfig) string {
	if lc.APIServer != nil {
		return "the Kopia server " + lc.APIServer.BaseURL
	}
	return place(*lc.Storage)
}

// writeTemp writes a configuration beside its destination, so that it can be tried before
// it replaces a working one.
func writeTemp(configFile string, lc *repo.LocalConfig) (temp string, err error) {
	dir := filepath.Dir(configFile)
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return "", fmt.Errorf("configuration directory: %w", err)
	}
	p, err := json.MarshalIndent(lc, "", "  ")
	if err != nil {
		return "", fmt.Errorf("write configuration: %w", err)
	}
	return writeBeside(configFile, p)
}

// writeBeside writes a new file of mode 0600 in the directory of file.
func writeBeside(file string, p []byte) (temp string, err error) {
	f, err := os.CreateTemp(filepath.Dir(file), "."+filepath.Base(file)+"-*")
	if err != nil {
		return "", fmt.Errorf("write configuration: %w", err)
	}
	_, err = f.Write(append(p, '\n'))
	err = errors.Join(err, f.Sync(), f.Close())
	if err != nil {
		return "", fmt.Errorf("write configuration: %w", errors.Join(err, os.Remove(f.Name())))
	}
	return f.Name(), nil
}

// install puts a tried configuration in place. A crash between the two renames leaves a
// connection that works, but without Varve's own data about it.
func install(temp, configFile string, side sideFile) error {
	p, err := json.MarshalIndent(side, "", "  ")
	if err != nil {
		return fmt.Errorf("write configuration: %w", err)
	}
	sideTemp, err := writeBeside(sidePath(configFile), p)
	if err != nil {
		return err
	}
	old, _ := readConnection(configFile) // none, or unreadable: nothing to clean up
	if err := os.Remove(sidePath(configFile)); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("write configuration: %w", errors.Join(err, os.Remove(sideTemp)))
	}
	if err := os.Rename(temp, configFile); err != nil {
		return fmt.Errorf("write configuration: %w", errors.Join(err, os.Remove(sideTemp)))
	}
	if err := os.Rename(sideTemp, sidePath(configFile)); err != nil {
		return fmt.Errorf("write configuration: %w", err)
	}
	if old != nil {
		if now, err := readConnection(configFile); err == nil && cacheDir(now) != cacheDir(old) {
			removeCache(cacheDir(old))
		}
	}
	return nil
}

// Cache bounds the disk space that a connection uses for what it has read. Kopia keeps to
// hard limits only, so the sizes are set as such.
type Cache struct {
	Directory     string // absolute; empty for a separate directory below the user's
	ContentBytes  int64  // blocks; 0 for the default, negative for no cache
	MetadataBytes int64  // indexes and directories; likewise
}

// Defaults of Cache for storages that are not local. Local repositories cache
// neither: most of the time of a read through the cache went into its own
// files.
const (
	DefaultContentCacheBytes  = 4 << 30
	DefaultMetadataCacheBytes = 2 << 30
)

func (c Cache) validate(local bool) error {
	if c.Directory != "" && !filepath.IsAbs(c.Directory) {
		return invalid("the cache directory must be an absolute path, not %q", c.Directory)
	}
	// Kopia 0.23 crashes on a cache directory with room for one kind only
	// (internal/cache/content_cache.go, fetchBlobInternal).
	if contents, metadata := c.sizes(local); (contents == 0) != (metadata == 0) {
		return invalid("a cache holds contents and metadata: give sizes for both, or for neither")
	}
	return nil
}

// sizes applies the defaults.
func (c Cache) sizes(local bool) (contents, metadata int64) {
	size := func(asked, normal int64) int64 {
		switch {
		case asked < 0, asked == 0 && local:
			return 0
		case asked == 0:
			return normal
		default:
			return asked
		}
	}
	return size(c.ContentBytes, DefaultContentCacheBytes), size(c.MetadataBytes, DefaultMetadataCacheBytes)
}

const cacheMarker = "varve-cache" // a file in a cache directory that we may delete

// caching makes Kopia's options. The directory is named after the repository's unique ID:
// Kopia keeps the blob that holds the keys in it, and the cache of another repository at
// the same place would make new data unreadable. Without a directory Kopia holds the
// indexes in memory, 34 bytes per content; with one it maps them from there.
func (c Cache) caching(configFile, uniqueID string, local bool) (*content.CachingOptions, error) {
	base := c.Directory
	if base == "" {
		dir, err := os.UserCacheDir()
		if err != nil { // no home: beside the configuration
			dir = filepath.Join(filepath.Dir(configFile), "cache")
		}
		base = filepath.Join(dir, "varve")
	}
	contents, metadata := c.sizes(local)
	if contents == 0 {
		return &content.CachingOptions{}, nil
	}
	o := &content.CachingOptions{
		CacheDirectory:              filepath.Join(base, uniqueID[:min(16, len(uniqueID))]),
		ContentCacheSizeBytes:       contents,
		ContentCacheSizeLimitBytes:  contents,
		MetadataCacheSizeBytes:      metadata,
		MetadataCacheSizeLimitBytes: metadata,
	}
	if err := os.MkdirAll(o.CacheDirectory, 0o700); err != nil {
		return nil, fmt.Errorf("cache directory: %w", err)
	}
	if err := os.WriteFile(filepath.Join(o.CacheDirectory, cacheMarker), []byte("This directory may be deleted at any time.\n"), 0o600); err != nil {
		return nil, fmt.Errorf("cache directory: %w", err)
	}
	return o, nil
}

func cacheDir(lc *repo.LocalConfig) string {
	if lc == nil || lc.Caching == nil {
		return ""
	}
	return lc.Caching.CacheDirectory
}

// removeCache deletes a cache directory that Varve made; a failure only costs disk space.
func removeCache(dir string) {
	if dir == "" || !filepath.IsAbs(dir) {
		return
	}
	if _, err := os.Stat(filepath.Join(dir, cacheMarker)); err != nil {
		return
	}
	_ = os.RemoveAll(dir)
}

func hexID(id []byte) string { return hex.EncodeToString(id) }
