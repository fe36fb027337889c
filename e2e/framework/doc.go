// Package framework is the base of end-to-end tests: a cluster started once per run, a
// separate namespace for each test, evidence kept when one fails, and faults to inject.
//
// A test package needs
//
//	func TestMain(m *testing.M) { framework.Main(m) }
//
// and each of its tests begins with framework.New(t). Tests skip with a reason if no
// cluster is up; with VARVE_E2E_UP=1 Main starts one and ends it again. The test process
// runs in the first node's network namespace, so that it reaches the API server, pods and
// services, and in the machine's file system and PID namespace.
//
// Tests of several packages share one cluster, so they run with go test -p 1.
package framework
