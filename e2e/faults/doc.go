// Package faults breaks the real varve binary, its disks and its storage: killed at
// random moments, interrupted, out of room, on bad sectors. After each of these every
// older recovery point must be unchanged.
package faults
