// render writes the plain manifests of Varve's Helm chart:
//
//	render -chart deploy/helm/varve -o deploy/varve.yaml
//
// -values names a YAML file over the values that the plain manifests have.
package main

import (
	"flag"
	"log/slog"
	"os"

	"helm.sh/helm/v3/pkg/chartutil"

	"github.com/varve-io/varve/e2e/chart"
)

// Head of the file that is written.
const head = "# Varve as plain manifests, rendered from deploy/helm/varve by make manifests.\n"

func main() {
	dir := flag.String("chart", "", "the chart's directory")
	file := flag.String("values", "", "a YAML file of values")
	out := flag.String("o", "", "the file to write")
	flag.Parse()
	if err := render(*dir, *file, *out); err != nil {
		slog.Error("render", "err", err)
		os.Exit(1)
	}
}

func render(dir, file, out string) error {
	values := chart.PlainValues()
	if file != "" {
		more, err := chartutil.ReadValuesFile(file)
		if err != nil {
			return err
		}
		values = chartutil.MergeTables(more, values)
	}
	text, err := chart.Render(dir, values)
	if err != nil {
		return err
	}

	return os.WriteFile(out, append([]byte(head), text...), 0o644)
}
