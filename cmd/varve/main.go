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

// interruptible returns a context that the first SIGINT, SIGTERM or SIGHUP cancels, so that
// commands end cleanly. A second SIGINT or SIGTERM ends the process at once. A SIGHUP does not:
// a shell repeats that of a terminal that is closed, and systemd may send it beside a SIGTERM.
func interruptible(parent context.Context) (context.Context, context.CancelFunc) {
	ctx, cancel := context.WithCancelCause(parent)
	signals := make(chan os.Signal, 4)
	signal.Notify(signals, os.Interrupt, syscall.SIGTERM)
	if !signal.Ignored(syscall.SIGHUP) { // as nohup has it
		signal.Notify(signals, syscall.SIGHUP)
	}
	done := make(chan struct{})
	go func() {
		for asked := false; ; {
			select {
			case s := <-signals:
				if asked && s != syscall.SIGHUP {
					os.Exit(exitInterrupted)
				}
				asked = asked || s != syscall.SIGHUP
				cancel(errInterrupted)
			case <-done:
				return
			}
		}
	}()
	return ctx, func() {
		signal.Stop(signals)
		close(done)
		cancel(nil)
	}
}
