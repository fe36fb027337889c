package repository

import (
	"context"
	"errors"
	"os"
	"testing"
)

// Each derivation of a key takes a turn and gives it back, on success and on failure, and
// no turn is held during a storage call.
func TestTurn(t *testing.T) {
	held, took := 0, 0
	turn := func(context.Context) (func(), error) {
		held++
		took++
		return func() { held-- }, nil
	}
	check := func(what string, want int) {
		t.Helper()
		if held != 0 || took != want {
			t.Errorf("%s: %d turns, %d of them held; want %d and none", what, took, held, want)
		}
		took = 0
	}
	s := newSite(t)
	opt := s.connect()
	opt.Turn = turn
	if err := Create(t.Context(), CreateOptions{ConnectOptions: opt}); err != nil {
		t.Fatal(err)
	}
	check("create", 2)
	r, err := Open(t.Context(), OpenOptions{ConfigFile: s.config, Password: testPassword, Turn: turn})
	if err != nil {
		t.Fatal(err)
	}
	check("open", 1)
	if err := r.Close(t.Context()); err != nil {
		t.Error(err)
	}
	wrong := opt
	wrong.Password = "wrong"
	wantError(t, Connect(t.Context(), wrong), ErrWrongPassword)
	check("wrong password", 1)

	no := errors.New("no turn")
	opt.Turn = func(context.Context) (func(), error) { return nil, no }
	if err := Connect(t.Context(), opt); !errors.Is(err, no) {
		t.Errorf("connected without a turn: %v", err)
	}
}

// An attached repository takes one derivation, reports its status, and detects another
// repository in its place.
func TestAttach(t *testing.T) {
	s := newSite(t)
	s.create(t)
	if err := Disconnect(s.config); err != nil {
		t.Fatal(err)
	}
	opt, turns := s.connect(), 0
	opt.Turn = func(context.Context) (func(), error) { turns++; return func() {}, nil }
	r, err := Attach(t.Context(), opt)
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close(context.WithoutCancel(t.Context()))
	if turns != 1 || !r.Writable() || r.UniqueID() == "" {
		t.Errorf("%d derivations, writable %v, ID %q", turns, r.Writable(), r.UniqueID())
	}
	if st, err := r.Status(t.Context()); err != nil || st.UniqueID != r.UniqueID() {
		t.Errorf("status %+v, %v", st, err)
	}
	if err := r.Unchanged(t.Context()); err != nil {
		t.Errorf("unchanged: %v", err)
	}
	if err := os.Rename(s.dir, s.dir+"-away"); err != nil {
		t.Fatal(err)
	}
	if err := r.Unchanged(t.Context()); !errors.Is(err, ErrNotInitialized) && !errors.Is(err, ErrUnreachable) {
		t.Errorf("the repository is gone: %v", err)
	}
	other := newSite(t)
	other.dir = s.dir
	other.create(t)
	if err := r.Unchanged(t.Context()); !errors.Is(err, ErrReplaced) {
		t.Errorf("another repository stands there: %v", err)
	}
}
