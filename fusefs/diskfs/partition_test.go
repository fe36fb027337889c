//go:build linux

package diskfs_test

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"testing"

	"github.com/varve-io/varve/fusefs/diskfs"
	"github.com/varve-io/varve/fusefs/diskfs/diskfstest"
)

// partitioned makes an image with the partitions of an sfdisk script, and gives what
// sfdisk says of them afterwards.
func partitioned(t testing.TB, size int64, sector int, script string) (image, dump string) {
	t.Helper()
	diskfstest.NeedTool(t, "sfdisk")
	image = diskfstest.NewImage(t, size)
	target := image
	if sector != 512 {
		diskfstest.NeedRoot(t)
		target = strings.TrimSpace(diskfstest.Run(t, "losetup", "--find", "--show", "--sector-size", strconv.Itoa(sector), image))
		defer diskfstest.Run(t, "losetup", "--detach", target)
	}
	cmd := exec.Command("sfdisk", "-q", "--no-reread", "--no-tell-kernel", target)
	cmd.Stdin = strings.NewReader(script)
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("sfdisk: %v\n%s", err, out)
	}
	return image, strings.ReplaceAll(diskfstest.Run(t, "sfdisk", "-J", target), target+"p", target)
}

const (
	gptScript = "label: gpt\nsize=2MiB, name=\"first äö\"\nsize=3MiB, type=C12A7328-F81F-11D2-BA4B-00A0C93EC93B\nstart=10MiB, size=1MiB, name=third\n"
	mbrScript = "label: dos\nsize=2MiB, type=83, bootable\nsize=8MiB, type=5\nsize=2MiB, type=c\nsize=1MiB, type=83\nsize=2MiB, type=82\nsize=1MiB, type=8e\n"
)

// TestPartitions compares tables with what sfdisk says of them.
func TestPartitions(t *testing.T) {
	for _, c := range []struct {
		name, scheme, script string
		sector               int
	}{
		{"gpt", "gpt", gptScript, 512},
		{"gpt-4k", "gpt", gptScript, 4096},
		{"mbr", "mbr", mbrScript, 512},
		{"gpt-empty", "gpt", "label: gpt\n", 512},
	} {
		t.Run(c.name, func(t *testing.T) {
			image, dump := partitioned(t, 32<<20, c.sector, c.script)
			r, size := diskfstest.Open(t, image)
			table, err := diskfs.Partitions(r, size)
			if err != nil {
				t.Fatal(err)
			}
			if table.Scheme != c.scheme || table.SectorSize != c.sector || table.FromBackup {
				t.Errorf("table %+v", table)
			}
			var want struct {
				PartitionTable struct {
					Device     string
					Partitions []struct {
						Node             string
						Start, Size      int64
						Type, UUID, Name string
					}
				}
			}
			if err := json.Unmarshal([]byte(dump), &want); err != nil {
				t.Fatal(err)
			}
			var got, expected []string
			for _, p := range table.Partitions {
				got = append(got, fmt.Sprintf("%d %d+%d %s %s %q", p.Number, p.Start, p.Length, p.Type, p.UUID, p.Name))
			}
			for _, p := range want.PartitionTable.Partitions {
				if p.Type == "5" {
					continue // the extended partition itself is no volume
				}
				if c.scheme == "mbr" {
					p.Type = fmt.Sprintf("0x%02s", p.Type)
				}
				expected = append(expected, fmt.Sprintf("%s %d+%d %s %s %q", strings.TrimPrefix(p.Node, want.PartitionTable.Device),
					p.Start*int64(c.sector), p.Size*int64(c.sector), strings.ToLower(p.Type), strings.ToLower(p.UUID), p.Name))
			}
			if strings.Join(got, "\n") != strings.Join(expected, "\n") {
				t.Errorf("partitions\n%s\nwant\n%s", strings.Join(got, "\n"), strings.Join(expected, "\n"))
			}
		})
	}
}

