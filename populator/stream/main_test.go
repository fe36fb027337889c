package stream

import (
	"os"
	"testing"

	"github.com/varve-io/varve/internal/pidspace"
)

func TestMain(m *testing.M) { os.Exit(pidspace.Run(m)) }
