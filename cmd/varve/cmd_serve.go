package main

import (
	"context"
	"errors"
	"log/slog"
	"os"
	"path/filepath"
	"runtime/debug"
	"time"

	"github.com/spf13/cobra"

	"github.com/varve-io/varve/backup/hydrate"
	"github.com/varve-io/varve/backup/image"
	"github.com/varve-io/varve/backup/overlay"
	"github.com/varve-io/varve/backup/repository"
	"github.com/varve-io/varve/internal/bytesize"
	"github.com/varve-io/varve/internal/serve"
	"github.com/varve-io/varve/nbdserver"
)

type serveFlags struct {
	listen      []string
	stdio       bool
	once        bool
	parent      bool // end with the process that started this one
	parentGiven bool // by its flag
	activated   bool // a supervisor passed the sockets, and owns standard output
	volumes     []string
	foreign     bool
	tls         nbdserver.TLSFiles
	plain       bool
	insecure    bool
	allow       []string
	writable    bool
	overlays    serve.Overlays
	limit       bytesize.Value
	pad         bool
	cacheSize   bytesize.Value
	hydrate     bool
	copies      hydrate.Options
	copyLimit   bytesize.Value
	readers     int
	metrics     string
	refresh     time.Duration
	idle        time.Duration
	readTime    time.Duration
	clients     int
	memory      bytesize.Value
	perClient   bytesize.Value
	minRate     bytesize.Value
	grace       time.Duration
}

func newServeCommand(a *app) *cobra.Command {
	f := serveFlags{cacheSize: 256 << 20, memory: nbdserver.DefaultTotalMemory, perClient: nbdserver.DefaultConnectionMemory, minRate: nbdserver.DefaultMinRate}
	cmd := &cobra.Command{
		Use:     "serve [VOLUME|POINT]...",
		GroupID: groupRead,
		Short:   "Serve recovery points as disks over NBD",
		Long: `Serve recovery points as disks over NBD, to qemu, libnbd, the Linux kernel and
any other client. Without arguments every recovery point is an export: its name
is namespace/name@TIME, and clients may also say namespace/name@latest,
@latest~2, a part of the time, or the ID. With arguments only those volumes and
points are. Where just one point is served, the empty name means it.

New points appear, and deleted ones refuse new clients, without a restart.
What a client has open is held by a lease, so that prune skips it.

With --hydrate the disks that clients open are copied to local files in the
background, after clients' reads: then they are as fast as the local disk. What
does not fit is read from the repository.

Exports are read-only. With --writable each has a copy-on-write overlay, shared
by all its clients and deleted at the end unless --keep is given; "varve commit"
saves one as a new recovery point.`,
		Example: `  varve serve
  varve serve shop/db --listen unix:/run/shop.sock
  varve serve shop/db@latest --writable --listen 127.0.0.1:10809
  varve serve --listen 0.0.0.0 --tls-cert cert.pem --tls-key key.pem \
      --tls-client-ca ca.pem --allow 'db-team=shop/*'
  nbdcopy -- [ varve serve shop/db@latest ] disk.img`,
		RunE: func(cmd *cobra.Command, args []string) error {
			f.parentGiven = cmd.Flags().Changed("exit-with-parent")
			f.overlays.Limit = int64(f.limit)
			f.copies.Limit = int64(f.copyLimit)
			return a.serve(cmd.Context(), append(args, f.volumes...), f)
		},
	}
	fl := cmd.Flags()
	fl.StringArrayVar(&f.listen, "listen", nil, "address to listen on: unix:PATH, HOST:PORT or HOST; repeatable (default a socket of this user)")
	fl.BoolVar(&f.stdio, "stdio", false, "serve one client on standard input and output, then end")
	fl.BoolVar(&f.once, "once", false, "end when the last client has left; always so with --stdio")
	fl.BoolVar(&f.parent, "exit-with-parent", false, "end when the process that started this one does (default with --stdio, and where a client such as nbdcopy passes the socket)")
	fl.StringArrayVar(&f.volumes, "volume", nil, "serve this volume only; repeatable, the same as an argument")
	fl.BoolVar(&f.foreign, "foreign", false, "also serve disk images that Kopia or Velero stored")
	fl.StringVar(&f.tls.Certificate, "tls-cert", "", "PEM file with the server's certificate")
	fl.StringVar(&f.tls.Key, "tls-key", "", "PEM file with its key")
	fl.StringVar(&f.tls.ClientCA, "tls-client-ca", "", "PEM file with the authority of client certificates; clients must have one")
	fl.BoolVar(&f.tls.AllowTLS12, "tls-1.2", false, "accept TLS 1.2 beside 1.3")
	fl.BoolVar(&f.plain, "tls-optional-local", false, "let clients of this machine (unix sockets, loopback) do without TLS")
	fl.BoolVar(&f.insecure, "insecure", false, "listen beyond this machine without TLS: every client that connects can read the disks")
	fl.StringArrayVar(&f.allow, "allow", nil, "allow clients to open exports: CLIENT=EXPORT, where CLIENT is a name in a client certificate, or * for all, and * in EXPORT matches anything; repeatable")
	fl.BoolVar(&f.writable, "writable", false, "put a copy-on-write overlay over each export")
	fl.StringVar(&f.overlays.Dir, "overlay-dir", "", "directory of overlays (default a temporary one in $TMPDIR or /var/tmp)")
	fl.BoolVar(&f.overlays.Keep, "keep", false, "keep overlays, and continue with those in the directory; needs --overlay-dir")
	fl.Var(&f.limit, "overlay-limit", "largest size of an overlay; writes beyond it fail with ENOSPC (default no limit)")
	fl.BoolVar(&f.pad, "pad", false, "round the size of each disk up to whole sectors of 512 bytes")
	fl.Var(&f.cacheSize, "cache-size", "memory for decoded blocks, shared by all exports")
	fl.BoolVar(&f.hydrate, "hydrate", false, "copy the disks that clients open to local files in the background, and read from those")
	fl.StringVar(&f.copies.Dir, "hydrate-dir", "", "directory in which these copies are kept (default a temporary one in $TMPDIR or /var/tmp)")
	fl.Var(&f.copyLimit, "hydrate-limit", "largest size of all copies together (default nine tenths of the free space)")
	fl.IntVar(&f.readers, "readers", 0, "blocks read ahead at once (default one for each CPU; 16 or more help with object stores)")
	fl.StringVar(&f.metrics, "metrics", "", "serve Prometheus metrics on this address: PORT or :PORT (loopback), or HOST:PORT")
	fl.DurationVar(&f.refresh, "refresh", 30*time.Second, "time between checks for new and deleted recovery points")
	fl.DurationVar(&f.readTime, "read-timeout", 30*time.Second, "time that a read may wait for the storage; then it fails, and clients may retry")
	fl.DurationVar(&f.idle, "idle-timeout", 0, "disconnect clients without requests after this time (default never)")
	fl.IntVar(&f.clients, "max-connections", nbdserver.DefaultMaxConnections, "maximum number of clients")
	fl.Var(&f.memory, "max-memory", "memory for requests in flight, at least 32 MiB")
	fl.Var(&f.perClient, "max-connection-memory", "memory for requests in flight of one client, at least 32 MiB")
	fl.Var(&f.minRate, "min-rate", "lowest rate in bytes per second at which a client must take replies or send writes; a client that is a minute behind is disconnected")
	fl.DurationVar(&f.grace, "shutdown-timeout", 10*time.Second, "time for requests in flight to end at shutdown")
	return cmd
}

