package main

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
	"github.com/prometheus/client_golang/prometheus/promhttp"

	"github.com/varve-io/varve/backup/image"
	"github.com/varve-io/varve/nbdserver"
	"github.com/varve-io/varve/nbdserver/nbdmetrics"
)

// metricsServer serves /metrics on its own mux and listener. A nil one serves nothing.
type metricsServer struct {
	listener net.Listener
	http     *http.Server
}

// startMetrics opens the listener, and registers the NBD server's counters.
func (s *serving) startMetrics(cfg *nbdserver.Config) (*metricsServer, error) {
	if s.flags.metrics == "" {
		return nil, nil
	}
	registry := prometheus.NewRegistry()
	m, err := nbdmetrics.New(registry)
	if err != nil {
		return nil, err
	}
	cfg.Metrics = m
	registry.MustRegister(collectors.NewGoCollector(), collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}))
	s.collect(registry)
	return listenMetrics(s.flags.metrics, registry)
}

// listenMetrics opens the listener for the metrics of a registry.
func listenMetrics(address string, registry *prometheus.Registry) (*metricsServer, error) {
	l, err := net.Listen("tcp", loopbackIfBare(address))
	if err != nil {
		return nil, fmt.Errorf("listen for metrics: %w", err)
	}
	mux := http.NewServeMux()
	mux.Handle("GET /metrics", promhttp.HandlerFor(registry, promhttp.HandlerOpts{}))
	return &metricsServer{l, &http.Server{Handler: mux, ReadHeaderTimeout: 10 * time.Second, WriteTimeout: time.Minute}}, nil
}

// metricCollector registers metrics whose values are read at each scrape.
type metricCollector struct{ prometheus.Registerer }

func (r metricCollector) counter(name, help string, value func() float64) {
	r.MustRegister(prometheus.NewCounterFunc(prometheus.CounterOpts{Name: name, Help: help}, value))
}

func (r metricCollector) gauge(name, help string, value func() float64) {
	r.MustRegister(prometheus.NewGaugeFunc(prometheus.GaugeOpts{Name: name, Help: help}, value))
}

// collectCache registers the metrics of a block cache.
func (r metricCollector) collectCache(stats func() image.CacheStats) {
	r.counter("varve_cache_hits_total", "Blocks that were in the cache, or on their way.",
		func() float64 { return float64(stats().Hits) })
	r.counter("varve_cache_misses_total", "Blocks that were read from the repository.",
		func() float64 { return float64(stats().Misses) })
	r.counter("varve_cache_index_misses_total", "Indexes that were read from the repository.",
		func() float64 { return float64(stats().IndexMisses) })
	r.counter("varve_cache_decoded_bytes_total", "Bytes of blocks read from the repository, decoded.",
		func() float64 { return float64(stats().Decoded) })
	r.gauge("varve_cache_bytes", "Memory the cache takes.",
		func() float64 { return float64(stats().Bytes) })
	r.gauge("varve_cache_limit_bytes", "Memory the cache may take.",
		func() float64 { return float64(stats().MaxBytes) })
}

// collect registers the metrics of cache, catalogue and overlays.
func (s *serving) collect(registry prometheus.Registerer) {
	r := metricCollector{registry}
	r.collectCache(s.cache.Stats)
	r.gauge("varve_nbd_exports", "Recovery points served.",
		func() float64 { return float64(s.catalog.Len()) })
	r.gauge("varve_overlay_bytes", "Scratch space that overlays take.",
		func() float64 { n, _ := s.catalog.OverlayBytes(); return float64(n) })
	if s.copies != nil {
		r.counter("varve_hydrate_filled_bytes_total", "Bytes of disks copied to local files, zeroes included.",
			func() float64 { return float64(s.copies.Stats().Filled) })
		r.counter("varve_hydrate_read_bytes_total", "Bytes read from local copies.",
			func() float64 { return float64(s.copies.Stats().Read) })
		r.gauge("varve_hydrate_bytes", "Space that local copies take.",
			func() float64 { return float64(s.copies.Stats().Bytes) })
		r.gauge("varve_hydrate_limit_bytes", "Space that local copies may take; 0 for no limit.",
			func() float64 { return float64(s.copies.Stats().Limit) })
		r.gauge("varve_hydrate_disks", "Disks in use that have a local copy.",
			func() float64 { return float64(s.copies.Stats().Open) })
		r.gauge("varve_hydrate_disks_complete", "Those of them with a complete copy.",
			func() float64 { return float64(s.copies.Stats().Complete) })
	}
	r.gauge("varve_overlays", "Overlays in use.",
		func() float64 { _, n := s.catalog.OverlayBytes(); return float64(n) })
}

func (m *metricsServer) serve() error {
	if m == nil {
		return nil
	}
	if err := m.http.Serve(m.listener); !errors.Is(err, http.ErrServerClosed) {
		return fmt.Errorf("serve metrics: %w", err)
	}
	return nil
}

func (m *metricsServer) close() {
	if m == nil {
		return
	}
	ctx, cancel := context.WithTimeout(context.Background(), time.Second)
	defer cancel()
	if m.http.Shutdown(ctx) != nil {
		_ = m.http.Close()
	}
	_ = m.listener.Close()
}

func (m *metricsServer) url() string {
	if m == nil {
		return ""
	}
	return "http://" + m.listener.Addr().String() + "/metrics"
}
