package cluster

import (
	"bytes"
	"embed"
	"os"
	"text/template"
)

//go:embed config
var configFiles embed.FS

var configs = template.Must(template.New("").Option("missingkey=error").ParseFS(configFiles, "config/*"))

func render(name string, values any) ([]byte, error) {
	var b bytes.Buffer
	err := configs.ExecuteTemplate(&b, name, values)
	return b.Bytes(), err
}

func renderTo(path, name string, values any) error {
	b, err := render(name, values)
	if err != nil {
		return err
	}
	return os.WriteFile(path, b, 0o600)
}

// nodeValues are the values of a node's configuration.
type nodeValues struct {
	Name, IP, PodRange, Dir, Run, PKI, Bin, ControlIP, PodCIDR, Pause string
	DeviceOwnership                                                   bool
}

func (c *Cluster) nodeValues(n *Node) nodeValues {
	return nodeValues{Name: n.Name, IP: n.IP(), PodRange: n.podRange(), Dir: c.NodePath(n), Run: c.Run, PKI: c.Path("pki"),
		Bin: c.Bin, ControlIP: c.Control().IP(), PodCIDR: podCIDR, Pause: PauseImage, DeviceOwnership: c.Options.DeviceOwnership}
}

func (c *Cluster) kubeconfig(user string) error {
	return renderTo(c.Path(user+".kubeconfig"), "kubeconfig", map[string]string{
		"User": user, "PKI": c.Path("pki"), "ControlIP": c.Control().IP()})
}
