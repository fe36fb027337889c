package points

import (
	"fmt"
	"strings"

	"github.com/varve-io/varve/backup/blocktree"
	"github.com/varve-io/varve/backup/repository"
)

// Volume identifies one protected disk: a PVC, a device, an image file.
type Volume struct {
	Namespace string `json:"namespace"`
	Name      string `json:"name"`
	// Cluster is where the volume lives: a Kubernetes cluster's name, or a host's.
	Cluster string `json:"cluster"`
}

func (v Volume) String() string { return v.Namespace + "/" + v.Name }

// FullName returns cluster:namespace/name.
func (v Volume) FullName() string { return v.Cluster + ":" + v.String() }

// ParseVolume parses "namespace/name" or "cluster:namespace/name"; cluster is the default.
func ParseVolume(s, cluster string) (Volume, error) {
	rest := s
	if c, after, ok := strings.Cut(s, ":"); ok {
		cluster, rest = c, after
	}
	ns, name, ok := strings.Cut(rest, "/")
	v := Volume{Namespace: ns, Name: name, Cluster: cluster}
	if !ok {
		return v, fmt.Errorf("volume %q: want namespace/name, for example shop/db", s)
	}
	return v, v.Check()
}

// Check rejects invalid names.
func (v Volume) Check() error {
	for _, part := range []struct{ what, text string }{
		{"namespace", v.Namespace}, {"name", v.Name}, {"cluster", v.Cluster},
	} {
		if !blocktree.ValidNamePart(part.text) {
			return fmt.Errorf("volume %s: %s %q: use 1 to 253 letters, digits, '.', '_' and '-', not starting with '.' or '-'",
				v, part.what, part.text)
		}
	}
	return nil
}

// Source returns the Kopia source of the volume's snapshots.
func (v Volume) Source() repository.Source {
	return repository.Source{User: v.Namespace, Host: v.Cluster, Path: "/" + v.Name}
}
