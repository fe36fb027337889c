package repository

import (
	"context"
	"errors"
	"testing"
	"time"
)

// A call that was given up uses the repository until it returns, though its caller has closed it:
// its indexes are mapped memory, and one that is unmapped meanwhile ends the process.
func TestCloseWaitsForCallsThatWereGivenUp(t *testing.T) {
	s := newSite(t)
	s.create(t)
	r, err := Open(t.Context(), OpenOptions{ConfigFile: s.config, Password: testPassword})
	if err != nil {
		t.Fatal(err)
	}
	ended := make(chan struct{})
	release := r.release
	r.release = func() { release(); close(ended) } // the last thing of closing

	ctx, giveUp := context.WithCancel(t.Context())
	began, goOn, result, left := make(chan struct{}), make(chan struct{}), make(chan error, 1), make(chan struct{})
	go func() {
		<-began
		giveUp()
	}()
	err = r.Answering(ctx, func(context.Context) error {
		close(began)
		<-goOn // a storage that does not look at its context
		err := r.Refresh(context.Background())
		result <- err
		return err
	}, func() { close(left) })
	if !errors.Is(err, context.Canceled) {
		t.Fatalf("a call that was given up: %v", err)
	}
	if err := r.Close(t.Context()); err != nil {
		t.Fatal(err)
	}
	select {
	case <-ended:
		t.Fatal("the repository was closed under a call that uses it")
	case <-time.After(100 * time.Millisecond):
	}
	close(goOn)
	if err := <-result; err != nil {
		t.Errorf("the call that was given up: %v", err)
	}
	<-left
	<-ended
}

// A call whose end closes the repository does not wait for itself.
func TestCloseAtTheEndOfACall(t *testing.T) {
	s := newSite(t)
	s.create(t)
	r, err := Open(t.Context(), OpenOptions{ConfigFile: s.config, Password: testPassword})
	if err != nil {
		t.Fatal(err)
	}
	ended := make(chan struct{})
	release := r.release
	r.release = func() { release(); close(ended) }
	if err := r.Answering(t.Context(), r.Refresh, func() {
		if err := r.Close(t.Context()); err != nil {
			t.Error(err)
		}
		select {
		case <-ended:
		default:
			t.Error("it returned before the repository was closed")
		}
	}); err != nil {
		t.Fatal(err)
	}
}
