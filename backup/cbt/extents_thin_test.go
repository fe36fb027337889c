package cbt_test

import (
	"context"
	"errors"
	"fmt"
	"os"
	"slices"
	"strings"
	"testing"

	"github.com/varve-io/varve/backup/cbt"
	"github.com/varve-io/varve/backup/cbt/cbttest"
)

func thinList(text string, size int64) ([]cbt.Extent, cbt.Report, error) {
	var got []cbt.Extent
	src := &cbt.ThinDelta{Base: "b", Target: "t", List: strings.NewReader(text)}
	rep, err := src.Changes(context.Background(), cbt.Request{Size: size, Base: &cbt.Base{ChangeID: "b", Size: size}}, func(e cbt.Extent) error {
		got = append(got, e)
		return nil
	})
	return got, rep, err
}

// TestThinDelta reads what thin_delta 0.9.0 printed of a pool's metadata, which thin_restore
// had made; no thin pool was involved.
func TestThinDelta(t *testing.T) {
	t.Parallel()
	const block = 64 << 10
	want := []cbt.Extent{{Offset: 2 * block, Length: block}, {Offset: 8 * block, Length: block}, {Offset: 24 * block, Length: 2 * block}}
	for _, file := range []string{"testdata/thin_delta.xml", "testdata/thin_delta_verbose.xml"} {
		text, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		got, rep, err := thinList(string(text), 32*block)
		if err != nil || !slices.Equal(got, want) || rep.Reported != 4*block || rep.TargetChangeID != "t" || !rep.Exact || rep.Allocated {
			t.Errorf("%s: %v, %+v, %v", file, got, rep, err)
		}
		if got, _, err = thinList(string(text), 25*block+100); err != nil || got[2] != (cbt.Extent{Offset: 24 * block, Length: block + 100}) {
			t.Errorf("%s, of a disk that ends within a block: %v, %v", file, got, err)
		}
		if _, _, err = thinList(string(text), 10*block); !errors.Is(err, cbt.ErrOutOfRange) {
			t.Errorf("%s, of a smaller disk: %v", file, err)
		}
		for cut := range strings.LastIndex(string(text), "</superblock>") {
			if _, _, err := thinList(string(text[:cut]), 32*block); !errors.Is(err, cbt.ErrTruncated) {
				t.Fatalf("%s, cut after %d bytes: %v", file, cut, err)
			}
		}
	}
}

func TestThinDeltaRefused(t *testing.T) {
	t.Parallel()
	for name, text := range map[string]string{
		"no size":       `<superblock><diff left="1" right="2"></diff></superblock>`,
		"a huge block":  `<superblock data_block_size="99999999"><diff left="1" right="2"></diff></superblock>`,
		"no length":     `<superblock data_block_size="8"><diff><different begin="1"/></diff></superblock>`,
		"outside":       `<superblock data_block_size="8"><different begin="1" length="1"/><diff></diff></superblock>`,
		"two":           `<superblock data_block_size="8"><diff></diff><diff></diff></superblock>`,
		"another thing": `<superblock data_block_size="8"><device/></superblock>`,
		"no XML":        `[{"offset":0}]`,
	} {
		if _, _, err := thinList(text, 1<<20); !errors.Is(err, cbt.ErrFormat) && !errors.Is(err, cbt.ErrTruncated) {
			t.Errorf("%s: %v", name, err)
		}
	}
	if _, err := (&cbt.ThinDelta{Target: "t"}).Changes(t.Context(), cbt.Request{}, nil); !errors.Is(err, cbt.ErrFormat) {
		t.Errorf("without a base: %v", err)
	}
}

func TestThinDeltaConforms(t *testing.T) {
	t.Parallel()
	const grain = 4096
	leftOut := map[string]string{
		"NegativeOffset": "a number without a sign", "NegativeLength": "a number without a sign", "ZeroExtents": "what is not mapped is read", "WrongVolume": "the list names no volume",
		"WrongSizeLarger": "the list names no size", "WrongSizeSmaller": "the list names no size",
	}
	for name := range cbttest.Cases {
		switch {
		case name == "Unaligned" || name == "Many":
			leftOut[name] = "a list of blocks"
		case strings.HasPrefix(name, "FullAllocated"), strings.HasPrefix(name, "FullNothing"):
			leftOut[name] = "a list of differences only"
		case strings.HasPrefix(name, "Broken"), strings.HasPrefix(name, "EndsEarly"), name == "Straddling", name == "Repeating":
			leftOut[name] = "the list is given once"
		}
	}
	cbttest.All(t, leftOut, func(_ *testing.T, l cbttest.Listing) cbt.Source {
		var text strings.Builder
		text.WriteString(`<superblock uuid="" time="2" data_block_size="8"><diff left="1" right="2">`)
		for i, e := range l.Extents {
			if i == l.CutAfter {
				break
			}
			kind := []string{"different", "left_only", "right_only"}[i%3]
			first, end := e.Offset/grain, (uint64(e.Offset)+uint64(e.Length)+grain-1)/grain
			if e.Length == 0 {
				end = uint64(first)
			}
			fmt.Fprintf(&text, `<same begin="0" length="0"/><%s begin="%d" length="%d"/>`, kind, first, end-uint64(first))
		}
		if l.CutAfter < 0 {
			text.WriteString(`</diff></superblock>`)
		}
		return cbttest.Named(&cbt.ThinDelta{Base: l.Base, Target: l.Target, List: strings.NewReader(text.String())}, l.Volume)
	})
}

func FuzzThinDelta(f *testing.F) {
	for _, file := range []string{"testdata/thin_delta.xml", "testdata/thin_delta_verbose.xml"} {
		text, err := os.ReadFile(file)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(string(text), int64(2<<20))
	}
	f.Add(`<superblock data_block_size="1"><diff><different begin="18446744073709551615" length="1"/></diff></superblock>`, int64(4096))
	f.Fuzz(func(t *testing.T, text string, size int64) {
		if size < 0 {
			return
		}
		got, rep, err := thinList(text, size)
		if err != nil {
			return
		}
		sum := int64(0)
		for _, e := range got {
			if e.Offset < 0 || e.Length <= 0 || e.End() > size {
				t.Fatalf("extent %v of a disk of %d bytes", e, size)
			}
			sum += e.Length
		}
		if sum != rep.Reported {
			t.Fatalf("reported %d, emitted %d", rep.Reported, sum)
		}
	})
}
