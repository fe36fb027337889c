package main

import (
	"math"
	"os"
	"runtime/debug"
	"strconv"
	"strings"
)

// cgroupMemory is the file with the memory limit of the process's container (Linux, cgroup
// v2); "max" for none.
const cgroupMemory = "/sys/fs/cgroup/memory.max"

// boundMemory makes the garbage collector keep the process below the limit of its container:
// otherwise the heap grows to twice its live size, and the kernel kills the process.
// $GOMEMLIMIT, which Go reads itself, takes precedence.
func (a *app) boundMemory(container int64) {
	if _, set := a.lookupEnv("GOMEMLIMIT"); set {
		return
	}
	if container == 0 {
		text, err := os.ReadFile(cgroupMemory)
		if err != nil {
			return // no container, or another system
		}
		container = parseMemoryMax(string(text))
	}
	if limit := memoryLimit(container); limit > 0 {
		debug.SetMemoryLimit(limit)
		a.log.Debug("memory limit", "bytes", limit, "container", container)
	}
}

// parseMemoryMax parses a container's limit as the kernel writes it, in bytes; 0 for none.
func parseMemoryMax(text string) int64 {
	n, err := strconv.ParseInt(strings.TrimSpace(text), 10, 64)
	if err != nil || n < 0 {
		return 0
	}
	return n
}

// memoryLimit reserves a tenth of the container's memory for what the garbage collector does
// not count: threads, mapped indexes, files in memory.
func memoryLimit(container int64) int64 {
	if container <= 0 || container > math.MaxInt64/2 {
		return 0
	}
	return container - container/10
}
