// e2ecsi runs one process of the test cluster's CSI driver (package csidriver).
package main

import (
	"context"
	"flag"
	"log/slog"
	"os"
	"os/signal"
	"syscall"

	"github.com/varve-io/varve/e2e/csidriver"
)

func main() {
	log := slog.New(slog.NewTextHandler(os.Stderr, nil))
	cfg := csidriver.Config{Log: log}
	flag.StringVar(&cfg.Name, "name", "", "the driver's name")
	flag.StringVar(&cfg.Node, "node", "", "the node this process serves")
	flag.StringVar(&cfg.State, "state", "", "directory shared by all processes of the driver")
	flag.StringVar(&cfg.Endpoint, "endpoint", "", "CSI socket")
	flag.StringVar(&cfg.Registration, "registration", "", "socket in the kubelet's plugins_registry")
	flag.BoolVar(&cfg.Controller, "controller", false, "answer the controller services too")
	flag.Parse()
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM, syscall.SIGINT)
	defer stop()
	d, err := csidriver.New(cfg)
	if err == nil {
		err = d.Run(ctx)
	}
	if err != nil {
		log.Error("driver", "err", err)
		os.Exit(1)
	}
}
