package cbttest

import (
	"bytes"
	"testing"

	"github.com/varve-io/varve/backup/cbt"
)

// Engine makes a recovery point of before, known to the storage by the base's change ID and
// volume handle, and on it one of after with the source, including the spot check. It returns
// what the second one reads back as, or the error of its backup.
type Engine func(t *testing.T, base cbt.Base, before, after []byte, source cbt.Source) ([]byte, error)

// AllEngine tests source and engine together: reported changes are backed up, and unreported
// ones are found.
func AllEngine(t *testing.T, engine Engine, newSource Maker) {
	t.Run("Told", func(t *testing.T) {
		w := engineWorld()

		got, err := engine(t, *w.request.Base, w.base, w.target, newSource(t, w.listing))
		if err != nil {
			t.Fatal(err)
		}

		if !bytes.Equal(got, w.target) {
			t.Error("the point reads back as something else than the disk")
		}
	})

	for name, silence := range map[string]func(*Listing){
		"SilentAboutAll":     func(l *Listing) { l.Extents = nil },
		"SilentAboutOne":     func(l *Listing) { l.Extents = l.Extents[:1] },
		"SilentAboutPart":    func(l *Listing) { l.Extents[2].Length /= 2 },
		"SilentByTruncation": func(l *Listing) { l.Extents = l.Extents[:2] },
	} {
		t.Run(name, func(t *testing.T) {
			w := engineWorld()
			silence(&w.listing)

			if _, err := engine(t, *w.request.Base, w.base, w.target, newSource(t, w.listing)); err == nil {
				t.Error("a change was kept quiet about, and nothing spoke")
			} else {
				t.Log(err)
			}
		})
	}
}

// engineWorld is small enough that the least sample of a spot check covers it.
func engineWorld() world {
	return newWorld(diskSize, diskSize,
		cbt.Extent{Offset: 3 * grain, Length: grain},
		cbt.Extent{Offset: 40 * grain, Length: 2 * grain},
		cbt.Extent{Offset: 100 * grain, Length: 64 * grain})
}
