package csi_test

import (
	"testing"

	"github.com/varve-io/varve/e2e/framework"
)

func TestMain(m *testing.M) { framework.Main(m) }
