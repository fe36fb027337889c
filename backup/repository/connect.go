package repository

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"net/url"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"time"

	"github.com/kopia/kopia/repo"
	"github.com/kopia/kopia/repo/blob"
	"github.com/kopia/kopia/repo/content"
	"github.com/kopia/kopia/repo/format"
)

// OpenTimeout is how long a storage may leave a request unanswered before Create, Connect
// and Open give up. It does not bound how long they take. Kopia itself retries a request
// ten times.
const OpenTimeout = 45 * time.Second

// ConnectOptions say how to connect to a repository.
type ConnectOptions struct {
	ConfigFile string // absolute; written with mode 0600
	Storage    Storage
	Password   string
	ReadOnly   bool
	Cluster    string // name of this cluster or machine; empty for the host name
	Cache      Cache
	Limits     Limits
	Log        *slog.Logger // as OpenOptions has it
	Turn       Turn         // bounds the derivation of the repository's key; nil for no bound
}

func (opt *ConnectOptions) validate() error {
	if !filepath.IsAbs(opt.ConfigFile) {
		return invalid("the configuration file must be an absolute path, not %q", opt.ConfigFile)
	}
	if opt.Password == "" {
		return invalid("the repository password is empty")
	}
	if strings.ContainsAny(opt.Cluster, "@:/\\ \t\r\n") {
		return invalid("the cluster name %q may not contain '@', ':', slashes or blanks", opt.Cluster)
	}
	_, local := opt.Storage.(*Filesystem)
	return errors.Join(opt.Cache.validate(local), opt.Limits.validate())
}

// Connect connects to a repository and writes the configuration file; on any error that
// file is unchanged. A repository that Varve did not create is connected read-only.
func Connect(ctx context.Context, opt ConnectOptions) error {
	c, err := reach(ctx, opt)
	if err != nil {
		return err
	}
	r, err := c.try(ctx, opt)
	if err != nil {
		return err
	}
	foreign := r.foreign
	if err := r.Close(context.WithoutCancel(ctx)); err != nil {
		return err
	}
	c.lc.ReadOnly = opt.ReadOnly || foreign
	return c.install(opt.ConfigFile)
}

// Attach is Connect and Open in one; the key is derived and the indexes are read once. It
// is for a process with a private connection, which removes the connection's files after
// it has closed the repository or if the error is not nil.
func Attach(ctx context.Context, opt ConnectOptions) (*Repository, error) {
	c, err := reach(ctx, opt)
	if err != nil {
		return nil, err
	}
	if err := c.install(opt.ConfigFile); err != nil {
		return nil, err
	}
	r, err := open(ctx, OpenOptions{ConfigFile: opt.ConfigFile, Password: opt.Password, Log: opt.Log, Turn: opt.Turn}, c.side)
	if err != nil {
		return nil, err
	}
	r.described = c.described
	return r, nil
}

// Unchanged reads the blob that describes an attached repository again. The error
// is ErrUnreachable or ErrNotInitialized as that of Open, or ErrReplaced if another
// repository is there now or the password was changed: attach again to find out which.
func (r *Repository) Unchanged(ctx context.Context) error {
	if r.direct == nil || r.described == nil {
		return fmt.Errorf("%s was not attached to", r.place)
	}
	octx, settled, release := boundSilence(ctx, OpenTimeout)
	defer release()
	defer settled()
	p, err := answered(octx, func() ([]byte, error) { return getBlob(octx, r.direct.BlobReader(), format.KopiaRepositoryBlobID) }, func([]byte) {})
	if errors.Is(err, blob.ErrBlobNotFound) {
		return contents{}.missingFormat(r.place)
	}
	if err != nil {
		return explain(octx, r.place, err)
	}
	f, err := format.ParseKopiaRepositoryJSON(p)
	if err != nil || !bytes.Equal(f.UniqueID, r.described.UniqueID) || !bytes.Equal(f.EncryptedFormatBytes, r.described.EncryptedFormatBytes) {
		return &stateError{kind: ErrReplaced, cause: err, text: fmt.Sprintf(
			"the blob kopia.repository in %s was replaced since the repository was opened: open it again", r.place)}
	}
	return nil
}

