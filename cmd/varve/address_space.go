package main

import (
	"fmt"

	"golang.org/x/sys/unix"

	"github.com/varve-io/varve/internal/bytesize"
)

// leastAddressSpace is the address space needed to open a repository, in bytes. Go reserves
// large pieces, most of which it never uses; with much less it cannot start, and ends with a
// stack trace.
const leastAddressSpace = 2 << 30

// checkAddressSpace refuses to run with less: Go's runtime ends a process that gets no memory
// at any moment, with a stack trace instead of an error.
func checkAddressSpace(limit uint64) error {
	if limit >= leastAddressSpace {
		return nil
	}
	return fmt.Errorf("the address space is limited to %s (ulimit -v), and varve needs %s, backups and servers twice that: "+
		"run \"ulimit -v unlimited\"; GOMEMLIMIT or a cgroup bounds the memory that is used", bytesize.Format(int64(limit)), bytesize.Format(leastAddressSpace))
}

// addressSpace returns the limit of this process.
func addressSpace() uint64 {
	var limit unix.Rlimit
	if unix.Getrlimit(unix.RLIMIT_AS, &limit) != nil {
		return unix.RLIM_INFINITY
	}
	return limit.Cur
}
