package main

import (
	"os"
	"path/filepath"
	"time"

	"github.com/spf13/cobra"

	"github.com/varve-io/varve/backup/repository"
)

// storageKind is a storage as a subcommand of create and connect. flags adds its flags to cmd
// and returns the function that reads them once they are set.
type storageKind struct {
	name, short, example string
	flags                func(a *app, cmd *cobra.Command) func() (repository.Storage, error)
}

var storageKinds = []storageKind{
	{"filesystem", "in a directory", "--path /backups", filesystemFlags},
	{"s3", "in an S3 bucket", "--bucket backups --region eu-central-1", s3Flags},
	{"gcs", "in a Google Cloud Storage bucket", "--bucket backups", gcsFlags},
	{"azure", "in an Azure blob container", "--container backups --account example", azureFlags},
	{"b2", "in a Backblaze B2 bucket", "--bucket backups", b2Flags},
	{"sftp", "in a directory of an SSH server", "--host backup.example.com --user varve --path /backups --key-file ~/.ssh/id_ed25519", sftpFlags},
	{"webdav", "on a WebDAV server", "--url https://dav.example.com/backups --user varve", webdavFlags},
	{"rclone", "in any storage that rclone reaches", "--remote-path remote:backups", rcloneFlags},
}

func require(cmd *cobra.Command, names ...string) {
	for _, name := range names {
		if err := cmd.MarkFlagRequired(name); err != nil {
			panic(err) // a flag that was not defined: a mistake in this program
		}
	}
}

func filesystemFlags(_ *app, cmd *cobra.Command) func() (repository.Storage, error) {
	s := &repository.Filesystem{}
	cmd.Flags().StringVar(&s.Path, "path", "", "directory of the repository")
	require(cmd, "path")
	return func() (repository.Storage, error) {
		var err error
		s.Path, err = absolute(s.Path)
		return s, err
	}
}

func s3Flags(a *app, cmd *cobra.Command) func() (repository.Storage, error) {
	s := &repository.S3{}
	var rootCA, pointInTime string
	f := cmd.Flags()
	f.StringVar(&s.Bucket, "bucket", "", "bucket, which must exist")
	f.StringVar(&s.Prefix, "prefix", "", "put before the name of every object, for example 'varve/'")
	f.StringVar(&s.Endpoint, "endpoint", "", "host[:port] of the server (default s3.amazonaws.com)")
	f.StringVar(&s.Region, "region", "", "region of the bucket")
	f.StringVar(&s.AccessKeyID, "access-key-id", "", "access key ID; without one the machine's own role or environment (AWS_*) is used")
	f.StringVar(&s.RoleARN, "role-arn", "", "role to assume")
	f.StringVar(&s.SessionName, "role-session-name", "", "session name of the assumed role")
	f.DurationVar(&s.RoleDuration, "role-duration", time.Hour, "how long an assumed role is used before it is renewed")
	f.StringVar(&s.RoleEndpoint, "role-endpoint", "https://sts.amazonaws.com", "endpoint that issues the role")
	f.StringVar(&s.RoleRegion, "role-region", "", "region of the role")
	f.BoolVar(&s.DisableTLS, "disable-tls", false, "use plain HTTP")
	f.BoolVar(&s.DisableTLSVerification, "disable-tls-verification", false, "accept any certificate")
	f.StringVar(&rootCA, "root-ca-file", "", "PEM file of the authorities to trust instead of the machine's")
	f.StringVar(&pointInTime, "point-in-time", "", "read a versioned bucket as of this time (RFC 3339), read-only")
	secrets := []*secretSetting{
		a.addSecret(cmd, &s.SecretAccessKey, "s3", "secret-access-key", "the secret access key"),
		a.addSecret(cmd, &s.SessionToken, "s3", "session-token", "the session token"),
	}
	require(cmd, "bucket")
	return func() (repository.Storage, error) {
		if err := a.readSecrets(secrets); err != nil {
			return nil, err
		}
		// The usual variables are used together, so that a key given to varve is never paired
		// with another key's secret.
		if s.AccessKeyID == "" && s.SecretAccessKey == "" {
			s.AccessKeyID, _ = a.lookupEnv("AWS_ACCESS_KEY_ID")
			s.SecretAccessKey, _ = a.lookupEnv("AWS_SECRET_ACCESS_KEY")
			if s.SessionToken == "" {
				s.SessionToken, _ = a.lookupEnv("AWS_SESSION_TOKEN")
			}
		}
		if s.RoleARN == "" {
			s.RoleDuration, s.RoleEndpoint = 0, ""
		}
		if rootCA != "" {
			p, err := os.ReadFile(rootCA)
			if err != nil {
				return nil, usagef("--root-ca-file: %w", err)
			}
			s.RootCA = p
		}
		if pointInTime != "" {
			at, err := time.Parse(time.RFC3339, pointInTime)
			if err != nil {
				return nil, usagef("--point-in-time is a time like 2026-11-20T10:00:00Z, not %q", pointInTime)
			}
			s.PointInTime = at
		}
		return s, nil
	}
}

