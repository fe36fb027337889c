package repository_test

import (
	"bytes"
	"context"
	"errors"
	"sync"
	"testing"
	"time"

	"github.com/varve-io/varve/backup/repository"
	"github.com/varve-io/varve/backup/repository/repotest"
)

// What goes on reading while a repository is closed, or begins to, gets its data or ErrClosed: it neither ends the
// process, nor reads indexes that are not mapped any more.
func TestUseWhileClosing(t *testing.T) {
	data := []byte("the data of an object")
	for range 20 {
		files := repotest.New(t)
		oid := files.WriteObjects(t, repotest.Object{Data: data})[0]
		r, err := repository.Open(t.Context(), repository.OpenOptions{ConfigFile: files.ConfigFile, Password: repotest.Password})
		if err != nil {
			t.Fatal(err)
		}
		var users sync.WaitGroup
		begun := make(chan struct{}, 8)
		for i := range cap(begun) {
			users.Go(func() {
				ctx, cancel := context.WithCancel(context.Background())
				defer cancel()
				for n := 0; ; n++ {
					var got []byte
					read := func(ctx context.Context) (err error) { got, err = r.ReadObject(ctx, oid); return err }
					var err error
					switch i % 3 {
					case 0:
						err = read(ctx)
					case 1:
						err = read(context.Background())
					default:
						left := make(chan struct{})
						err = r.Answering(ctx, func(ctx context.Context) error {
							time.Sleep(time.Millisecond) // it may be closed now, and goes on
							return read(ctx)
						}, func() { close(left) })
						<-left
						if got != nil && errors.Is(err, repository.ErrClosed) {
							t.Error("a call that had begun could not read")
						}
					}
					if n == 1 {
						begun <- struct{}{}
					}
					if errors.Is(err, repository.ErrClosed) {
						return
					}
					if err != nil || !bytes.Equal(got, data) {
						t.Errorf("%q, %v", got, err)
						return
					}
				}
			})
		}
		for range cap(begun) {
			<-begun
		}
		if err := r.Close(context.Background()); err != nil {
			t.Error(err)
		}
		users.Wait()
	}
}
