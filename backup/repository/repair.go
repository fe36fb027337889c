package repository

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"

	"github.com/kopia/kopia/repo/blob"
	"github.com/kopia/kopia/repo/content"
)

// Repair rebuilds an index from the packs in storage, each of which carries its own
// index. View shows the repository as it would be; nothing is written before Commit. Not
// for concurrent use.
//
// It may run beside writers and maintenance. It skips packs of write sessions that have
// not ended and packs that maintenance emptied. Maintenance deletes nothing while packs
// in no index may be needed; if it runs while Commit flushes, it looks for new manifests,
// as it does for those of a backup.
type Repair struct {
	// DamagedIndexes are index blobs that cannot be decoded. Commit deletes them.
	DamagedIndexes []string
	// Recovered are packs whose contents are in the index again.
	Recovered []UnknownPack
	// Undecodable are packs in no index whose own index cannot be read either.
	Undecodable []UnknownPack

	r       *Repository
	w       *Writer
	view    *Repository
	session *manifestSession
	packs   []blob.Metadata // in storage
	taken   map[string]bool // packs whose index is taken over
	judge   *judge
	dropped time.Time   // deletions up to here are no longer in the index
	search  *packSearch // nil before the first Fetch
	giveUp  map[content.ID]bool
	orphans map[string]bool // packs to reclaim, beside those recorded so far
}

// BeginRepair loads the indexes of all packs that no index knows. Close the result.
func (r *Repository) BeginRepair(ctx context.Context) (*Repair, error) {
	if r.direct == nil {
		return nil, &stateError{kind: ErrReadOnly, text: "a repository behind a Kopia server is repaired at its storage: connect to that"}
	}
	j, unindexed, all, err := r.unindexed(ctx, false)
	if err != nil {
		return nil, err
	}
	unknown, err := j.among(ctx, unindexed)
	if err != nil {
		return nil, err
	}
	for {
		p := &Repair{r: r, packs: all, judge: j, dropped: j.dropped, taken: map[string]bool{}, giveUp: map[content.ID]bool{}, orphans: map[string]bool{}, DamagedIndexes: r.damagedIndexes}
		if err := p.begin(ctx, unknown); err != nil {
			return nil, errors.Join(err, p.Close())
		}
		// The record of emptied packs may be lost too.
		emptied, _, err := p.view.loadOrphans(ctx)
		if err != nil {
			return nil, errors.Join(err, p.Close())
		}
		n := len(unknown)
		unknown = slices.DeleteFunc(unknown, func(u UnknownPack) bool { return emptied[u.Pack] })
		if len(unknown) == n {
			if err := p.checkOurs(ctx); err != nil {
				return nil, errors.Join(err, p.Close())
			}
			return p, nil
		}
		if err := p.Close(); err != nil {
			return nil, err
		}
	}
}

func (p *Repair) begin(ctx context.Context, unknown []UnknownPack) (err error) {
	if p.w, err = p.r.newWriter(ctx, "varve repair"); err != nil {
		return err
	}
	session, ok := p.w.w.(*manifestSession)
	if !ok {
		return fmt.Errorf("repair: Kopia's writer is a %T", p.w.w)
	}
	p.session = session
	m := &manifestRepository{session.DirectRepositoryWriter, session.reader}
	p.view = &Repository{
		log: p.r.log,
		rep: m, direct: m, config: p.r.config, place: p.r.place, cluster: p.r.cluster, view: true,
		release: func() {}, grace: p.r.grace,
	}
	p.view.clocks.now, p.view.clocks.log = p.r.Now, p.r.log
	for _, u := range unknown {
		if u.Reason != "" {
			p.Undecodable = append(p.Undecodable, u)
			continue
		}
		if err := p.take(u); err != nil {
			return err
		}
	}
	session.reader.reset()
	return nil
}

func (p *Repair) take(u UnknownPack) error {
	if _, err := p.w.w.ContentManager().RecoverIndexFromPackBlob(p.w.ctx, blob.ID(u.Pack), u.Bytes, true); err != nil {
		return fmt.Errorf("read the index of pack %s: %w", u.Pack, err)
	}
	p.taken[u.Pack] = true
	p.Recovered = append(p.Recovered, u)
	return nil
}

// checkOurs refuses another program's repository, which is recognised only once its
// manifests are found.
func (p *Repair) checkOurs(ctx context.Context) error {
	all, err := p.view.findManifests(ctx, nil)
	if err != nil {
		return fmt.Errorf("list manifests: %w", err)
	}
	if len(all) > 0 && !slices.ContainsFunc(all, isOurs) {
		return &stateError{kind: ErrReadOnly, text: fmt.Sprintf(
			"the repository in %s was not made by varve: repair it with 'kopia --dangerous-commands=enabled index recover'", p.r.place)}
	}
	return nil
}

// View is the repository as it is after the repair. It is read-only, and ends with
// the Repair.
func (p *Repair) View() *Repository { return p.view }

// Writer is the session that Commit flushes.
func (p *Repair) Writer() *Writer { return p.w }

// GiveUp accepts that unreadable manifests, and packs whose own index is unreadable, are
// lost: the first leave the index, maintenance reclaims the second.
func (p *Repair) GiveUp(unreadable []UnreadableManifests, packs []UnknownPack) {
	for _, u := range unreadable {
		p.giveUp[u.id] = true
	}
	for _, u := range packs {
		p.orphans[u.Pack] = true
	}
}

// Commit writes the rebuilt index, deletes index blobs that cannot be decoded, and
// restores the repository's settings if they are lost.
func (p *Repair) Commit(ctx context.Context) error {
	cm := p.w.w.ContentManager()
	for _, id := range slices.SortedFunc(maps.Keys(p.giveUp), func(a, b content.ID) int { return strings.Compare(a.String(), b.String()) }) {
		if err := cm.DeleteContent(p.w.ctx, id); err != nil && !errors.Is(err, content.ErrContentNotFound) {
			return fmt.Errorf("give up content %v: %w", id, explainWrite(err))
		}
	}
	if len(p.orphans) > 0 {
		noted, notes, err := p.view.loadOrphans(ctx)
		if err != nil {
			return err
		}
		maps.Copy(noted, p.orphans)
		if err := p.w.saveOrphans(ctx, noted, notes); err != nil {
			return err
		}
	}
	if err := p.w.Flush(ctx); err != nil {
		return err
	}
	for _, id := range p.DamagedIndexes {
		if err := p.w.w.BlobStorage().DeleteBlob(p.w.ctx, blob.ID(id)); err != nil && !errors.Is(err, blob.ErrBlobNotFound) {
			return fmt.Errorf("delete the damaged index blob %s: %w", id, explainWrite(err))
		}
		p.r.log.InfoContext(ctx, "deleted an index blob that could not be decoded", "blob", id)
	}
	if err := p.r.Refresh(ctx); err != nil {
		return err
	}
	return p.r.restoreSettings(ctx, p.w)
}

// Close ends the repair. Uncommitted changes are dropped.
func (p *Repair) Close() error {
	if p.w == nil {
		return nil
	}
	return p.w.Close()
}
