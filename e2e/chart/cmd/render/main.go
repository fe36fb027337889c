// render writes the plain manifests of Varve's Helm chart:
//
//	render -chart deploy/helm/varve -o deploy/varve.yaml
//	render -chart deploy/helm/varve -admission v1 -o deploy/varve-admission-v1.yaml
//
// -values names a YAML file over the values that the plain manifests have; -admission writes
// the admission policy alone, for an API version.
package main

import (
	"flag"
	"log/slog"
	"os"

	"helm.sh/helm/v3/pkg/chartutil"

	"github.com/varve-io/varve/e2e/chart"
)

// Head of the written file.
const head = "# Varve as plain manifests, rendered from deploy/helm/varve by make manifests.\n"

func main() {
	dir := flag.String("chart", "", "the chart's directory")
	file := flag.String("values", "", "a YAML file of values")
	admission := flag.String("admission", "", "an API version, to write the admission policy alone")
	out := flag.String("o", "", "the file to write")
	flag.Parse()
	text, err := render(*dir, *file, *admission)
	if err == nil {
		err = os.WriteFile(*out, append([]byte(head), text...), 0o644)
	}
	if err != nil {
		slog.Error("render", "err", err)
		os.Exit(1)
	}
}

func render(dir, file, admission string) ([]byte, error) {
	if admission != "" {
		return chart.RenderAdmission(dir, admission)
	}
	values := chart.PlainValues()
	if file != "" {
		more, err := chartutil.ReadValuesFile(file)
		if err != nil {
			return nil, err
		}
		values = chartutil.MergeTables(more, values)
	}
	return chart.Render(dir, values)
}
