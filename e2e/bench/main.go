// Command bench measures Varve beside its peers on one machine and writes the
// table of docs/benchmarks.md. Every row runs both sides in turn, several
// times, and gives medians; a peer is also run against itself, and a row whose peer does
// not repeat within ten percent is marked. It needs root, since it makes and mounts a
// real file system.
package main

import (
	"flag"
	"fmt"
	"os"
	"path/filepath"
	"strings"
)

type config struct {
	varve, kopia string
	gateway      string // the S3 server
	before       string // an older varve
	dir          string
	root         string // of the source tree
	runs         int
	crowd        int             // points of the crowded repository
	rows         map[string]bool // empty for all
}

func main() {
	var cfg config
	out := flag.String("out", "", "file to write the table to (default standard output)")
	rows := flag.String("rows", "", "comma-separated rows to run (default all)")
	flag.StringVar(&cfg.varve, "varve", os.Getenv("VARVE"), "varve binary")
	flag.StringVar(&cfg.kopia, "kopia", os.Getenv("KOPIA"), "stock kopia binary")
	flag.StringVar(&cfg.gateway, "s3", os.Getenv("S3"), "versitygw binary, for what is on an object store")
	flag.StringVar(&cfg.before, "before", "", "older varve binary for the rows \"before\", which compare the two")
	flag.StringVar(&cfg.dir, "dir", "", "scratch directory with 20 GiB free (default below $TMPDIR or /var/tmp)")
	flag.StringVar(&cfg.root, "root", "..", "source tree of Varve, to build the maker of many recovery points from")
	flag.IntVar(&cfg.runs, "runs", 5, "runs of each side")
	flag.IntVar(&cfg.crowd, "crowd", 10_000, "recovery points in the crowded repository (the time to make it grows with the square)")
	curves := flag.Bool("curves", false, "measure how costs grow, and write the curves into the report -out, instead of the table; -rows chooses among volume,chain,changed,points,clients,latency")
	soak := flag.Duration("soak", 0, "load a server of a far object store for so long, instead of measuring")
	flag.Parse()
	cfg.rows = map[string]bool{}
	for r := range strings.SplitSeq(*rows, ",") {
		if r != "" {
			cfg.rows[r] = true
		}
	}
	do := func(b *bench) error { return b.table(*out) }
	switch {
	case *curves:
		do = func(b *bench) error { return b.scale(*out) }
	case *soak > 0:
		do = func(b *bench) error { return b.soak(*soak, *out) }
	}
	if err := run(cfg, do); err != nil {
		fmt.Fprintln(os.Stderr, "bench:", err)
		os.Exit(1)
	}
}

func run(cfg config, do func(*bench) error) error {
	if cfg.varve == "" || cfg.kopia == "" {
		return fmt.Errorf("name the binaries with -varve and -kopia, or run \"make bench\"")
	}
	if cfg.dir == "" {
		base := os.Getenv("TMPDIR")
		if base == "" {
			base = "/var/tmp"
		}
		dir, err := os.MkdirTemp(base, "varve-bench-*")
		if err != nil {
			return err
		}
		defer os.RemoveAll(dir)
		cfg.dir = dir
	}
	b := &bench{cfg: cfg, load: load()}
	if err := b.buildMaker(); err != nil {
		return err
	}
	return do(b)
}

// table runs the rows and writes their table, to standard output if out is empty.
func (b *bench) table(out string) error {
	prepared := false
	for _, row := range allRows {
		if len(b.cfg.rows) > 0 && !b.cfg.rows[row.id] {
			continue
		}
		fmt.Fprintf(os.Stderr, "== %s\n", row.id)
		if row.disk && !prepared {
			if err := b.prepare(); err != nil {
				return err
			}
			prepared = true
		}
		results, err := row.run(b)
		if err != nil {
			return fmt.Errorf("%s: %w", row.id, err)
		}
		for _, r := range results {
			fmt.Fprintf(os.Stderr, "   %s: %s (%s %s): %s; CPU %s; %s reached=%v %s\n",
				r.work, r.varve, r.peerName, r.peer, r.ratio, r.cpu, r.goal.text, r.reached, r.note)
		}
		b.results = append(b.results, results...)
	}
	text := b.report()
	if out == "" {
		_, err := os.Stdout.WriteString(text)
		return err
	}
	return writeTable(filepath.Clean(out), text)
}
