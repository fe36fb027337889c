// Package framework is what end-to-end tests stand on: a cluster brought up once per
// run, a namespace of its own for each test, evidence kept when one fails, and faults
// to inject.
//
// A test package needs
//
//	func TestMain(m *testing.M) { framework.Main(m) }
//
// and each of its tests begins with framework.New(t). Tests skip, saying why, where
// no cluster is up; VARVE_E2E_UP=1 has Main bring one up and take it down again. The
// test process runs in the first node's network namespace, so that it reaches the API
// server, pods and services, and in the machine's file system and PID namespace.
//
// Tests of several packages share one cluster, so they run with go test -p 1.
package framework
