package repository

import (
	"context"
	"os/exec"
	"time"

	"github.com/kopia/kopia/repo/blob"
	"github.com/kopia/kopia/repo/blob/rclone"
	"github.com/kopia/kopia/repo/jsonencoding"
)

// Rclone keeps the repository in any storage that the rclone program reaches. Kopia
// starts rclone as a WebDAV server; by its own account Kopia does not test this often.
type Rclone struct {
	RemotePath     string        // remote:path
	Executable     string        // empty for "rclone" in the search path
	Args           []string      // further arguments of rclone
	Env            []string      // name=value, further environment of rclone
	Config         string        // text of an rclone configuration, stored in ours
	StartupTimeout time.Duration // 0 for 15 s
}

func (s *Rclone) validate() error {
	if s.RemotePath == "" {
		return invalid("an rclone repository needs a remote path, remote:path")
	}
	exe := s.Executable
	if exe == "" {
		exe = "rclone"
	}
	if _, err := exec.LookPath(exe); err != nil {
		return invalid("the program rclone is needed and was not found: install it, or name it with --rclone-exe")
	}
	return nil
}

func (s *Rclone) options() *rclone.Options {
	return &rclone.Options{
		RemotePath:     s.RemotePath,
		RCloneExe:      s.Executable,
		RCloneArgs:     s.Args,
		RCloneEnv:      s.Env,
		EmbeddedConfig: s.Config,
		StartupTimeout: jsonencoding.Duration{Duration: s.StartupTimeout},
		AtomicWrites:   true, // as kopia cli/storage_rclone.go: rclone serves with its own staging
	}
}

func (s *Rclone) open(ctx context.Context, create bool) (blob.Storage, error) {
	o := s.options()
	o.Options = shardsOf(create)
	return rclone.New(ctx, o, create)
}
