package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"

	"github.com/spf13/cobra"

	"github.com/varve-io/varve/backup/repository"
	"github.com/varve-io/varve/internal/progress"
)

// How to add a command
//
// Write cmd_<name>.go with one function, newXCommand(a *app) *cobra.Command,
// and add it to the list in newRootCommand. In its RunE:
//
//	ctx := cmd.Context()                  // cancelled by the first Ctrl-C
//	rep, err := a.openRepository(ctx)     // says what to do when it cannot
//	if err != nil { return err }
//	defer rep.Close(context.WithoutCancel(ctx))
//
//	task := a.progress.Start("backup shop/db", size, progress.Bytes)
//	defer task.Done()                     // task.Add(n) from any goroutine
//	a.log.Info("checkpoint", "bytes", n)  // stderr; never fmt.Print
//
//	return a.print(result, func(t *table) { // -o json: result as it marshals
//		t.row("ID", "TIME", "SIZE")          // -o table: what this writes
//		t.row(p.ID, t.time(p.Time), t.bytes(p.Size))
//	})
//
// Return errors; main prints them once, and exit.go's table maps them to exit
// codes (add a row for a new sentinel). usagef makes an error of usage. Every
// flag can also be given by environment and settings file (settings.go),
// without any code in the command. Its test stands beside it and calls
// runVarve (app_test.go).

// app is the state of one run of varve: its streams, global flags and output.
type app struct {
	stdin          io.Reader
	stdout, stderr io.Writer
	lookupEnv      func(string) (string, bool)
	work           workState // of a command that makes or writes something
	left           string    // what an error leaves behind of it
	hidden         []string  // variables with secrets, which children do not inherit

	flags struct {
		config                              string
		settings                            string
		passwordFile                        string // empty if not given on the command line
		passwordCommand                     string // likewise
		cluster                             string
		output                              string
		logLevel                            string
		logFormat                           string
		newPasswordFile, newPasswordCommand string
		noProgress                          bool
		verbose                             bool
	}

	settings *settings         // the settings file, once read
	secrets  []*secretSetting  // secrets of storages (secrets.go)
	log      *slog.Logger      // to stderr
	progress *progress.Display // to stderr
	warned   map[string]bool   // files with secrets already warned of
	started  bool              // a command's own code has run: errors are not about usage
}

func newApp() *app {
	return &app{
		stdin: os.Stdin, stdout: os.Stdout, stderr: os.Stderr, lookupEnv: os.LookupEnv,
		log:      slog.New(slog.DiscardHandler),
		progress: progress.New(progress.Options{}),
	}
}

// run executes one command line and returns the exit code.
func (a *app) run(ctx context.Context, args []string) int {
	root := newRootCommand(a)
	root.SetArgs(args)
	cmd, err := root.ExecuteContextC(ctx)
	a.progress.Close()
	if err == nil {
		return exitOK
	}
	if cause := context.Cause(ctx); errors.Is(cause, errInterrupted) && errors.Is(err, context.Canceled) {
		err = cause
	}
	if !a.started {
		var word string
		if n, _ := fmt.Sscanf(err.Error(), "unknown command %q for", &word); n == 1 && cmd == root { // cobra's own
			err = unknownCommand(root, word)
		}
		err = &usageError{err}
	}
	code := exitCode(err)
	next := ""
	if h := hint(err); h != "" && code == exitFailure { // errors with a code of their own include advice
		next = ": " + h
	}
	fmt.Fprintf(a.stderr, "varve: %s\n", a.whatStays(cmd.CommandPath(), code, message(err)+next))
	if text := inFull(err); a.flags.verbose && text != message(err) {
		fmt.Fprintf(a.stderr, "varve: in full: %s\n", text)
	}
	if code == exitUsage {
		if !a.started && cmd.Runnable() {
			fmt.Fprintf(a.stderr, "Usage: %s\n", cmd.UseLine())
		}
		fmt.Fprintf(a.stderr, "Run '%s --help' for usage.\n", cmd.CommandPath())
	}
	return code
}

