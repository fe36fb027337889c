// Package kubernetes has the tests of Varve in a cluster: the shipped manifests, the
// image of make image, and movers and controller under the shipped rights only.
package kubernetes
