package store

import (
	"errors"
	"fmt"
	"net/url"
	"strings"
	"testing"

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
