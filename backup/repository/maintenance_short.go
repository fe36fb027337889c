package repository

import (
	"cmp"
	"slices"

	"github.com/kopia/kopia/repo/content"
)

// shortShare is the share of the largest pack size, in percent, below which a
// pack may be rewritten (kopia repo/maintenance/content_rewrite.go).
const shortShare = 60

// shortPack is a pack with little in use.
type shortPack struct {
	name     string
	live     int64 // bytes of contents that are not deleted
	stored   int64 // bytes of the blob
	contents []content.Info
}

const (
	// wasteShare is the share of a pack, in percent, that may be garbage.
	wasteShare = 40
	// mergeRatio bounds the size of a pack that is merged with the smaller ones, as a
	// multiple of their sum.
	mergeRatio = 4
	// A pack holds more than its contents: a header and its own index (kopia
	// repo/content/content_manager.go, preparePackDataContent).
	packOverhead, packOverheadEach = 4 << 10, 80 // bytes
)

func (p *shortPack) wasteful() bool {
	waste := p.stored - p.live - packOverhead - packOverheadEach*int64(len(p.contents))
	return waste*100 > p.stored*wasteShare
}

// rewritable chooses which short packs of a kind to rewrite: those with much garbage, and
// small ones together. Kopia takes all as soon as there are two. Each run leaves a few
// small packs itself, so in a repository of moderate size every run rewrites all indexes.
// Here a pack is merged once the smaller ones add up to a quarter of it: the remaining
// packs grow at least fivefold from one to the next. So they stay few, and a content is
// moved as often as its pack has grown, not as often as maintenance ran.
func rewritable(packs []shortPack) []shortPack {
	var out, whole []shortPack
	for _, p := range packs {
		if p.wasteful() {
			out = append(out, p)
		} else {
			whole = append(whole, p)
		}
	}
	slices.SortFunc(whole, func(a, b shortPack) int { return cmp.Compare(a.live, b.live) })
	merge, smaller := 0, int64(0)
	for i, p := range whole {
		if i > 0 && p.live <= mergeRatio*smaller {
			merge = i + 1
		}
		smaller += p.live
	}
	return append(out, whole[:merge]...)
}
