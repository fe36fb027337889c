package main

import (
	"fmt"
	"os"
)

// clusterName is where the volumes that this client backs up live: what the
// flag says, or this machine.
func (a *app) clusterName() (string, error) {
	if a.flags.cluster != "" {
		return a.flags.cluster, nil
	}
	name, err := os.Hostname()
	if err != nil {
		return "", fmt.Errorf("no --cluster given, and the host's name cannot be read: %w", err)
	}
	return name, nil
}
