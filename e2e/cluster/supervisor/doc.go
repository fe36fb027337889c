// Package supervisor is the first process of a node's namespaces: it prepares them for
// Kubernetes' components, starts those on requests through a unix socket, and reaps all
// children. When it is killed, the kernel ends the whole node.
package supervisor
