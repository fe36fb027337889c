// Package supervisor is the first process of a node's namespaces: it makes them a
// place where Kubernetes' components can run, starts those as it is told through a
// unix socket, and reaps whatever dies. When it is killed, the kernel ends all of
// the node with it.
package supervisor