// TestDamagedGPT reads the backup where the primary is damaged, and refuses where both are.
func TestDamagedGPT(t *testing.T) {
	image, _ := partitioned(t, 32<<20, 512, gptScript)
	b, err := os.ReadFile(image)
	if err != nil {
		t.Fatal(err)
	}
	open := func() (*diskfs.Table, error) { return diskfs.Partitions(bytes.NewReader(b), int64(len(b))) }
	b[1024+40]++ // the first entry
	table, err := open()
	if err != nil || !table.FromBackup || len(table.Partitions) != 3 || !strings.Contains(table.Reason, "checksum") {
		t.Errorf("damaged entries: %+v, %v", table, err)
	}
	clear(b[512:1024])
	if table, err = open(); err != nil || !table.FromBackup || len(table.Partitions) != 3 {
		t.Errorf("no primary header: %+v, %v", table, err)
	}
	b[len(b)-512+30]++
	if table, err = open(); !errors.Is(err, diskfs.ErrCorrupt) {
		t.Errorf("both damaged: %+v, %v", table, err)
	}
	// Without protective MBR the backup is a leftover.
	clear(b[:512])
	b[len(b)-512+30]--
	if table, err = open(); !errors.Is(err, diskfs.ErrNotRecognised) {
		t.Errorf("no MBR: %+v, %v", table, err)
	}
}

// TestEndlessLogical refuses chains of logical partitions that come back.
func TestEndlessLogical(t *testing.T) {
	b := make([]byte, 1<<20)
	entry := func(sector, i int, typ byte, start, length uint32) {
		e := b[sector*512+446+16*i:]
		e[4] = typ
		e[8], e[9] = byte(start), byte(start>>8)
		e[12], e[13] = byte(length), byte(length>>8)
		b[sector*512+510], b[sector*512+511] = 0x55, 0xaa
	}
	entry(0, 0, 5, 64, 1024)
	entry(64, 0, 0x83, 1, 10)
	entry(64, 1, 5, 100, 50)
	entry(164, 0, 0x83, 1, 10)
	entry(164, 1, 5, 0, 50) // back to the first
	if table, err := diskfs.Partitions(bytes.NewReader(b), int64(len(b))); !errors.Is(err, diskfs.ErrCorrupt) {
		t.Errorf("%+v, %v", table, err)
	}
}

// FuzzPartitions: partitions of any bytes lie within the disk.
func FuzzPartitions(f *testing.F) {
	if _, err := exec.LookPath("sfdisk"); err != nil {
		f.Skipf("needs sfdisk: %v", err)
	}
	// Inputs are short: the fuzzer makes each that is of interest as small as it can, which
	// takes minutes for the 16 KiB of a table of 128 entries.
	for _, script := range []string{strings.Replace(gptScript, "\n", "\ntable-length: 4\n", 1), mbrScript} {
		image, _ := partitioned(f, 32<<20, 512, script)
		b, err := os.ReadFile(image)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(b[:1536], b[len(b)-1024:], int64(len(b)))
	}
	f.Fuzz(func(t *testing.T, head, tail []byte, size int64) {
		if size < 0 || size > 1<<40 || len(head) > 8<<10 || len(tail) > 8<<10 {
			return
		}
		r := &endsReader{head: head, tail: tail, size: size}
		_, _ = diskfs.Probe(r, size)
		table, err := diskfs.Partitions(r, size)
		if err != nil {
			return
		}
		for _, p := range table.Partitions {
			if p.Start <= 0 || p.Length <= 0 || p.Length > size-p.Start {
				t.Errorf("partition %+v on a disk of %d", p, size)
			}
		}
	})
}

// endsReader is a disk with a start, an end, and zeroes between.
type endsReader struct {
	head, tail []byte
	size       int64
}

func (e *endsReader) ReadAt(p []byte, off int64) (int, error) {
	clear(p)
	if off < int64(len(e.head)) {
		copy(p, e.head[off:])
	}
	if start := e.size - int64(len(e.tail)); off+int64(len(p)) > start {
		if off >= start {
			copy(p, e.tail[off-start:])
		} else {
			copy(p[start-off:], e.tail)
		}
	}
	return len(p), nil
}
