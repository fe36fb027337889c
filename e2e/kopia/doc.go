// Package kopia proves, with only the two binaries, that stock Kopia and Varve read and
// keep each other's data. VARVE_TEST_KOPIA names a kopia binary of the version that Varve
// is built with; "make test" builds it. VARVE names Varve's; without it the tests build
// one.
package kopia