func (f *serveFlags) check() error {
	switch {
	case f.overlays.Keep && f.overlays.Dir == "":
		return usagef("--keep needs --overlay-dir, to find the overlays again")
	case !f.writable && (f.overlays.Dir != "" || f.limit != 0):
		return usagef("--overlay-dir, --keep and --overlay-limit need --writable")
	case !f.hydrate && (f.copies.Dir != "" || f.copyLimit != 0):
		return usagef("--hydrate-dir and --hydrate-limit need --hydrate")
	case f.copies.Dir != "" && f.overlays.Dir != "" && filepath.Clean(f.copies.Dir) == filepath.Clean(f.overlays.Dir):
		return usagef("--hydrate-dir and --overlay-dir are both %s: give each a directory of its own", f.copies.Dir)
	case f.stdio && len(f.listen) > 0:
		return usagef("--stdio serves one client and does not listen: leave out --listen")
	case f.readTime <= 0:
		return usagef("--read-timeout must be positive")
	case f.refresh <= 0:
		return usagef("--refresh must be positive")
	case (f.tls.Certificate == "" || f.tls.Key == "") && (f.tls != nbdserver.TLSFiles{} || f.plain):
		return usagef("TLS needs --tls-cert and --tls-key")
	}
	return nil
}

// serve runs the server until ctx ends.
func (a *app) serve(ctx context.Context, selected []string, f serveFlags) (err error) {
	if err := f.check(); err != nil {
		return err
	}
	if os.Getenv("GOGC") == "" {
		// Most of the heap is the block cache, which is cheap to mark: half of it for garbage
		// keeps the process near the cache's own bound.
		defer debug.SetGCPercent(debug.SetGCPercent(50))
	}
	rules, err := f.rules()
	if err != nil {
		return err
	}
	cfg := nbdserver.Config{
		PlainLocal: f.plain, Insecure: f.insecure,
		ConnectionMemory: int64(f.perClient), TotalMemory: int64(f.memory), MaxConnections: f.clients,
		MinRate: int64(f.minRate), IdleTimeout: f.idle, ReadTimeout: f.readTime, Logger: a.log,
	}
	if f.tls.Certificate != "" {
		if cfg.TLS, err = nbdserver.LoadTLS(f.tls); err != nil {
			return err
		}
	}
	parent := os.Getppid()
	listeners, err := f.listeners()
	if err != nil {
		return err
	}
	if !f.parentGiven {
		f.parent = f.stdio || f.activated && !a.bySystemd()
	}
	defer func() { closeAll(listeners) }() // Serve closes those that it has
	began := time.Now()
	repo, err := a.openRepository(ctx)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, repo.Close(context.WithoutCancel(ctx))) }()
	opened := time.Now()
	cache := image.NewCache(int64(f.cacheSize))
	if f.readers > 0 {
		cache = image.NewCacheWithWorkers(int64(f.cacheSize), f.readers)
	}
	cache.LimitReads(f.readTime)
	defer cache.Close()
	scratch, err := f.scratch()
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, scratch.close()) }()
	copies, err := f.openCopies(a.log, scratch)
	if err != nil {
		return err
	}
	defer func() {
		if copies != nil {
			err = errors.Join(err, copies.Close())
		}
	}()
	catalog, err := a.openCatalog(ctx, repo, cache, selected, &f, copies)
	if err != nil {
		return err
	}
	defer func() {
		done, cancel := context.WithTimeout(context.WithoutCancel(ctx), time.Minute)
		defer cancel()
		err = errors.Join(err, catalog.Close(done))
		if f.writable && !f.overlays.Keep {
			_ = os.Remove(f.overlays.Dir) // it may be in use by another process
		}
	}()
	cfg.Catalog = clientView(catalog, rules)
	run := &serving{app: a, flags: f, catalog: catalog, cache: cache, copies: copies, listeners: listeners, parent: parent, opening: opened.Sub(began), opened: opened}
	return run.run(ctx, cfg)
}

