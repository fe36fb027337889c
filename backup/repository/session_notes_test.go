package repository

import (
	"bytes"
	"errors"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/kopia/kopia/repo/blob"
	"github.com/kopia/kopia/repo/content"
)

// writeUnflushed writes more blocks than fit a pack and flushes nothing.
func writeUnflushed(t *testing.T, r *Repository) (*Writer, []ObjectID) {
	t.Helper()
	w, err := r.NewWriter(t.Context(), "test")
	if err != nil {
		t.Fatal(err)
	}
	var ids []ObjectID
	rng := rand.NewChaCha8([32]byte{9})
	block := make([]byte, 1<<20)
	for range 24 {
		_, _ = rng.Read(block) // never fails
		oid, err := w.WriteBlock(t.Context(), block)
		if err != nil {
			t.Fatal(err)
		}
		ids = append(ids, oid)
	}
	return w, ids
}

// found counts the contents that a repository knows.
func found(t *testing.T, r *Repository, ids []ObjectID) (n int) {
	t.Helper()
	for _, oid := range ids {
		st, err := r.StateOf(t.Context(), oid)
		if err != nil {
			t.Fatal(err)
		}
		if st.Found && !st.Deleted {
			n++
		}
	}
	return n
}

func sessionsOf(t *testing.T, r *Repository) int {
	t.Helper()
	w, err := r.NewWriter(t.Context(), "test")
	if err != nil {
		t.Fatal(err)
	}
	defer w.Close()
	all, err := w.w.ContentManager().ListActiveSessions(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	return len(all)
}

func notesIn(t *testing.T, s site) []string {
	t.Helper()
	notes, err := filepath.Glob(filepath.Join(notesDir(s.config), "s*"))
	if err != nil {
		t.Fatal(err)
	}
	return notes
}

// TestRecoverDead finds the packs of a session whose process has ended, and leaves those of
// a live one, of another boot, and of a committed session.
func TestRecoverDead(t *testing.T) {
	s := newSite(t)
	s.create(t)
	writer, other := s.mustOpen(t), s.mustOpen(t)
	_, ids := writeUnflushed(t, writer)
	recover := func() *Recovered {
		t.Helper()
		rep, err := other.RecoverDead(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		return rep
	}
	if rep := recover(); other.HasDead() || rep.Sessions != 0 || sessionsOf(t, other) != 1 {
		t.Fatalf("a living session was taken for dead: %+v", rep)
	}
	notes := notesIn(t, s)
	if len(notes) != 1 {
		t.Fatalf("notes %v", notes)
	}
	text, err := os.ReadFile(notes[0])
	if err != nil {
		t.Fatal(err)
	}
	_, blobs, err := readNote(bytes.NewReader(text))
	pack := slices.IndexFunc(blobs, isPack)
	if err != nil || pack < 0 {
		t.Fatalf("a note without a pack: %q, %v", text, err)
	}
	path, ok, err := other.notes.pathOf(t.Context(), blobs[pack])
	if err != nil || !ok {
		t.Fatalf("no path of %s: %v", blobs[pack], err)
	}
	left, strange := path+".tmp.0011223344556677", filepath.Join(filepath.Dir(path), "strange.f.tmp.0011223344556677")
	for _, name := range []string{left, strange} {
		if err := os.WriteFile(name, make([]byte, 1000), 0o600); err != nil {
			t.Fatal(err)
		}
	}

	writer.notes.close() // as the kernel does when a process is killed
	if err := os.WriteFile(notes[0], bytes.Replace(text, []byte(other.notes.boot), []byte("another-boot"), 1), 0o600); err != nil {
		t.Fatal(err)
	}
	if rep := recover(); other.HasDead() || rep.Sessions != 0 {
		t.Fatalf("a session of another boot was taken for dead: %+v", rep)
	}
	if err := os.WriteFile(notes[0], text, 0o600); err != nil {
		t.Fatal(err)
	}
	if n := found(t, other, ids); n != 0 {
		t.Fatalf("%d contents are known before", n)
	}
	if !other.HasDead() {
		t.Error("the dead session is not seen")
	}
	rep := recover()
	if rep.Sessions != 1 || rep.Packs.Count == 0 || rep.Temporary.Count != 1 {
		t.Errorf("recovered %+v", rep)
	}
	n := found(t, other, ids)
	if n < 15 { // of the 20 MiB of a pack
		t.Errorf("%d contents were recovered", n)
	}
	for _, oid := range ids[:n] {
		if p, err := s.mustOpen(t).ReadObject(t.Context(), oid); err != nil || len(p) != 1<<20 {
			t.Fatalf("%d bytes of %v: %v", len(p), oid, err)
		}
	}
	if _, err := os.Stat(left); !os.IsNotExist(err) {
		t.Errorf("the half-written file of a dead session is there: %v", err)
	}
	if _, err := os.Stat(strange); err != nil {
		t.Errorf("the half-written file of another writer is gone: %v", err)
	}
	if notes := notesIn(t, s); len(notes) > 0 || sessionsOf(t, other) != 0 || other.HasDead() {
		t.Errorf("%d sessions and notes %v are left", sessionsOf(t, other), notes)
	}
}

// TestSessionNotesEnd: a committed session leaves no note; one closed without a flush is
// dead at once, even to its own process.
func TestSessionNotesEnd(t *testing.T) {
	s := newSite(t)
	s.create(t)
	r := s.mustOpen(t)
	if err := tryWrite(t, r); err != nil {
		t.Fatal(err)
	}
	if notes := notesIn(t, s); len(notes) > 0 {
		t.Errorf("notes of a committed session: %v", notes)
	}
	w, ids := writeUnflushed(t, r)
	if r.HasDead() {
		t.Error("a session under way is dead")
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	rep, err := r.RecoverDead(t.Context())
	if err != nil || rep.Sessions != 1 || found(t, r, ids) == 0 {
		t.Errorf("recovered %+v, %v", rep, err)
	}
}

// TestRecoverNoDeletions: a deletion that a dead session did not flush is not applied. A
// backup may have reused the content since.
func TestRecoverNoDeletions(t *testing.T) {
	s := newSite(t)
	s.create(t)
	r := s.mustOpen(t)
	w, err := r.NewWriter(t.Context(), "test")
	if err != nil {
		t.Fatal(err)
	}
	kept, err := w.WriteBlock(t.Context(), []byte("is to stay"))
	if err = errors.Join(err, w.Flush(t.Context()), w.ForgetContent(t.Context(), kept)); err != nil {
		t.Fatal(err)
	}
	rng := rand.NewChaCha8([32]byte{10})
	block := make([]byte, 1<<20)
	for range 24 {
		_, _ = rng.Read(block) // never fails
		if _, err := w.WriteBlock(t.Context(), block); err != nil {
			t.Fatal(err)
		}
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	rep, err := r.RecoverDead(t.Context())
	if err != nil || rep.Sessions != 1 || rep.Packs.Count != 0 {
		t.Errorf("recovered %+v, %v", rep, err)
	}
	if found(t, s.mustOpen(t), []ObjectID{kept}) != 1 {
		t.Error("the content was deleted")
	}
}

func FuzzSessionNote(f *testing.F) {
	f.Add("varve session 1 boot\nq0123456789abcdef-s0123456789abcdef92\n")
	f.Add("varve session 2 boot\n")
	f.Add("varve session 1 boot\n../../etc/passwd\np1")
	f.Fuzz(func(t *testing.T, text string) {
		boot, blobs, err := readNote(strings.NewReader(text))
		if err != nil {
			return
		}
		if boot == "" {
			t.Error("no boot")
		}
		for _, id := range blobs {
			if strings.ContainsAny(string(id), "/.\x00\n") || len(id) > 500 {
				t.Errorf("blob %q", id)
			}
		}
	})
}

// TestBlobNames compares the names in a note with Kopia's.
func TestBlobNames(t *testing.T) {
	s := newSite(t)
	s.create(t)
	r := s.mustOpen(t)
	writeUnflushed(t, r)
	if err := tryWrite(t, s.mustOpen(t)); err != nil {
		t.Fatal(err)
	}
	n := 0
	err := r.direct.BlobReader().ListBlobs(t.Context(), "", func(m blob.Metadata) error {
		if session := content.SessionIDFromBlobID(m.BlobID); session != "" {
			n++
			if !blobName.MatchString(string(m.BlobID)) || strings.HasPrefix(string(m.BlobID), "s") && !sessionName.MatchString(string(session)) {
				t.Errorf("blob %s of session %s is not noted", m.BlobID, session)
			}
		}
		return nil
	})
	if err != nil || n < 3 {
		t.Errorf("%d blobs of sessions: %v", n, err)
	}
}
