package repository

import (
	"errors"
	"os"
	"path/filepath"
	"testing"
)

func TestChangePassword(t *testing.T) {
	s := newSite(t)
	s.create(t)
	opt := OpenOptions{ConfigFile: s.config, Password: testPassword}
	if err := ChangePassword(t.Context(), opt, "new"); err != nil {
		t.Fatal(err)
	}
	_, err := s.open(t, testPassword)
	wantError(t, err, ErrWrongPassword)
	if _, err := s.open(t, "new"); err != nil {
		t.Error(err)
	}
	again := s.connect()
	again.Password = "new"
	if err := Connect(t.Context(), again); err != nil {
		t.Error(err)
	}
}

func TestInterruptedPasswordChangeIsFinished(t *testing.T) {
	s := newSite(t)
	s.create(t)
	file := filepath.Join(s.dir, "kopia.repository.f")
	before, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	st, err := os.Stat(file)
	if err != nil {
		t.Fatal(err)
	}
	opt := OpenOptions{ConfigFile: s.config, Password: testPassword}
	if err := ChangePassword(t.Context(), opt, "new"); err != nil {
		t.Fatal(err)
	}
	// As if the second write had never happened.
	if err := errors.Join(os.WriteFile(file, before, 0o600), os.Chtimes(file, st.ModTime(), st.ModTime())); err != nil {
		t.Fatal(err)
	}
	_, err = s.open(t, testPassword)
	wantError(t, err, ErrPasswordChangeInterrupted, "change-password")
	wantError(t, ChangePassword(t.Context(), opt, "other"), ErrPasswordChangeInterrupted)
	if now, err := os.ReadFile(file); err != nil || string(now) != string(before) {
		t.Errorf("a wrong guess changed the repository: %v", err)
	}
	if err := ChangePassword(t.Context(), opt, "new"); err != nil {
		t.Fatal(err)
	}
	if _, err := s.open(t, "new"); err != nil {
		t.Error(err)
	}
}
