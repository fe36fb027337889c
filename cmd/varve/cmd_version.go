package main

import (
	"runtime"
	"runtime/debug"

	"github.com/spf13/cobra"
)

// version is set by the linker for releases.
var version = ""

type versionResult struct {
	Version  string `json:"version"`
	Revision string `json:"revision,omitempty"`
	Kopia    string `json:"kopia"`
	Go       string `json:"go"`
	Platform string `json:"platform"`
}

func newVersionCommand(a *app) *cobra.Command {
	return &cobra.Command{
		Use:   "version",
		Short: "Show the version of Varve and of the Kopia library in it",
		Args:  cobra.NoArgs,
		RunE: func(*cobra.Command, []string) error {
			v := readVersion()
			return a.print(v, func(t *table) {
				t.row("varve", v.Version)
				if v.Revision != "" {
					t.row("revision", v.Revision)
				}
				t.row("kopia", v.Kopia)
				t.row("go", v.Go)
				t.row("platform", v.Platform)
			})
		},
	}
}

func readVersion() versionResult {
	v := versionResult{Version: version, Go: runtime.Version(), Platform: runtime.GOOS + "/" + runtime.GOARCH, Kopia: "unknown"}
	info, ok := debug.ReadBuildInfo()
	if !ok {
		info = &debug.BuildInfo{}
	}
	if v.Version == "" {
		v.Version = info.Main.Version
	}
	if v.Version == "" {
		v.Version = "(devel)"
	}
	for _, s := range info.Settings {
		if s.Key == "vcs.revision" {
			v.Revision = s.Value
		}
	}
	for _, d := range info.Deps {
		if d.Path == "github.com/kopia/kopia" {
			v.Kopia = d.Version
		}
	}
	return v
}
