// Package process distinguishes processes of a host, across boots, containers and reused
// PIDs, and starts some that end with this one.
package process

import (
	"bytes"
	"errors"
	"os"
	"strconv"
	"strings"
	"syscall"
)

// BootID distinguishes boots, and containers with one host name: a PID is valid within one
// boot and PID namespace only.
func BootID() string {
	boot, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	if err != nil {
		return ""
	}
	ns, err := os.Readlink("/proc/self/ns/pid")
	if err != nil {
		return ""
	}
	return strings.TrimSpace(string(boot)) + "/" + ns
}

// Start returns when a process began, in clock ticks since the boot; "" if unknown. It
// distinguishes a process from a later one with its PID.
func Start(pid int) string {
	_, start := state(pid)
	return start
}

// state returns fields 3 and 22 of proc_pid_stat(5).
func state(pid int) (state, start string) {
	stat, err := os.ReadFile("/proc/" + strconv.Itoa(pid) + "/stat")
	if err != nil {
		return "", ""
	}
	// Field 2, the program's name, is in parentheses, and may have any bytes in it.
	f := strings.Fields(string(stat[bytes.LastIndexByte(stat, ')')+1:]))
	if len(f) < 20 {
		return "", ""
	}
	return f[0], f[19]
}

// Alive reports whether a process of this boot and PID namespace lives that began
// at start; "" for any.
func Alive(pid int, start string) bool {
	if err := syscall.Kill(pid, 0); err != nil && !errors.Is(err, syscall.EPERM) {
		return false
	}
	switch state, began := state(pid); {
	case state == "Z" || state == "X": // killed, and its parent has not asked yet
		return false
	case began != "" && start != "":
		return began == start
	}
	return true
}