func gcsFlags(a *app, cmd *cobra.Command) func() (repository.Storage, error) {
	s := &repository.GCS{}
	embed := false
	var credentials string
	f := cmd.Flags()
	f.StringVar(&s.Bucket, "bucket", "", "bucket, which must exist")
	f.StringVar(&s.Prefix, "prefix", "", "put before the name of every object")
	f.StringVar(&s.CredentialsFile, "credentials-file", "", "JSON file of a service account (default the machine's own credentials)")
	f.BoolVar(&embed, "embed-credentials", false, "keep the credentials in the configuration file")
	secrets := []*secretSetting{a.addSecret(cmd, &credentials, "gcs", "credentials-json", "the service account's JSON on one line")}
	require(cmd, "bucket")
	return func() (repository.Storage, error) {
		if err := a.readSecrets(secrets); err != nil {
			return nil, err
		}
		s.CredentialsJSON = []byte(credentials)
		var err error
		if s.CredentialsFile, err = absolute(s.CredentialsFile); err != nil {
			return nil, err
		}
		if embed && s.CredentialsFile != "" {
			p, err := os.ReadFile(s.CredentialsFile)
			if err != nil {
				return nil, usagef("--credentials-file: %w", err)
			}
			s.CredentialsFile, s.CredentialsJSON = "", p
		}
		return s, nil
	}
}

func azureFlags(a *app, cmd *cobra.Command) func() (repository.Storage, error) {
	s := &repository.Azure{}
	var certificate string
	f := cmd.Flags()
	f.StringVar(&s.Container, "container", "", "container, which must exist")
	f.StringVar(&s.Prefix, "prefix", "", "put before the name of every blob")
	f.StringVar(&s.Account, "account", "", "storage account")
	f.StringVar(&s.Domain, "domain", "", "storage domain (default blob.core.windows.net)")
	f.StringVar(&s.TenantID, "tenant-id", "", "tenant of a service principal")
	f.StringVar(&s.ClientID, "client-id", "", "client ID of a service principal")
	f.StringVar(&certificate, "client-certificate-file", "", "PEM file of the service principal's certificate and key")
	f.StringVar(&s.FederatedTokenFile, "federated-token-file", "", "file of a federated token")
	f.BoolVar(&s.DisableTLS, "disable-tls", false, "use plain HTTP")
	secrets := []*secretSetting{
		a.addSecret(cmd, &s.AccountKey, "azure", "account-key", "the account key", "AZURE_STORAGE_KEY"),
		a.addSecret(cmd, &s.SASToken, "azure", "sas-token", "a SAS token", "AZURE_STORAGE_SAS_TOKEN"),
		a.addSecret(cmd, &s.ClientSecret, "azure", "client-secret", "the service principal's secret", "AZURE_CLIENT_SECRET"),
	}
	require(cmd, "container", "account")
	return func() (repository.Storage, error) {
		if certificate != "" {
			p, err := os.ReadFile(certificate)
			if err != nil {
				return nil, usagef("--client-certificate-file: %w", err)
			}
			s.ClientCertificate = string(p)
		}
		return s, a.readSecrets(secrets)
	}
}

func b2Flags(a *app, cmd *cobra.Command) func() (repository.Storage, error) {
	s := &repository.B2{}
	f := cmd.Flags()
	f.StringVar(&s.Bucket, "bucket", "", "bucket, which must exist")
	f.StringVar(&s.Prefix, "prefix", "", "put before the name of every file")
	f.StringVar(&s.KeyID, "key-id", "", "application key ID")
	secrets := []*secretSetting{a.addSecret(cmd, &s.Key, "b2", "key", "the application key", "B2_KEY")}
	require(cmd, "bucket")
	return func() (repository.Storage, error) { return s, a.readSecrets(secrets) }
}

