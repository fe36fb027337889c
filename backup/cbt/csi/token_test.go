package csi_test

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"google.golang.org/grpc/codes"

	"github.com/varve-io/varve/backup/cbt"
	"github.com/varve-io/varve/backup/cbt/csi"
	"github.com/varve-io/varve/backup/cbt/csi/csitest"
)

// logTo makes a session log to log.
func logTo(log *slog.Logger) func(*csi.Options) {
	return func(o *csi.Options) { o.Log = log }
}

type syncBuffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (b *syncBuffer) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.b.Write(p)
}

func (b *syncBuffer) String() string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.b.String()
}

// TestTokenNeverShows: the service echoes the token in every way of failing, and the test
// looks for it in all that was logged or returned.
func TestTokenNeverShows(t *testing.T) {
	logged := &syncBuffer{}
	log := slog.New(slog.NewJSONHandler(logged, &slog.HandlerOptions{Level: slog.LevelDebug}))

	for _, code := range []codes.Code{
		codes.Unavailable, codes.Internal, codes.Unauthenticated, codes.PermissionDenied, codes.NotFound, codes.Unknown, codes.InvalidArgument,
	} {
		parts := strings.Split(csitest.Token, ".")
		server := csitest.New(t, csitest.Script{Capacity: testSize, Delta: testExtents(3), Then: csitest.Behaviour{
			End: csitest.Status, After: 1, Code: code,
			Message: fmt.Sprintf("token %s, signature %s, claims\n%s", csitest.Token, parts[2], parts[1]),
		}})
		session := openSession(t, server, logTo(log))

		for _, source := range []cbt.Source{session.Delta(), session.Allocated()} {
			_, _, err := list(t, source, deltaRequest())
			fmt.Fprintf(logged, "%v %+v %#v %q", err, err, err, err)
			log.Error("failed", "error", err)

			for e := err; e != nil; e = errors.Unwrap(e) {
				fmt.Fprintf(logged, "%+v", e)
			}
		}
	}

	// A token that the service does not know, which it shows.
	server := csitest.New(t, csitest.Script{Capacity: testSize})
	server.SetToken("another")
	session := openSession(t, server, logTo(log))
	_, _, err := list(t, session.Delta(), deltaRequest())
	fmt.Fprint(logged, err)

	if !errors.Is(err, cbt.ErrDenied) {
		t.Errorf("%v is no refusal", err)
	}

	token, err := csi.NewToken(csitest.Token)
	if err != nil {
		t.Fatal(err)
	}

	for _, verb := range []string{"%v", "%+v", "%#v", "%s", "%q", "%x", "%d"} {
		fmt.Fprintf(logged, verb, token)
		fmt.Fprintf(logged, verb, struct{ T csi.Token }{token})
		fmt.Fprintf(logged, verb, struct{ t csi.Token }{token})
		fmt.Fprintf(logged, verb, &token)
	}

	text, err := json.Marshal(map[string]any{"token": token, "options": csi.Options{Tokens: fixedToken(csitest.Token)}})
	if err != nil {
		t.Fatal(err)
	}

	_, _ = logged.Write(text)

	log.Info("token", "token", token, "struct", struct{ T csi.Token }{token})

	text = []byte(logged.String())
	if !bytes.Contains(text, []byte("the list of changed blocks broke")) {
		t.Error("nothing was captured")
	}

	for _, secret := range append(strings.Split(csitest.Token, "."), csitest.Token) {
		if i := bytes.Index(text, []byte(secret)); i >= 0 {
			t.Errorf("%q shows: ...%s", secret, text[max(0, i-200):i+len(secret)])
		}
	}
}