// reach finds the repository that options name, and makes the connection to it.
func reach(ctx context.Context, opt ConnectOptions) (*connection, error) {
	if err := opt.validate(); err != nil {
		return nil, err
	}
	st, release, err := openStorage(ctx, opt.Storage, false)
	if err != nil {
		return nil, err
	}
	defer release()
	defer st.Close(context.WithoutCancel(ctx))
	f, err := readFormatBlob(ctx, st)
	if err != nil {
		return nil, err
	}
	return newConnection(st, f, opt)
}

// connection is one that is being made.
type connection struct {
	lc        *repo.LocalConfig
	side      sideFile
	described *format.KopiaRepositoryJSON
}

func newConnection(st blob.Storage, f *format.KopiaRepositoryJSON, opt ConnectOptions) (*connection, error) {
	ci := st.ConnectionInfo()
	id := hexID(f.UniqueID)
	caching, err := opt.Cache.caching(opt.ConfigFile, id, isLocal(ci))
	if err != nil {
		return nil, err
	}
	readOnly := opt.ReadOnly
	if s, ok := opt.Storage.(*S3); ok && !s.PointInTime.IsZero() {
		readOnly = true
	}
	return &connection{
		lc: &repo.LocalConfig{
			Storage: &ci,
			Caching: caching,
			ClientOptions: repo.ClientOptions{
				Username:    maintenanceUser,
				Hostname:    maintenanceHost,
				ReadOnly:    readOnly,
				Description: "Varve repository in " + place(ci),
				// Negative: read the blob that describes the repository again at each
				// open, never from the cache (kopia repo/format, NewManagerWithCache).
				FormatBlobCacheDuration: -1,
				Throttling:              opt.Limits.kopia(),
			},
		},
		side:      sideFile{Cluster: opt.Cluster, UniqueID: id},
		described: f,
	}, nil
}

// try opens the repository through a configuration that is not in place yet.
func (c *connection) try(ctx context.Context, opt ConnectOptions) (*Repository, error) {
	temp, err := writeTemp(opt.ConfigFile, c.lc)
	if err != nil {
		return nil, err
	}
	side := c.side
	side.trial = true
	r, err := open(ctx, OpenOptions{ConfigFile: temp, Password: opt.Password, Log: opt.Log, Turn: opt.Turn}, side)
	if rerr := os.Remove(temp); rerr != nil && err == nil {
		err = errors.Join(fmt.Errorf("remove trial configuration: %w", rerr), r.Close(context.WithoutCancel(ctx)))
	}
	if err != nil {
		return nil, err
	}
	return r, nil
}

func (c *connection) install(configFile string) error {
	temp, err := writeTemp(configFile, c.lc)
	if err != nil {
		return err
	}
	if err := install(temp, configFile, c.side); err != nil {
		return errors.Join(err, os.RemoveAll(temp))
	}
	return nil
}

// readFormatBlob reads the blob that describes a repository. If there is none, the error
// says why.
func readFormatBlob(ctx context.Context, st blob.Storage) (*format.KopiaRepositoryJSON, error) {
	octx, settled, release := boundSilence(ctx, OpenTimeout)
	defer release()
	defer settled()
	where := place(st.ConnectionInfo())
	p, err := answered(octx, func() ([]byte, error) { return getBlob(octx, st, format.KopiaRepositoryBlobID) }, func([]byte) {})
	if errors.Is(err, blob.ErrBlobNotFound) {
		found, ierr := answered(octx, func() (contents, error) { return inspect(octx, st) }, func(contents) {})
		if ierr != nil {
			return nil, explain(octx, where, ierr)
		}
		return nil, found.missingFormat(where)
	}
	if err != nil {
		return nil, explain(octx, where, err)
	}
	f, err := format.ParseKopiaRepositoryJSON(p)
	if err == nil && len(f.UniqueID) == 0 {
		err = errors.New("invalid format blob: no unique ID")
	}
	if err != nil {
		return nil, explain(octx, where, err)
	}
	return f, nil
}

// contents is what was found at a place that has no format blob.
type contents struct {
	blobConfig bool // kopia.blobcfg, which a create writes first
	packs      bool // blobs of a repository
}

func (c contents) missingFormat(where string) error {
	switch {
	case c.packs:
		return &stateError{kind: ErrIncompleteRepository, text: fmt.Sprintf(
			"%s holds data of a repository but not the blob kopia.repository that describes it: put back a copy of that blob, without it nothing can be read", where)}
	case c.blobConfig:
		return incompleteError(where)
	default:
		return &stateError{kind: ErrNotInitialized, text: fmt.Sprintf(
			"there is no repository in %s: check the place, or make one with 'varve repo create'", where)}
	}
}

