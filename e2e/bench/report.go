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

Measured on %s with %d CPUs, Linux %s, Go %s, by "make bench".

Method: the disk is an ext4 of 4 GiB with about 2 GiB of programs, libraries and
documents; %.1f MB of it, in pages of 4 KiB, changed for the incremental rows. Both
sides of a row run in turn, %d times each, as whole processes, on local storage with
the image in the page cache; the table gives medians. A row is marked noisy when the
peer against itself (odd against even runs) is off by more than a tenth. Both use
zstd-fastest where a row does not say otherwise.

| work | Varve | peer | | goal | |
|---|---|---|---|---|---|
`, time.Now().UTC().Format("2006-01-02"), runtime.NumCPU(), strings.TrimSpace(string(host)), runtime.Version(), float64(b.really)/1e6, b.cfg.runs)
	for _, r := range b.results {
		fmt.Fprintf(&s, "| %s | %s | %s: %s | %s | %s | %s |\n", r.work, r.varve, r.peerName, r.peer, r.ratio, r.goal, r.note)
	}
	return s.String()
}