// clientView returns the catalogue that clients see. The rules apply before the aliases: a
// client that may not open what an alias leads to must not affect its binding for others.
func clientView(catalog nbdserver.Resolver, rules []nbdserver.AccessRule) nbdserver.Catalog {
	aliases := nbdserver.NewAliases(catalog, nbdserver.AliasGrace, nil)
	if rules == nil {
		return aliases
	}
	return nbdserver.Restrict(aliases, rules)
}

// serveScratch are the directories of a server: temporary ones, which the next server deletes
// if this one is killed, and the directory that a user named for overlays.
type serveScratch struct {
	overlays, copies *overlay.Scratch // nil if not needed
	named            *overlay.Dir     // nil if none
}

// scratch makes the directories that flags do not name, and locks those they do. The one for
// copies has its own lock.
func (f *serveFlags) scratch() (s serveScratch, err error) {
	switch {
	case f.writable && f.overlays.Dir == "":
		if s.overlays, err = overlay.NewScratch(overlay.ScratchParent()); err != nil {
			return s, err
		}
		f.overlays.Dir = s.overlays.Dir
	case f.writable:
		if s.named, err = overlay.TakeDir(f.overlays.Dir); err != nil {
			return s, err
		}
	}
	if f.hydrate && f.copies.Dir == "" {
		if s.copies, err = overlay.NewScratch(overlay.ScratchParent()); err != nil {
			return s, errors.Join(err, s.close())
		}
	}
	return s, nil
}

func (s serveScratch) close() error {
	errs := []error{s.named.Close()}
	for _, d := range []*overlay.Scratch{s.overlays, s.copies} {
		if d != nil {
			errs = append(errs, d.Close())
		}
	}
	return errors.Join(errs...)
}

// openCopies opens the cache of --hydrate; nil without it.
func (f *serveFlags) openCopies(log *slog.Logger, scratch serveScratch) (*hydrate.Cache, error) {
	if !f.hydrate {
		return nil, nil // no cache, and no error
	}
	opt := f.copies
	opt.Log, opt.Keep = log, opt.Dir != ""
	if scratch.copies != nil {
		opt.Dir = filepath.Join(scratch.copies.Dir, "copies")
	}
	if opt.Limit == 0 {
		opt.FreeShare = 0.9
	}
	return hydrate.New(opt)
}

func (a *app) openCatalog(ctx context.Context, repo *repository.Repository, cache *image.Cache, selected []string, f *serveFlags, copies *hydrate.Cache) (*serve.Catalog, error) {
	opt := serve.Options{
		Select: selected, Cluster: a.clusterOf(repo), Fallback: a.tellOther(repo),
		Foreign: f.foreign, Hydrate: copies, ReadTimeout: f.readTime, Linger: nbdserver.AliasGrace, Log: a.log,
	}
	if f.pad {
		opt.Pad = 512
	}
	if f.writable {
		opt.Writable = &f.overlays
	}
	catalog, err := serve.Open(ctx, repo, cache, opt)
	if err != nil {
		return nil, err
	}
	if !repo.Writable() {
		a.log.Warn("the repository is connected read-only: no lease keeps points from being pruned while they are read")
	}
	return catalog, nil
}

func (f *serveFlags) rules() ([]nbdserver.AccessRule, error) {
	var rules []nbdserver.AccessRule
	for _, text := range f.allow {
		r, err := nbdserver.ParseAccessRule(text)
		if err != nil {
			return nil, usagef("--allow: %w", err)
		}
		if r.Client != "*" && f.tls.ClientCA == "" {
			return nil, usagef("--allow %s: only certificates prove names: give --tls-client-ca", text)
		}
		rules = append(rules, r)
	}
	return rules, nil
}
