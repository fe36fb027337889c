// render writes the plain manifests of Varve's Helm chart:
//
//	render -chart deploy/helm/varve -o deploy/varve.yaml
package main

import (
	"flag"
	"log/slog"
	"os"

	"github.com/varve-io/varve/e2e/chart"
)

// Head of the file that is written.
const head = "# Varve as plain manifests, rendered from deploy/helm/varve by make manifests.\n"

func main() {
	dir := flag.String("chart", "", "the chart's directory")
	out := flag.String("o", "", "the file to write")
	flag.Parse()
	text, err := chart.Render(*dir, chart.PlainValues())
	if err == nil {
		err = os.WriteFile(*out, append([]byte(head), text...), 0o644)
	}
	if err != nil {
		slog.Error("render", "err", err)
		os.Exit(1)
	}
}
