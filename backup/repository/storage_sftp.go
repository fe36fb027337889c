package repository

import (
	"context"
	"path/filepath"

	"github.com/kopia/kopia/repo/blob"
	"github.com/kopia/kopia/repo/blob/sftp"
)

// SFTP keeps the repository in a directory of an SSH server.
type SFTP struct {
	Host string
	Port int // 0 for 22
	User string
	Path string

	Password string // or:
	KeyFile  string // absolute path of a private key without passphrase, or:
	KeyData  string // the key itself

	KnownHostsFile string // absolute path; or:
	KnownHostsData string // lines of a known_hosts file

	ExternalSSH  bool   // run ssh instead, with the user's own configuration
	SSHCommand   string // empty for "ssh"
	SSHArguments string
}

func (s *SFTP) validate() error {
	switch {
	case s.Host == "":
		return invalid("an SFTP repository needs a host")
	case s.User == "":
		return invalid("an SFTP repository needs a user name")
	case s.Path == "":
		return invalid("an SFTP repository needs the path of its directory")
	case s.Port < 0 || s.Port > 65535:
		return invalid("SFTP port %d is not between 1 and 65535", s.Port)
	}
	if s.ExternalSSH {
		return nil
	}
	given := 0
	for _, v := range []string{s.Password, s.KeyFile, s.KeyData} {
		if v != "" {
			given++
		}
	}
	switch {
	case given == 0:
		return invalid("an SFTP repository needs a key file, a key or a password, or an external ssh command")
	case given > 1:
		return invalid("an SFTP repository takes one of key file, key and password")
	case s.KnownHostsFile == "" && s.KnownHostsData == "":
		return invalid("an SFTP repository needs a known_hosts file, to verify the server")
	case s.KeyFile != "" && !filepath.IsAbs(s.KeyFile), s.KnownHostsFile != "" && !filepath.IsAbs(s.KnownHostsFile):
		return invalid("the paths of SFTP key and known_hosts files must be absolute")
	}
	return nil
}

func (s *SFTP) options() *sftp.Options {
	o := &sftp.Options{
		Path:           s.Path,
		Host:           s.Host,
		Port:           s.Port,
		Username:       s.User,
		Password:       s.Password,
		Keyfile:        s.KeyFile,
		KeyData:        s.KeyData,
		KnownHostsFile: s.KnownHostsFile,
		KnownHostsData: s.KnownHostsData,
		ExternalSSH:    s.ExternalSSH,
		SSHCommand:     s.SSHCommand,
		SSHArguments:   s.SSHArguments,
	}
	if o.Port == 0 {
		o.Port = 22
	}
	if o.SSHCommand == "" {
		o.SSHCommand = "ssh"
	}
	return o
}

func (s *SFTP) open(ctx context.Context, create bool) (blob.Storage, error) {
	o := s.options()
	o.Options = shardsOf(create)
	return sftp.New(ctx, o, create)
}
