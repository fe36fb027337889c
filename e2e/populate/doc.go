// Package populate tests the filling of claims against a real binder, provisioner and
// kubelet. The reconcilers run in the test's process, the movers in pods of Varve's
// image; what the claims are filled from is written to the repository by the test.
package populate
