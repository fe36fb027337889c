package nbdserver_test

import (
	"context"
	"errors"
	"fmt"
	"net"
	"strings"
	"testing"
	"time"

	"github.com/varve-io/varve/nbdserver"
	"github.com/varve-io/varve/nbdserver/nbdclient"
	"github.com/varve-io/varve/nbdserver/nbdtest"
)

// late is a catalogue that takes its time.
type late struct {
	nbdserver.Catalog
	after time.Duration
}

func (l late) Open(context.Context, string, nbdserver.Client) (*nbdserver.Opened, error) {
	time.Sleep(l.after)
	return nil, errors.New("the storage is silent")
}

// An export that cannot be opened is an answer, also if opening it took longer than the time of
// the negotiation.
func TestFailsLateToOpen(t *testing.T) {
	for name, catalog := range map[string]func(after time.Duration) nbdserver.Catalog{
		"open": func(after time.Duration) nbdserver.Catalog { return late{after: after} },
		"enter": func(after time.Duration) nbdserver.Catalog {
			return nbdserver.NewStatic(nbdserver.Opened{
				Name: "disk", Export: nbdtest.NewDisk(nbdtest.Image()).Writable(),
				Enter: func(context.Context, []string) error {
					time.Sleep(after)
					return errors.New("the storage is silent")
				},
			})
		},
	} {
		t.Run(name, func(t *testing.T) {
			ask := func(limit time.Duration) error {
				_, path := serve(t, nbdserver.Config{Catalog: catalog(limit + limit/2), NegotiationTimeout: limit})
				nc, err := net.Dial("unix", path)
				if err != nil {
					t.Fatal(err)
				}
				defer nc.Close()
				c, err := nbdclient.New(nc)
				if err != nil {
					return err
				}
				if _, err := c.Negotiate(nbdclient.Structured); err != nil {
					return err
				}
				for range 2 { // there is time for another option
					if _, err := c.Go("disk"); err == nil || !strings.Contains(err.Error(), "the storage is silent") {
						return fmt.Errorf("entered with %v", err)
					}
				}
				return nil
			}
			// A machine that is slow itself needs more time for the rest.
			limit := 200 * time.Millisecond
			err := ask(limit)
			for ; err != nil && limit < 5*time.Second; err = ask(limit) {
				limit *= 3
			}
			if err != nil {
				t.Errorf("within %v: %v", limit, err)
			}
		})
	}
}
