package main

import (
	"github.com/spf13/cobra"

	"github.com/varve-io/varve/backup/repository"
	"github.com/varve-io/varve/internal/bytesize"
)

// connectFlags are the common flags of create and connect. Their settings are in the section
// "repo".
type connectFlags struct {
	cacheDirectory                 string
	contentCache, metadataCache    bytesize.Value
	noCache                        bool
	upload, download               bytesize.Value
	concurrentReads, concurrentPut int
}

func (c *connectFlags) add(cmd *cobra.Command) {
	f := cmd.Flags()
	f.StringVar(&c.cacheDirectory, "cache-directory", "", "parent directory of the cache (default in the user's cache directory)")
	f.Var(&c.contentCache, "content-cache-size", "hard limit of the cache of blocks (default 4 GiB; none for a local repository)")
	f.Var(&c.metadataCache, "metadata-cache-size", "hard limit of the cache of indexes (default 2 GiB; none for a local repository)")
	f.BoolVar(&c.noCache, "no-cache", false, "keep no cache on disk")
	f.Var(&c.upload, "max-upload-rate", "bytes per second sent to the storage, 0 for no limit")
	f.Var(&c.download, "max-download-rate", "bytes per second read from the storage, 0 for no limit")
	f.IntVar(&c.concurrentReads, "max-concurrent-reads", 0, "reads of the storage at once, 0 for no limit")
	f.IntVar(&c.concurrentPut, "max-concurrent-writes", 0, "writes to the storage at once, 0 for no limit")
	inSection(f, "repo", "cache-directory", "content-cache-size", "metadata-cache-size", "no-cache",
		"max-upload-rate", "max-download-rate", "max-concurrent-reads", "max-concurrent-writes")
	cmd.MarkFlagsMutuallyExclusive("no-cache", "content-cache-size")
	cmd.MarkFlagsMutuallyExclusive("no-cache", "metadata-cache-size")
}

// options reads the flags and asks for the password.
func (c *connectFlags) options(a *app, cmd *cobra.Command, purpose passwordPurpose) (repository.ConnectOptions, error) {
	opt := repository.ConnectOptions{
		Cluster: a.flags.cluster,
		Cache:   repository.Cache{ContentBytes: int64(c.contentCache), MetadataBytes: int64(c.metadataCache)},
		Limits: repository.Limits{
			UploadBytesPerSecond:   float64(c.upload),
			DownloadBytesPerSecond: float64(c.download),
			ConcurrentReads:        c.concurrentReads,
			ConcurrentWrites:       c.concurrentPut,
		},
		Log: a.log,
	}
	if c.noCache {
		opt.Cache.ContentBytes, opt.Cache.MetadataBytes = -1, -1
	}
	var err error
	if opt.Cache.Directory, err = absolute(c.cacheDirectory); err != nil {
		return opt, err
	}
	if opt.Cache.Directory == "" {
		if dir, ok := a.lookupEnv("XDG_CACHE_HOME"); ok && dir != "" {
			opt.Cache.Directory = dir + "/varve"
		} else if home, ok := a.lookupEnv("HOME"); ok && home != "" {
			opt.Cache.Directory = home + "/.cache/varve"
		}
	}
	if opt.ConfigFile, err = a.configFile(); err != nil {
		return opt, err
	}
	opt.Password, err = a.password(cmd.Context(), purpose)
	return opt, err
}
