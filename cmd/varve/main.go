// Command varve backs up block volumes into a Kopia repository and serves any recovery point
// at once, as a whole disk.
package main

import (
	"context"
	"fmt"
	"os"
	"os/signal"
	"syscall"
)

func main() {
	if err := checkAddressSpace(addressSpace()); err != nil {
		fmt.Fprintf(os.Stderr, "varve: %v\n", err)
		os.Exit(exitFailure)
	}
	ctx, stop := interruptible(context.Background())
	a := newApp()
	a.hideSecrets()
	code := a.run(ctx, os.Args[1:])
	stop()
	os.Exit(code)
}

// interruptible returns a context that the first SIGINT or SIGTERM cancels, so that commands
// end cleanly; the second ends the process at once.
func interruptible(parent context.Context) (context.Context, context.CancelFunc) {
	ctx, cancel := context.WithCancelCause(parent)
	signals := make(chan os.Signal, 2)
	signal.Notify(signals, os.Interrupt, syscall.SIGTERM)
	done := make(chan struct{})
	go func() {
		select {
		case <-signals:
			cancel(errInterrupted)
		case <-done:
			return
		}
		select {
		case <-signals:
			os.Exit(exitInterrupted)
		case <-done:
		}
	}()
	return ctx, func() {
		signal.Stop(signals)
		close(done)
		cancel(nil)
	}
}
