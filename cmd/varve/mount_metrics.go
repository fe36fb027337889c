package main

import (
	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"

	"github.com/varve-io/varve/fusefs"
)

// serveMountMetrics serves a tree's metrics at an address until stop is called; with an empty
// address it does nothing.
func (a *app) serveMountMetrics(address string, tree *fusefs.FS) (stop func() error, err error) {
	if address == "" {
		return func() error { return nil }, nil
	}
	registry := prometheus.NewRegistry()
	registry.MustRegister(collectors.NewGoCollector(), collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}))
	r := metricCollector{registry}
	r.collectCache(tree.Stats)
	r.counter("varve_mount_fetched_bytes_total", "Bytes that readers of the tree had to fetch from the repository, decoded: blocks and indexes.",
		func() float64 { return float64(tree.Fetched().Bytes) })
	r.counter("varve_mount_fetched_blocks_total", "Blocks and indexes that readers of the tree had to fetch from the repository.",
		func() float64 { return float64(tree.Fetched().Blocks) })
	r.gauge("varve_mount_points", "Recovery points that the tree shows.",
		func() float64 { return float64(tree.Points()) })
	r.gauge("varve_mount_points_open", "Recovery points that were read.",
		func() float64 { return float64(tree.OpenPoints()) })
	r.gauge("varve_overlay_bytes", "Scratch space that overlays take.",
		func() float64 { n, _ := tree.Overlays(); return float64(n) })
	r.gauge("varve_overlays", "Overlays in use.",
		func() float64 { _, n := tree.Overlays(); return float64(n) })
	m, err := listenMetrics(address, registry)
	if err != nil {
		return nil, err
	}
	a.log.Info("metrics are served", "url", m.url())
	done := make(chan error, 1)
	go func() { done <- m.serve() }()
	return func() error {
		m.close()
		return <-done
	}, nil
}