func newRootCommand(a *app) *cobra.Command {
	root := &cobra.Command{
		Use:   "varve",
		Short: "Block backup to a Kopia repository; every recovery point is a whole disk",
		Long: `Varve backs up block volumes into a Kopia repository, as a full and then as
changed-block increments. Every recovery point can be used at once as a whole
disk, without a restore.

Every flag can also be set in the environment (shown in brackets) or in a
settings file (--from-file, YAML or JSON). Flags win over the environment, the
environment over the file. Secrets are never flags.`,
		SilenceUsage:      true,
		SilenceErrors:     true,
		Version:           readVersion().Version,
		PersistentPreRunE: func(cmd *cobra.Command, _ []string) error { return a.prepare(cmd) },
	}
	root.SetIn(a.stdin)
	root.SetOut(a.stdout)
	root.SetErr(a.stderr)
	root.SetVersionTemplate("varve {{.Version}}\n")
	root.SetFlagErrorFunc(flagError)
	root.DisableSuggestions = true // cobra's are on separate lines
	root.SuggestionsMinimumDistance = 2

	f := root.PersistentFlags()
	f.StringVar(&a.flags.config, "config", "", "configuration file of the connected repository (default $XDG_CONFIG_HOME/varve/repository.config)")
	f.StringVar(&a.flags.settings, "from-file", "", "YAML or JSON file of settings")
	addPasswordFlags(f, "", &a.flags.passwordFile, &a.flags.passwordCommand)
	f.StringVar(&a.flags.cluster, "cluster", "", "name of this cluster or machine in the repository (default what 'repo connect' stored: the host name)")
	f.StringVarP(&a.flags.output, "output", "o", "table", "output format: table or json")
	f.StringVar(&a.flags.logLevel, "log-level", "", "log level: debug, info, warn or error (default warn on a terminal, else info)")
	f.StringVar(&a.flags.logFormat, "log-format", "text", "log format: text or json")
	f.BoolVar(&a.flags.noProgress, "no-progress", false, "show no progress")
	f.BoolVarP(&a.flags.verbose, "verbose", "v", false, "the same as --log-level=debug")

	root.AddGroup(
		&cobra.Group{ID: groupRepository, Title: "Repository:"},
		&cobra.Group{ID: groupBackup, Title: "Backup and restore:"},
		&cobra.Group{ID: groupRead, Title: "Reading recovery points:"},
		&cobra.Group{ID: groupKeep, Title: "Managing recovery points:"},
		&cobra.Group{ID: groupKubernetes, Title: "Kubernetes:"},
	)
	root.AddCommand(
		newAttachCommand(a),
		newBackupCommand(a),
		newSourceCommand(a),
		newCatCommand(a),
		newCommitCommand(a),
		newControllerCommand(a),
		newCpCommand(a),
		newDetachCommand(a),
		newDiffCommand(a),
		newFindCommand(a),
		newForgetCommand(a),
		newGuestFreezeCommand(),
		newListCommand(a),
		newLsCommand(a),
		newMaintenanceCommand(a),
		newMountCommand(a),
		newMountWatchCommand(),
		newMountLoopCommand(),
		newMoverCommand(a),
		newNBDCommand(a),
		newPinCommand(a),
		newPruneCommand(a),
		newRepoCommand(a),
		newRestoreCommand(a),
		newServeCommand(a),
		newShowCommand(a),
		newStatCommand(a),
		newTreeCommand(a),
		newUmountCommand(a),
		newUnpinCommand(a),
		newVerifyCommand(a),
		newVersionCommand(a),
	)
	root.InitDefaultCompletionCmd()
	a.instrument(root)
	return root
}

// Groups of commands in the help text.
const (
	groupRepository = "repository"
	groupBackup     = "backup"
	groupRead       = "read"
	groupKeep       = "keep"
	groupKubernetes = "kubernetes"
)

// instrument prepares every command below c: flags get their environment variables, and
// errors before a command's own code are errors of usage.
func (a *app) instrument(c *cobra.Command) {
	describeEnvironment(c)
	if c.HasParent() && !c.Runnable() {
		// Cobra would print help and succeed for any word.
		c.SuggestionsMinimumDistance = 2
		c.RunE = func(cmd *cobra.Command, args []string) error {
			if len(args) > 0 {
				return unknownCommand(cmd, args[0])
			}
			return needsCommand(cmd)
		}
	}
	if check := c.Args; check != nil && c.HasParent() {
		c.Args = func(cmd *cobra.Command, args []string) error { return checkArgs(cmd, check, args) }
	}
	if run := c.RunE; run != nil {
		c.RunE = func(cmd *cobra.Command, args []string) error {
			a.started = true
			return run(cmd, args)
		}
	}
	for _, sub := range c.Commands() {
		a.instrument(sub)
	}
}

// prepare runs before every command: settings, then logging and progress.
func (a *app) prepare(cmd *cobra.Command) error {
	if err := a.applySettings(cmd); err != nil {
		return err
	}
	if a.flags.output != "table" && a.flags.output != "json" {
		return usagef("--output is table or json, not %q", a.flags.output)
	}
	if err := a.startOutput(); err != nil {
		return err
	}
	a.checkSettingsFile()
	return nil
}

func usagef(format string, args ...any) error {
	return &usageError{fmt.Errorf(format, args...)}
}

// openRepository opens the connected repository. The caller closes it.
func (a *app) openRepository(ctx context.Context) (*repository.Repository, error) {
	return a.openRepositoryBy(ctx, repository.Open)
}

func (a *app) openRepositoryBy(ctx context.Context, open func(context.Context, repository.OpenOptions) (*repository.Repository, error)) (*repository.Repository, error) {
	config, err := a.configFile()
	if err != nil {
		return nil, err
	}
	if err := repository.Connected(config); err != nil {
		return nil, err // before asking for a password in vain
	}
	a.checkSecretFile(config)
	password, err := a.password(ctx, existingPassword)
	if err != nil {
		return nil, err
	}
	return open(ctx, repository.OpenOptions{ConfigFile: config, Password: password, Log: a.log})
}