func incompleteError(where string) error {
	return &stateError{kind: ErrIncompleteRepository, text: fmt.Sprintf(
		"the repository in %s was not finished being created: run the same 'varve repo create' again, with the same password, to finish it", where)}
}

// repositoryBlob matches the names of packs and indexes (kopia repo/content,
// repo/content/index): a prefix and a hash.
var repositoryBlob = regexp.MustCompile(`^(p|q|n|m|l|x[nesrw]|x[0-9]+_)[0-9a-f_]{16,}`)

var errFound = errors.New("found")

func inspect(ctx context.Context, st blob.Storage) (contents, error) {
	var c contents
	err := st.ListBlobs(ctx, "", func(m blob.Metadata) error {
		switch {
		case m.BlobID == format.KopiaBlobCfgBlobID:
			c.blobConfig = true
		case repositoryBlob.MatchString(string(m.BlobID)):
			c.packs = true
			return errFound
		}
		return nil
	})
	if err != nil && !errors.Is(err, errFound) {
		return c, fmt.Errorf("list blobs: %w", err)
	}
	return c, nil
}

// blobBuffer is blob.OutputBuffer over memory.
type blobBuffer struct{ bytes.Buffer }

func (b *blobBuffer) Length() int { return b.Len() }

func getBlob(ctx context.Context, st blob.Reader, id blob.ID) ([]byte, error) {
	var b blobBuffer
	if err := st.GetBlob(ctx, id, 0, -1, &b); err != nil {
		return nil, err
	}
	return b.Bytes(), nil
}

// ServerOptions say how to connect to a repository through a Kopia API server. Such a
// connection is read-only.
type ServerOptions struct {
	ConfigFile  string // absolute
	URL         string // https://host:port
	Fingerprint string // SHA-256 of the server's certificate, hexadecimal
	Username    string // user@host as the server knows it
	Password    string // of that user, not of the repository
	Cluster     string
	Log         *slog.Logger
}

// ConnectServer connects through a Kopia API server.
func ConnectServer(ctx context.Context, opt ServerOptions) error {
	base := ConnectOptions{ConfigFile: opt.ConfigFile, Password: opt.Password, Cluster: opt.Cluster, Log: opt.Log}
	if err := base.validate(); err != nil {
		return err
	}
	u, err := url.Parse(opt.URL)
	if err != nil || u.Scheme != "https" || u.Host == "" {
		return invalid("the URL of a Kopia server is https://host:port, not %q", opt.URL)
	}
	user, host, ok := strings.Cut(opt.Username, "@")
	if !ok || user == "" || host == "" {
		return invalid("the user of a Kopia server is user@host, not %q", opt.Username)
	}
	c := &connection{
		lc: &repo.LocalConfig{
			APIServer: &repo.APIServerInfo{
				BaseURL:                             strings.TrimSuffix(opt.URL, "/"),
				TrustedServerCertificateFingerprint: strings.ToLower(opt.Fingerprint),
				LocalCacheKeyDerivationAlgorithm:    repo.DefaultServerRepoCacheKeyDerivationAlgorithm,
			},
			Caching: &content.CachingOptions{},
			ClientOptions: repo.ClientOptions{
				Username:    user,
				Hostname:    host,
				ReadOnly:    true,
				Description: "Kopia server " + opt.URL,
			},
		},
		side: sideFile{Cluster: opt.Cluster},
	}
	r, err := c.try(ctx, base)
	if err != nil {
		return err
	}
	if err := r.Close(context.WithoutCancel(ctx)); err != nil {
		return err
	}
	return c.install(opt.ConfigFile)
}

// Disconnect deletes the connection and its cache, and leaves the repository unchanged.
// The error is ErrNotConnected if there is no connection.
func Disconnect(configFile string) error {
	lc, err := repo.LoadConfigFromFile(configFile)
	if errors.Is(err, fs.ErrNotExist) {
		_, err := readConnection(configFile)
		return err
	}
	if err == nil {
		removeCache(cacheDir(lc))
	} // else unreadable; removed too
	for _, f := range []string{configFile, sidePath(configFile), configFile + ".mlock"} {
		if err := os.Remove(f); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return fmt.Errorf("disconnect: %w", err)
		}
	}
	if err := os.RemoveAll(notesDir(configFile)); err != nil {
		return fmt.Errorf("disconnect: %w", err)
	}
	return nil
}
