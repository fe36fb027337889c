package store

import (
	"errors"
	"fmt"
	"net/url"
	"strings"
	"testing"

	"github.com/varve-io/varve/api/v1alpha1"
	"github.com/varve-io/varve/backup/repository"
)

func TestRedact(t *testing.T) {
	c := Credentials{
		KeyPassword: []byte("open sesame\n"), "sasToken": []byte("?sv=2024-11-04&sig=a%2Bb%2Fc%3D%3D&se=2027"), "user": []byte("varve-user"), "sessionToken": []byte("x"),
	}
	for _, text := range []string{
		"no route to host",
		"the password is open sesame",
		"Get https://a.blob.core.windows.net/c?sv=2024-11-04&sig=a%2Bb%2Fc%3D%3D&se=2027: EOF",
		(&url.Error{Op: "Get", URL: "https://a.blob.core.windows.net/c?" + url.Values{"sig": {"a+b/c=="}, "comp": {"list"}}.Encode(), Err: errors.New("EOF")}).Error(),
		"user varve-user, x",
	} {
		err := fmt.Errorf("%w: %s", repository.ErrUnreachable, text)
		got := c.Redact(err)
		if !errors.Is(got, repository.ErrUnreachable) {
			t.Errorf("%v does not wrap what it was", got)
		}
		for _, s := range []string{"open sesame", "a%2Bb", "a+b/c"} {
			if strings.Contains(got.Error(), s) {
				t.Errorf("%q has a secret in it", got)
			}
		}
		if !strings.Contains(text, "sig=") && !strings.Contains(text, "sesame") && got != err {
			t.Errorf("%q became %q", err, got)
		}
	}
	if c.Redact(nil) != nil {
		t.Error("an error of none")
	}
}

// A tenant does not see a server's answer: its Repository could name any server.
func TestAnswersAreForAdministrators(t *testing.T) {
	c := Credentials{KeyPassword: []byte("secret-password")}
	answer := errors.New("x509: certificate is valid for kubernetes.default.svc")
	for _, tc := range []struct {
		name string
		err  error
		told bool
	}{
		{"unreachable", fmt.Errorf("open: %w: %w", repository.ErrUnreachable, answer), false},
		{"storage failed", fmt.Errorf("list: %w: %w", repository.ErrStorageFailed, answer), false},
		{"wrong password", fmt.Errorf("open: %w", repository.ErrWrongPassword), true},
		{"the device", errors.New("read /dev/varve: input/output error"), true},
	} {
		got := c.Withhold(tc.err, nil)
		if !errors.Is(got, tc.err) || (got.Error() == tc.err.Error()) != tc.told || strings.Contains(got.Error(), "kubernetes") {
			t.Errorf("%s: %v", tc.name, got)
		}
	}
	// An error of opening a store that is not known to be harmless is hidden too.
	if told(answer) || told(fmt.Errorf("%w: %w", repository.ErrUnreachable, ErrSpec)) || !told(fmt.Errorf("%w: endpoint", repository.ErrInvalidOptions)) {
		t.Error("errors of opening are told that should not be, or not told that should")
	}
}

// End to end: a Repository that names a server of the controller's own machine.
func TestRepositoryAtLoopback(t *testing.T) {
	if err := repository.GuardTransport(); err != nil {
		t.Fatal(err)
	}
	s := Settings{Tenant: true, ClusterName: "c", Storage: v1alpha1.Storage{S3: &v1alpha1.S3Storage{Bucket: "b", Endpoint: "localhost:8081", DisableTLS: true}}}
	_, err := s.Open(t.Context(), OpenOptions{Credentials: Credentials{KeyPassword: []byte("p"), "accessKeyID": []byte("a"), "secretAccessKey": []byte("s")}, Dir: t.TempDir()})
	if reason, again := Reason(err); reason != v1alpha1.ReasonInvalidSpec || again {
		t.Errorf("it is %s: %v", reason, err)
	}
}
