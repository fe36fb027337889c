package repository

import (
	"context"
	"encoding/json"
	"errors"

	"github.com/kopia/kopia/snapshot"
)

// DamagedSnapshot is a snapshot whose tree cannot be walked completely.
type DamagedSnapshot struct {
	ManifestID string
	Source     Source
	Incomplete bool // held by a running backup, or by one that was killed
	Err        error
}

// isDamage distinguishes data that is missing or does not decode, which no retry brings
// back, from unreachable storage, which ends the run before anything is deleted.
func isDamage(err error) bool {
	var syntax *json.SyntaxError
	var unmarshal *json.UnmarshalTypeError
	return isMissing(err) || isCorrupt(err) || errors.Is(err, ErrContentMissing) || errors.Is(err, ErrContentCorrupt) ||
		errors.Is(err, errBadIndex) || errors.As(err, &syntax) || errors.As(err, &unmarshal)
}

func damaged(man *snapshot.Manifest, err error) DamagedSnapshot {
	return DamagedSnapshot{
		ManifestID: string(man.ID),
		Source:     Source{User: man.Source.UserName, Host: man.Source.Host, Path: man.Source.Path},
		Incomplete: man.IncompleteReason != "",
		Err:        err,
	}
}

// damagedSnapshots names every snapshot that reaches an unreadable index: marking visits
// a shared index once, so it meets the damage in one of them only. Nothing is read if
// nothing is damaged. Directories are followed to the files of the root, which is all
// that a recovery point has.
func (m *marker) damagedSnapshots(ctx context.Context) []DamagedSnapshot {
	if len(m.failed) == 0 {
		return nil
	}
	out := m.failed
	known := map[string]bool{}
	for _, d := range out {
		known[d.ManifestID] = true
	}
	memo := map[ObjectID]error{}
	for id, man := range m.seen {
		if known[string(id)] || man.RootEntry == nil {
			continue
		}
		objects := []ObjectID{man.RootEntry.ObjectID}
		if man.RootEntry.Type == snapshot.EntryTypeDirectory {
			files, err := m.w.r.ReadDirectory(ctx, man.RootEntry.ObjectID)
			if err != nil {
				continue // found and named by the walk
			}
			for _, f := range files {
				objects = append(objects, f.Object)
			}
		}
		for _, oid := range objects {
			if err := m.taint(ctx, oid, memo); err != nil {
				out = append(out, damaged(man, err))
				break
			}
		}
	}
	return out
}

// taint returns the error of the first unreadable index below an object.
func (m *marker) taint(ctx context.Context, oid ObjectID, memo map[ObjectID]error) error {
	index, indirect := oid.IndexObjectID()
	if !indirect {
		return nil
	}
	if err := m.bad[oid]; err != nil {
		return err
	}
	pieces := []ObjectID{index}
	if list, cutUp := index.IndexObjectID(); cutUp {
		p, err := m.w.ReadObject(ctx, list)
		if err != nil {
			return err
		}
		pieces, _ = m.decode(p)
	}
	for _, piece := range pieces {
		if err := m.bad[piece]; err != nil && !errors.Is(err, errBadIndex) {
			return err
		}
		if !m.inner[piece] {
			continue
		}
		err, done := memo[piece]
		if !done {
			err = m.taintPiece(ctx, piece, memo)
			memo[piece] = err
		}
		if err != nil {
			return err
		}
	}
	return nil
}

func (m *marker) taintPiece(ctx context.Context, piece ObjectID, memo map[ObjectID]error) error {
	p, err := m.w.ReadObject(ctx, piece)
	if err != nil {
		return err
	}
	objects, _ := m.decode(p)
	for _, o := range objects {
		if err := m.taint(ctx, o, memo); err != nil {
			return err
		}
	}
	return nil
}
