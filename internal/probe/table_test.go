//go:build linux

package probe_test

import (
	"bytes"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"

	"github.com/varve-io/varve/internal/probe"
)

// newImage makes a sparse file.
func newImage(t testing.TB, size int64) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "image")
	f, err := os.Create(path)
	if err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(f.Truncate(size), f.Close()); err != nil {
		t.Fatal(err)
	}
	return path
}

// run runs a tool, and skips the test where it is missing.
func run(t testing.TB, stdin, name string, args ...string) string {
	t.Helper()
	if _, err := exec.LookPath(name); err != nil {
		t.Skipf("needs %s: %v", name, err)
	}
	cmd := exec.Command(name, args...)
	cmd.Stdin = strings.NewReader(stdin)
	out, err := cmd.CombinedOutput()
	if err != nil {
		t.Fatalf("%s %s: %v\n%s", name, strings.Join(args, " "), err, out)
	}
	return string(out)
}

// partitioned makes an image with the partitions of an sfdisk script, and gives what
// sfdisk says of them afterwards.
func partitioned(t testing.TB, size int64, sector int, script string) (image []byte, dump string) {
	t.Helper()
	path := newImage(t, size)
	target := path
	if sector != 512 {
		if os.Geteuid() != 0 {
			t.Skip("needs root for a loop device with larger sectors")
		}
		target = strings.TrimSpace(run(t, "", "losetup", "--find", "--show", "--sector-size", strconv.Itoa(sector), path))
		defer run(t, "", "losetup", "--detach", target)
	}
	run(t, script, "sfdisk", "-q", "--no-reread", "--no-tell-kernel", target)
	dump = strings.ReplaceAll(run(t, "", "sfdisk", "-J", target), target+"p", target)
	image, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return image, dump
}

func partitions(b []byte) (*probe.Table, error) {
	return probe.Partitions(bytes.NewReader(b), int64(len(b)))
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
			table, err := partitions(image)
			if err != nil {
				t.Fatal(err)
			}
			if table.Scheme != c.scheme || table.SectorSize != c.sector || table.FromBackup {
				t.Errorf("table %+v", table)
			}
			var want struct {
				PartitionTable struct {
					Device, ID string
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
			if id := strings.ToLower(strings.TrimPrefix(want.PartitionTable.ID, "0x")); table.ID != id {
				t.Errorf("ID %s, want %s", table.ID, id)
			}
			if strings.Join(got, "\n") != strings.Join(expected, "\n") {
				t.Errorf("partitions\n%s\nwant\n%s", strings.Join(got, "\n"), strings.Join(expected, "\n"))
			}
		})
	}
}

// TestDamagedGPT reads the backup where the primary is damaged, and refuses where both are.
func TestDamagedGPT(t *testing.T) {
	b, _ := partitioned(t, 32<<20, 512, gptScript)
	open := func() (*probe.Table, error) { return partitions(b) }
	var bad *probe.TableError
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
	if table, err = open(); !errors.As(err, &bad) {
		t.Errorf("both damaged: %+v, %v", table, err)
	}
	// Without protective MBR the backup is a leftover.
	clear(b[:512])
	b[len(b)-512+30]--
	if table, err = open(); !errors.Is(err, probe.ErrNotRecognised) {
		t.Errorf("no MBR: %+v, %v", table, err)
	}
}

// mbr puts an entry into a table of an image.
func mbr(b []byte, sector, i int, typ byte, start, length uint32) {
	e := b[sector*512+446+16*i:]
	e[4] = typ
	binary.LittleEndian.PutUint32(e[8:], start)
	binary.LittleEndian.PutUint32(e[12:], length)
	b[sector*512+510], b[sector*512+511] = 0x55, 0xaa
}

