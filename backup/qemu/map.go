package qemu

import (
	"context"
	"encoding/json"
	"fmt"
)

// Run is a range of a disk whose bytes lie, as they are, in the image file itself.
type Run struct {
	Start, Length int64 // on the disk, in bytes
	Offset        int64 // of the first byte in the file
}

// Map returns, in order, the runs of a qcow2 within length bytes from start. What is compressed, encrypted or
// only in a backing file is in none. The image must not have a data file (Info.DataFile): offsets would be that file's.
func Map(ctx context.Context, path string, start, length int64) ([]Run, error) {
	out, err := Host{}.runAt(ctx, path, "map", "--output=json", "-f", QCOW2,
		fmt.Sprintf("--start-offset=%d", start), fmt.Sprintf("--max-length=%d", length), "--", absolute(path))
	if err != nil {
		return nil, err
	}
	runs, err := parseMap(out, start, length)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	return runs, nil
}

// parseMap reads the answer of "qemu-img map --output=json" about length bytes from start.
func parseMap(text []byte, start, length int64) ([]Run, error) {
	var raw []struct {
		Start      int64  `json:"start"`
		Length     int64  `json:"length"`
		Depth      int    `json:"depth"`
		Zero       bool   `json:"zero"`
		Data       bool   `json:"data"`
		Compressed bool   `json:"compressed"`
		Offset     *int64 `json:"offset"`
	}
	if err := json.Unmarshal(text, &raw); err != nil {
		return nil, fmt.Errorf("read the answer of qemu-img: %w", err)
	}
	var runs []Run
	at := start
	for _, e := range raw {
		if e.Start < at || e.Length <= 0 || e.Length > start+length-e.Start {
			return nil, fmt.Errorf("read the answer of qemu-img: %d bytes at %d are not within those asked for, or not in order", e.Length, e.Start)
		}
		at = e.Start + e.Length
		if e.Data && !e.Zero && !e.Compressed && e.Depth == 0 && e.Offset != nil && *e.Offset > 0 {
			runs = append(runs, Run{e.Start, e.Length, *e.Offset})
		}
	}
	return runs, nil
}
