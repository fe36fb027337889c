// Package nbd tests "varve serve" beside the programs that speak NBD: libnbd's
// tools, qemu's, fio, nbdkit and, in a virtual machine, the Linux kernel. Each
// test runs the real binary over a real repository with a chain of recovery
// points.
//
// VARVE names the binary; without it the tests build one. The kernel's tests
// run where VARVE_TEST_KERNEL is set ("make e2e-nbd").
package nbd
