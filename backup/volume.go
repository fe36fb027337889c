// Package backup makes recovery points of disks and gives them back: it writes
// chains of changed blocks into a repository, lists, names, compares, verifies,
// prunes and restores them. A recovery point is a Kopia snapshot of one disk
// image and its record; package blocktree has the format, package image reads
// it, package cbt says what changed.
package backup

import (
	"fmt"
	"strings"

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

// FullName is the volume with its cluster: cluster:namespace/name.
func (v Volume) FullName() string { return v.Cluster + ":" + v.String() }

// maxNamePart is the longest namespace, name or cluster, as in DNS.
const maxNamePart = 253

// ParseVolume reads "namespace/name" or "cluster:namespace/name"; cluster is
// used where the text names none.
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
	return v, v.check()
}

func (v Volume) check() error {
	for _, part := range []struct{ what, text string }{
		{"namespace", v.Namespace}, {"name", v.Name}, {"cluster", v.Cluster},
	} {
		if part.text == "" || len(part.text) > maxNamePart || part.text[0] == '.' || part.text[0] == '-' ||
			strings.ContainsFunc(part.text, func(r rune) bool { return !nameRune(r) }) {
			return fmt.Errorf("volume %s: %s %q: use 1 to %d letters, digits, '.', '_' and '-', not starting with '.' or '-'",
				v, part.what, part.text, maxNamePart)
		}
	}
	return nil
}

func nameRune(r rune) bool {
	return r >= 'a' && r <= 'z' || r >= 'A' && r <= 'Z' || r >= '0' && r <= '9' || r == '.' || r == '_' || r == '-'
}

func (v Volume) source() repository.Source {
	return repository.Source{User: v.Namespace, Host: v.Cluster, Path: "/" + v.Name}
}
