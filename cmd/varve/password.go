package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"

	"github.com/spf13/pflag"
	"golang.org/x/term"

	"github.com/varve-io/varve/internal/secret"
)

// passwordPurpose says which password is needed.
type passwordPurpose struct {
	prefix  string // of the settings: "" or "new-"
	prompt  string
	confirm bool // typed twice: it has not been used yet
}

var (
	existingPassword = passwordPurpose{"", "Repository password: ", false}
	firstPassword    = passwordPurpose{"", "Password of the new repository: ", true}
	newPassword      = passwordPurpose{"new-", "New repository password: ", true}
)

var errNoPassword = errors.New("no repository password")

// noPassword returns the error about a password that could not be got, with what to do.
// Without the password a repository cannot be opened, and the exit code says so; a missing
// new password is an error of usage.
func (p passwordPurpose) noPassword(why error, next string) error {
	if p.prefix != "" {
		return usagef("no new repository password: %w: %s", why, next)
	}
	return fmt.Errorf("%w: %w: %s", errNoPassword, why, next)
}

// ways lists the ways to give a password.
func (p passwordPurpose) ways() string {
	return fmt.Sprintf("give --%[1]spassword-file, --%[1]spassword-command or $%[2]s, or type it on a terminal", p.prefix, environmentOf("", p.prefix+"password"))
}

// addPasswordFlags adds the two ways to refer to a password on the command line, which never
// contains the password itself.
func addPasswordFlags(f *pflag.FlagSet, prefix string, file, command *string) {
	what := "the repository password"
	if prefix != "" {
		what = "the new repository password"
	}
	f.StringVar(file, prefix+"password-file", "", "file that holds "+what)
	f.StringVar(command, prefix+"password-command", "", "shell command that prints "+what)
	for _, name := range []string{prefix + "password-file", prefix + "password-command"} {
		if err := f.SetAnnotation(name, appliedElsewhereKey, []string{"password"}); err != nil {
			panic(err)
		}
		inSection(f, "", name)
	}
}

// password gets a password as the command line says, else from the environment, else from the
// settings file, else from a terminal.
func (a *app) password(ctx context.Context, purpose passwordPurpose) (string, error) {
	file, command := a.flags.passwordFile, a.flags.passwordCommand
	if purpose.prefix != "" {
		file, command = a.flags.newPasswordFile, a.flags.newPasswordCommand
	}
	fileName, commandName := purpose.prefix+"password-file", purpose.prefix+"password-command"
	if file == "" && command == "" {
		if p, ok := a.lookupEnv(environmentOf("", purpose.prefix+"password")); ok {
			p, err := secret.Line([]byte(p))
			if err != nil {
				name := environmentOf("", purpose.prefix+"password")
				return "", purpose.noPassword(fmt.Errorf("$%s %w", name, err), "set it to the password, or unset it and give the password another way")
			}
			return p, nil
		}
		file, _ = a.lookupEnv(environmentOf("", fileName))
		command, _ = a.lookupEnv(environmentOf("", commandName))
	}
	if file == "" && command == "" && a.settings != nil {
		if v := a.settings.global[fileName]; len(v) == 1 {
			file = v[0]
		}
		if v := a.settings.global[commandName]; len(v) == 1 {
			command = v[0]
		}
	}
	switch {
	case file != "" && command != "":
		return "", usagef("both %s and %s are given; give one", fileName, commandName)
	case file != "":
		return a.passwordFromFile(file, purpose)
	case command != "":
		return a.passwordFromCommand(ctx, command, purpose)
	default:
		return a.passwordFromTerminal(purpose)
	}
}

func (a *app) passwordFromFile(file string, purpose passwordPurpose) (string, error) {
	p, err := a.readSecretFile(file)
	if err != nil {
		return "", purpose.noPassword(fmt.Errorf("password file: %w", err), "name a file that this user may read, with the password as its one line")
	}
	return p, nil
}

// readSecretFile reads one line from a file, without its line end.
func (a *app) readSecretFile(file string) (string, error) {
	f, err := os.Open(file)
	if err != nil {
		return "", err
	}
	defer f.Close()
	a.checkSecretFile(file)
	p, err := io.ReadAll(io.LimitReader(f, secret.Max+1))
	if err != nil {
		return "", err
	}
	s, err := secret.Line(p)
	if err != nil {
		return "", fmt.Errorf("%s %w", file, err)
	}
	return s, nil
}

func (a *app) passwordFromCommand(ctx context.Context, command string, purpose passwordPurpose) (string, error) {
	cmd := exec.CommandContext(ctx, "/bin/sh", "-c", command)
	// It may ask a question itself. What is piped into varve is not for it: a list of
	// extents, or the NBD client of --stdio.
	if in, ok := a.stdin.(*os.File); ok && term.IsTerminal(int(in.Fd())) {
		cmd.Stdin = in
	}
	cmd.Stderr = a.stderr
	p, err := cmd.Output()
	if err != nil {
		if ctx.Err() != nil {
			return "", context.Cause(ctx)
		}
		return "", purpose.noPassword(fmt.Errorf("the password command failed: %w", err), "run it with sh -c to see why; it must print the password and exit with 0")
	}
	s, err := secret.Line(p)
	if err != nil {
		return "", purpose.noPassword(fmt.Errorf("what the password command printed %w", err), "it must print the password, as one line, to standard output")
	}
	return s, nil
}

func (a *app) passwordFromTerminal(purpose passwordPurpose) (string, error) {
	in, ok := a.stdin.(*os.File)
	if !ok || !term.IsTerminal(int(in.Fd())) {
		return "", purpose.noPassword(errors.New("standard input is not a terminal"), purpose.ways())
	}
	ask := func(prompt string) (string, error) {
		fmt.Fprint(a.stderr, prompt)
		p, err := term.ReadPassword(int(in.Fd()))
		fmt.Fprintln(a.stderr)
		if err != nil {
			return "", fmt.Errorf("read password: %w", err)
		}
		return string(p), nil
	}
	typed, err := ask(purpose.prompt)
	if err != nil {
		return "", err
	}
	p, err := secret.Line([]byte(typed))
	if err != nil {
		return "", purpose.noPassword(fmt.Errorf("what was typed %w", err), purpose.ways())
	}
	if purpose.confirm {
		again, err := ask("The same again: ")
		if err != nil {
			return "", err
		}
		if again != typed {
			return "", usagef("the two passwords differ")
		}
	}
	return p, nil
}

// configFile returns the path of the connection to the repository.
func (a *app) configFile() (string, error) {
	file := a.flags.config // a flag, $VARVE_CONFIG or a setting
	if file == "" {
		dir, ok := a.lookupEnv("XDG_CONFIG_HOME")
		if !ok || !filepath.IsAbs(dir) {
			home, ok := a.lookupEnv("HOME")
			if !ok || home == "" {
				return "", usagef("no home directory to keep the configuration in: give --config")
			}
			dir = filepath.Join(home, ".config")
		}
		file = filepath.Join(dir, "varve", "repository.config")
	}
	abs, err := filepath.Abs(strings.TrimSpace(file))
	if err != nil {
		return "", fmt.Errorf("configuration file: %w", err)
	}
	return abs, nil
}