// TestBadEntries keeps the good entries of an MBR, and names the bad ones.
func TestBadEntries(t *testing.T) {
	const sectors = 2048 // 1 MiB
	for _, c := range []struct {
		name string
		make func(b []byte)
		good []int
		bad  map[int]string
	}{
		{"over the end", func(b []byte) {
			mbr(b, 0, 0, 0x83, 64, 100)
			mbr(b, 0, 1, 0x83, 2000, 100)
		}, []int{1}, map[int]string{2: "2000 to 2099 of a disk of 2048"}},
		{"at the end", func(b []byte) {
			mbr(b, 0, 0, 0x83, sectors, 100)
			mbr(b, 0, 2, 0x83, 64, 100)
		}, []int{3}, map[int]string{1: "2048 to 2147"}},
		{"far behind the end", func(b []byte) {
			mbr(b, 0, 0, 0x83, 64, 100)
			mbr(b, 0, 1, 0x83, 0xffffffff, 0xffffffff)
		}, []int{1}, map[int]string{2: "4294967295"}},
		{"at sector 0", func(b []byte) {
			mbr(b, 0, 0, 0x83, 0, 100)
			mbr(b, 0, 1, 0x83, 64, 100)
		}, []int{2}, map[int]string{1: "0 to 99"}},
		{"an extended partition behind the end", func(b []byte) {
			mbr(b, 0, 0, 0x83, 64, 100)
			mbr(b, 0, 1, 5, sectors+1, 100)
		}, []int{1}, map[int]string{2: "2049"}},
		{"a chain without an end", func(b []byte) {
			mbr(b, 0, 0, 5, 64, 1024)
			mbr(b, 64, 0, 0x83, 1, 10)
			mbr(b, 64, 1, 5, 100, 50)
			mbr(b, 164, 0, 0x83, 1, 10)
			mbr(b, 164, 1, 5, 0, 50) // back to the first
		}, []int{5, 6}, map[int]string{7: "no end"}},
		{"a link to no table", func(b []byte) {
			mbr(b, 0, 0, 0x83, 1200, 100)
			mbr(b, 0, 1, 5, 64, 1024)
			mbr(b, 64, 0, 0x83, 1, 10)
			mbr(b, 64, 1, 5, 100, 50)
		}, []int{1, 5}, map[int]string{6: "sector 164 holds no table"}},
		{"a link out of the extended partition", func(b []byte) {
			mbr(b, 0, 0, 5, 64, 1024)
			mbr(b, 64, 0, 0x83, 1, 10)
			mbr(b, 64, 1, 5, 1500, 50)
		}, []int{5}, map[int]string{6: "leaves the extended partition"}},
		{"a logical partition over the end", func(b []byte) {
			mbr(b, 0, 0, 5, 64, 1024)
			mbr(b, 64, 0, 0x83, 1, 5000)
			mbr(b, 64, 1, 5, 100, 50)
			mbr(b, 164, 0, 0x83, 1, 10)
		}, []int{6}, map[int]string{5: "65 to 5064"}},
	} {
		t.Run(c.name, func(t *testing.T) {
			b := make([]byte, sectors*512)
			c.make(b)
			table, err := partitions(b)
			if err != nil {
				t.Fatal(err)
			}
			var good []int
			for _, p := range table.Partitions {
				good = append(good, p.Number)
			}
			if !slices.Equal(good, c.good) || len(table.Bad) != len(c.bad) {
				t.Errorf("good %v, bad %+v", good, table.Bad)
			}
			for _, p := range table.Bad {
				if want := c.bad[p.Number]; want == "" || !strings.Contains(p.What, want) {
					t.Errorf("%+v, want %q", p, want)
				}
			}
		})
	}
}

// TestCutGPT keeps the entries of a GPT that lie within an image that is cut short.
func TestCutGPT(t *testing.T) {
	b, _ := partitioned(t, 32<<20, 512, gptScript)
	table, err := partitions(b[:8<<20]) // the third begins at 10 MiB
	if err != nil {
		t.Fatal(err)
	}
	if len(table.Partitions) != 2 || len(table.Bad) != 1 || table.Bad[0].Number != 3 || !strings.Contains(table.Reason, "cut short") {
		t.Errorf("%+v", table)
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
		b, _ := partitioned(f, 32<<20, 512, script)
		f.Add(b[:1536], b[len(b)-1024:], int64(len(b)))
	}
	f.Fuzz(func(t *testing.T, head, tail []byte, size int64) {
		if size < 0 || size > 1<<40 || len(head) > 8<<10 || len(tail) > 8<<10 {
			return
		}
		r := &endsReader{head: head, tail: tail, size: size}
		_, _ = probe.Probe(r, size)
		_, _ = probe.ReadContents(r, size)
		table, err := probe.Partitions(r, size)
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
