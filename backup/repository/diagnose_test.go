package repository

import (
	"bytes"
	"context"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/kopia/kopia/repo/blob"
)

// TestFlippedFormatBlobs flips a bit in each byte of the two blobs that describe a
// repository. A failed open reports that the blob may be damaged or that another
// repository may be there, and never only a wrong password, an interrupted change of it,
// or unreachable storage.
func TestFlippedFormatBlobs(t *testing.T) {
	s := newSite(t)
	s.create(t)
	for _, name := range []string{"kopia.repository", "kopia.blobcfg"} {
		file := filepath.Join(s.dir, name+".f")
		whole, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		st, err := os.Stat(file)
		if err != nil {
			t.Fatal(err)
		}
		failed := 0
		for i := range whole {
			flipped := bytes.Clone(whole)
			flipped[i] ^= 1
			if err := errors.Join(os.WriteFile(file, flipped, 0o600), os.Chtimes(file, st.ModTime(), st.ModTime())); err != nil {
				t.Fatal(err)
			}
			r, err := s.open(t, testPassword)
			if err == nil {
				if err := r.Close(t.Context()); err != nil {
					t.Error(err)
				}
				continue // a field that only people read
			}
			failed++
			if text := err.Error(); !strings.Contains(text, name) || !strings.Contains(text, "is damaged") {
				t.Errorf("byte %d (%q) of %s flipped: %v", i, whole[i], name, err)
			}
			if name == "kopia.blobcfg" && strings.Contains(err.Error(), "was interrupted") {
				t.Errorf("byte %d of %s flipped: %v", i, name, err)
			}
		}
		if err := errors.Join(os.WriteFile(file, whole, 0o600), os.Chtimes(file, st.ModTime(), st.ModTime())); err != nil {
			t.Fatal(err)
		}
		if failed < len(whole)/2 {
			t.Errorf("only %d of %d flips of %s were noticed", failed, len(whole), name)
		}
	}
	if _, err := s.open(t, testPassword); err != nil {
		t.Error(err)
	}
}

// wholeBlobs is a storage behind a proxy that drops the header Range.
type wholeBlobs struct {
	blob.Storage
	bytes []byte // of each blob
}

func (s *wholeBlobs) GetBlob(_ context.Context, _ blob.ID, _, length int64, out blob.OutputBuffer) error {
	out.Reset()
	if _, err := out.Write(s.bytes); err != nil {
		return err
	}
	return blob.EnsureLengthExactly(out.Length(), length)
}

// TestIgnoredRangeIsNoDamage: bytes that were not requested say nothing about those that
// were. A blob that is too short is damaged.
func TestIgnoredRangeIsNoDamage(t *testing.T) {
	st := &watched{Storage: &wholeBlobs{bytes: []byte("0123456789")}}
	var out blobBuffer
	err := st.GetBlob(t.Context(), "p1", 4, 3, &out)
	if !errors.Is(err, errRangeIgnored) || isCorrupt(err) || isMissing(err) || !errors.Is(wrapRead(ObjectID{}, err), ErrStorageFailed) {
		t.Errorf("a range of another length: %v", err)
	}
	if err := st.GetBlob(t.Context(), "p1", 4, 30, &out); !isCorrupt(err) {
		t.Errorf("a short blob: %v", err)
	}
}