func TestTokenFile(t *testing.T) {
	path := filepath.Join(t.TempDir(), "token")
	source := csi.TokenFile(path)

	if _, err := source.Token(t.Context()); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("no file: %v", err)
	}

	for text, good := range map[string]bool{
		"abc": true, "abc\n": true, " abc\r\n": true, "": false, "\n": false, "a b": false, "a\x00b": false, "clé": false,
		strings.Repeat("a", 64<<10): true, strings.Repeat("a", 64<<10+1): false,
	} {
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}

		_, err := source.Token(t.Context())
		if good != (err == nil) {
			t.Errorf("%.20q: %v", text, err)
		}

		if err != nil && !strings.Contains(err.Error(), path) {
			t.Errorf("%v does not name the file", err)
		}
	}
}

// TestTokenIsReadAnew: the kubelet renews a token in the middle of a list.
func TestTokenIsReadAnew(t *testing.T) {
	path := filepath.Join(t.TempDir(), "token")
	write := func(token string) {
		if err := os.WriteFile(path, []byte(token), 0o600); err != nil {
			t.Error(err)
		}
	}
	write("first")

	server := csitest.New(t, csitest.Script{
		Capacity: testSize, Delta: testExtents(5), PerMessage: 1,
		Calls: []csitest.Behaviour{{End: csitest.Status, Code: codes.Unavailable, After: 2}},
	})
	server.SetToken("first")

	session := openSession(t, server, func(o *csi.Options) { o.Tokens, o.TokenFile = nil, path })

	var got []cbt.Extent

	_, err := session.Delta().Changes(t.Context(), deltaRequest(), func(e cbt.Extent) error {
		if got = append(got, e); len(got) == 2 {
			write("second")
			server.SetToken("second")
		}
		return nil
	})
	if err != nil || len(got) != 5 {
		t.Errorf("%v, %v", got, err)
	}

	if calls := server.Calls(); calls[0].Token != "first" || calls[len(calls)-1].Token != "second" {
		t.Errorf("calls %+v", calls)
	}
}

// renewing is a TokenSource that keeps its token until it is refused.
type renewing struct {
	made   int
	tokens []string
	err    error
}

func (r *renewing) Token(context.Context) (csi.Token, error) {
	if r.err != nil {
		return csi.Token{}, r.err
	}
	return csi.NewToken(r.tokens[min(r.made, len(r.tokens)-1)])
}

func (r *renewing) Refused(csi.Token) { r.made++ }

func TestRefusedTokenIsRenewedOnce(t *testing.T) {
	server := csitest.New(t, csitest.Script{Capacity: testSize, Delta: testExtents(5)})
	server.SetToken("good")

	tokens := &renewing{tokens: []string{"expired", "good"}}
	session := openSession(t, server, func(o *csi.Options) { o.Tokens = tokens })

	if got, _, err := list(t, session.Delta(), deltaRequest()); err != nil || len(got) != 5 {
		t.Errorf("%v, %v", got, err)
	}

	tokens = &renewing{tokens: []string{"expired", "worse", "worst", "good"}}
	before := len(server.Calls())
	session = openSession(t, server, func(o *csi.Options) { o.Tokens = tokens })

	_, _, err := list(t, session.Delta(), deltaRequest())
	if _, fallback := cbt.FallbackReason(err); !errors.Is(err, cbt.ErrDenied) || fallback {
		t.Errorf("%v", err)
	}

	if n := len(server.Calls()) - before; n != 2 {
		t.Errorf("%d calls, want one and another with a new token", n)
	}
}

func TestNoTokenIsAnError(t *testing.T) {
	server := csitest.New(t, csitest.Script{Capacity: testSize})
	gone := errors.New("the API server is away")
	clock := &testClock{}
	session := openSession(t, server, func(o *csi.Options) {
		o.Tokens = &renewing{err: gone}
		o.Clock = clock
	})

	_, _, err := list(t, session.Delta(), deltaRequest())
	if _, fallback := cbt.FallbackReason(err); fallback || !errors.Is(err, cbt.ErrDenied) || !errors.Is(err, gone) {
		t.Errorf("%v", err)
	}

	if n := len(clock.waited()); n != 6 {
		t.Errorf("waited %d times", n)
	}
}