func sftpFlags(a *app, cmd *cobra.Command) func() (repository.Storage, error) {
	s := &repository.SFTP{}
	embed := false
	f := cmd.Flags()
	f.StringVar(&s.Host, "host", "", "SSH server")
	f.IntVar(&s.Port, "port", 22, "port of the SSH server")
	f.StringVar(&s.User, "user", "", "user on the SSH server")
	f.StringVar(&s.Path, "path", "", "directory on the SSH server")
	f.StringVar(&s.KeyFile, "key-file", "", "file of a private key without passphrase")
	f.StringVar(&s.KnownHostsFile, "known-hosts-file", "", "known_hosts file with the server's key (default ~/.ssh/known_hosts)")
	f.BoolVar(&embed, "embed-credentials", false, "keep key and known hosts in the configuration file")
	f.BoolVar(&s.ExternalSSH, "external-ssh", false, "run ssh, with your own SSH configuration and agent")
	f.StringVar(&s.SSHCommand, "ssh-command", "ssh", "program to run with --external-ssh")
	f.StringVar(&s.SSHArguments, "ssh-args", "", "further arguments for it")
	secrets := []*secretSetting{a.addSecret(cmd, &s.Password, "sftp", "sftp-password", "the password on the SSH server")}
	require(cmd, "host", "user", "path")
	return func() (repository.Storage, error) {
		if err := a.readSecrets(secrets); err != nil {
			return nil, err
		}
		if s.ExternalSSH {
			return s, nil
		}
		if s.KnownHostsFile == "" {
			if home, ok := a.lookupEnv("HOME"); ok {
				s.KnownHostsFile = filepath.Join(home, ".ssh", "known_hosts")
			}
		}
		var err error
		if s.KeyFile, err = absolute(s.KeyFile); err != nil {
			return nil, err
		}
		if s.KnownHostsFile, err = absolute(s.KnownHostsFile); err != nil {
			return nil, err
		}
		if !embed {
			return s, nil
		}
		for _, e := range []struct{ file, data *string }{{&s.KeyFile, &s.KeyData}, {&s.KnownHostsFile, &s.KnownHostsData}} {
			if *e.file == "" {
				continue
			}
			p, err := os.ReadFile(*e.file)
			if err != nil {
				return nil, usagef("--embed-credentials: %w", err)
			}
			*e.file, *e.data = "", string(p)
		}
		return s, nil
	}
}

func webdavFlags(a *app, cmd *cobra.Command) func() (repository.Storage, error) {
	s := &repository.WebDAV{}
	f := cmd.Flags()
	f.StringVar(&s.URL, "url", "", "URL of the collection")
	f.StringVar(&s.User, "user", "", "user on the WebDAV server")
	f.StringVar(&s.Fingerprint, "fingerprint", "", "SHA-256 of the server's certificate, to trust it alone")
	f.BoolVar(&s.AtomicWrites, "atomic-writes", false, "a failed upload leaves nothing on this server")
	secrets := []*secretSetting{a.addSecret(cmd, &s.Password, "webdav", "webdav-password", "the password on the WebDAV server")}
	require(cmd, "url")
	return func() (repository.Storage, error) { return s, a.readSecrets(secrets) }
}

func rcloneFlags(_ *app, cmd *cobra.Command) func() (repository.Storage, error) {
	s := &repository.Rclone{}
	var config string
	f := cmd.Flags()
	f.StringVar(&s.RemotePath, "remote-path", "", "remote:path")
	f.StringVar(&s.Executable, "rclone-exe", "", "rclone program (default rclone in the search path)")
	f.StringArrayVar(&s.Args, "rclone-arg", nil, "further argument of rclone (repeat)")
	f.StringArrayVar(&s.Env, "rclone-env", nil, "further environment of rclone, name=value (repeat)")
	f.StringVar(&config, "embed-config-file", "", "rclone configuration to keep in ours")
	f.DurationVar(&s.StartupTimeout, "startup-timeout", 15*time.Second, "how long rclone may take to start")
	require(cmd, "remote-path")
	return func() (repository.Storage, error) {
		if config != "" {
			p, err := os.ReadFile(config)
			if err != nil {
				return nil, usagef("--embed-config-file: %w", err)
			}
			s.Config = string(p)
		}
		return s, nil
	}
}

// absolute resolves a path given by the user; an empty one stays empty.
func absolute(path string) (string, error) {
	if path == "" {
		return "", nil
	}
	abs, err := filepath.Abs(path)
	if err != nil {
		return "", usagef("path %q: %w", path, err)
	}
	return abs, nil
}
