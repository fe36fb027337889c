// Package chart renders Varve's Helm chart with Helm's own engine.
package chart

import (
	"bytes"
	"fmt"
	"maps"
	"path"
	"slices"
	"strings"

	"helm.sh/helm/v3/pkg/chart/loader"
	"helm.sh/helm/v3/pkg/chartutil"
	"helm.sh/helm/v3/pkg/engine"
	"helm.sh/helm/v3/pkg/releaseutil"
)

// Namespace and release for which the plain manifests are rendered.
const (
	Namespace = "varve-system"
	Release   = "varve"
)

// PlainValues are those of the plain manifests: they include their namespace. The
// admission policy is in separate files, since its API depends on the Kubernetes version.
func PlainValues() map[string]any {
	return map[string]any{
		"namespace":       map[string]any{"create": true},
		"admissionPolicy": map[string]any{"enabled": false},
	}
}

// Render the chart in a directory as helm template would, with values over its own.
// Objects are in the order in which Helm installs them.
func Render(dir string, values map[string]any) ([]byte, error) {
	return renderTemplates(dir, values, func(string) bool { return true })
}

// RenderAdmission is the chart's admission policy alone, for an API version.
func RenderAdmission(dir, version string) ([]byte, error) {
	return renderTemplates(dir, map[string]any{"admissionPolicy": map[string]any{"apiVersion": version}},
		func(template string) bool { return template == "admission.yaml" })
}

func renderTemplates(dir string, values map[string]any, wanted func(template string) bool) ([]byte, error) {
	c, err := loader.LoadDir(dir)
	if err != nil {
		return nil, err
	}
	rendered, err := chartutil.ToRenderValues(c, values, chartutil.ReleaseOptions{Name: Release, Namespace: Namespace, Revision: 1, IsInstall: true},
		chartutil.DefaultCapabilities)
	if err != nil {
		return nil, err
	}
	files, err := engine.Engine{Strict: true}.Render(c, rendered)
	if err != nil {
		return nil, err
	}
	maps.DeleteFunc(files, func(name, _ string) bool { return path.Ext(name) != ".yaml" || !wanted(path.Base(name)) })
	_, objects, err := releaseutil.SortManifests(files, chartutil.DefaultVersionSet, releaseutil.InstallOrder)
	if err != nil {
		return nil, err
	}
	// Within a kind Helm's order is that of a map.
	kinds := slices.Index[[]string, string]
	slices.SortStableFunc(objects, func(a, b releaseutil.Manifest) int {
		ai, bi := kinds(releaseutil.InstallOrder, a.Head.Kind), kinds(releaseutil.InstallOrder, b.Head.Kind)
		if ai < 0 { // of a kind unknown to Helm: last
			ai = len(releaseutil.InstallOrder)
		}
		if bi < 0 {
			bi = len(releaseutil.InstallOrder)
		}
		if ai != bi {
			return ai - bi
		}
		return strings.Compare(a.Head.Kind+"/"+a.Head.Metadata.Name, b.Head.Kind+"/"+b.Head.Metadata.Name)
	})

	var out bytes.Buffer
	for _, o := range objects {
		fmt.Fprintf(&out, "---\n%s\n", strings.TrimSpace(strings.TrimPrefix(strings.TrimSpace(o.Content), "---")))
	}
	return out.Bytes(), nil
}
