package main

import (
	"fmt"
	"os"
	"runtime"
	"strings"
	"time"
)

func (b *bench) report() string {
	var s strings.Builder
	host, _ := os.ReadFile("/proc/sys/kernel/osrelease")
	fmt.Fprintf(&s, `# Benchmarks

Written by "make bench" on %s: %d CPUs, Linux %s, %s. Load average %s at the start and
%s at the end, of which a run by itself causes about %d: where it is more, other work
shared the machine. Ratios hold better than seconds then, and CPU seconds better than
both.

The disk is an ext4 of 4 GiB with about 2 GiB of programs, libraries and documents.
%.1f MB of it, in pages of 4 KiB, changed for the incremental rows, as a busy system
changes it: pages of large files, new files, deleted ones. Both sides of a row run in
turn, %d times each, as whole processes, on local storage with the image in the page
cache; seconds are medians. What is restored is synced to the disk within the time,
by both sides. A row is marked noisy when its peer against itself (odd against even
runs) is off by more than a tenth. Where a row does not say otherwise both programs
use zstd-fastest and all else as it comes: Varve hashes with BLAKE3, Kopia with BLAKE2B.

| work | Varve | peer | ratio | CPU seconds, ours / peer's | goal | |
|---|---|---|---|---|---|---|
`, time.Now().UTC().Format("2006-01-02"), runtime.NumCPU(), strings.TrimSpace(string(host)), runtime.Version(),
		b.load, load(), runtime.NumCPU(), float64(b.really)/1e6, b.cfg.runs)
	var missed []result
	for _, r := range b.results {
		verdict := "reached"
		if !r.reached {
			verdict = "missed"
			missed = append(missed, r)
		}
		if r.note != "" {
			verdict += "; " + r.note
		}
		peer := r.peerName
		if r.peer != "" {
			peer += ": " + r.peer
		}
		fmt.Fprintf(&s, "| %s | %s | %s | %s | %s | %s | %s |\n", r.work, r.varve, peer, r.ratio, r.cpu, r.goal.text, verdict)
	}
	if len(missed) > 0 {
		s.WriteString("\n## Goals that this run missed\n\n")
		for _, r := range missed {
			fmt.Fprintf(&s, "- %s, against %s: %s.\n", r.work, r.peerName, r.why)
		}
	}
	return s.String()
}

// load is the load average over a minute.
func load() string {
	p, err := os.ReadFile("/proc/loadavg")
	if err != nil {
		return "unknown"
	}
	one, _, _ := strings.Cut(string(p), " ")
	return one
}
