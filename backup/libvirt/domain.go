package libvirt

import (
	"encoding/xml"
	"fmt"
	"slices"
	"strconv"
	"strings"
)

// Domain is what is read of a domain's XML (libvirt, formatdomain).
type Domain struct {
	Name  string
	UUID  string
	Disks []Disk
	// Files of the host that a start needs; empty for none.
	Loader, NVRAM, Kernel, Initrd string
	// UID and GID that its QEMU runs as; -1 if libvirt does not say.
	UID, GID int
}

// Disk is a disk that a backup reads.
type Disk struct {
	Target string // vda
	Type   string // file, block, network, volume, ...
	Path   string // of a file or block device; empty for others
	Format string // of the image: raw, qcow2, ...
}

// Tracked reports whether libvirt can keep a bitmap of the disk.
func (d Disk) Tracked() bool { return d.Format == "qcow2" }

// ParseDomain reads a domain's XML. CDs, floppies, read-only and transient disks are left out.
func ParseDomain(text string) (*Domain, error) {
	var x struct {
		XMLName xml.Name `xml:"domain"`
		Name    string   `xml:"name"`
		UUID    string   `xml:"uuid"`
		OS      struct {
			Loader string `xml:"loader"`
			NVRAM  string `xml:"nvram"`
			Kernel string `xml:"kernel"`
			Initrd string `xml:"initrd"`
		} `xml:"os"`
		Disks []struct {
			Type   string `xml:"type,attr"`
			Device string `xml:"device,attr"`
			Driver struct {
				Type string `xml:"type,attr"`
			} `xml:"driver"`
			Source struct {
				File string `xml:"file,attr"`
				Dev  string `xml:"dev,attr"`
			} `xml:"source"`
			Target struct {
				Dev string `xml:"dev,attr"`
			} `xml:"target"`
			ReadOnly  *struct{} `xml:"readonly"`
			Transient *struct{} `xml:"transient"`
		} `xml:"devices>disk"`
		Labels []struct {
			Model string `xml:"model,attr"`
			Label string `xml:"label"`
		} `xml:"seclabel"`
	}
	if err := xml.Unmarshal([]byte(text), &x); err != nil {
		return nil, fmt.Errorf("read the domain's XML: %w", err)
	}
	if x.Name == "" {
		return nil, fmt.Errorf("read the domain's XML: it has no name")
	}
	d := &Domain{
		Name: x.Name, UUID: x.UUID, UID: -1, GID: -1,
		Loader: strings.TrimSpace(x.OS.Loader), NVRAM: strings.TrimSpace(x.OS.NVRAM), Kernel: strings.TrimSpace(x.OS.Kernel), Initrd: strings.TrimSpace(x.OS.Initrd),
	}
	for _, one := range x.Disks {
		if one.Device != "" && one.Device != "disk" && one.Device != "lun" || one.ReadOnly != nil || one.Transient != nil {
			continue
		}
		disk := Disk{Target: one.Target.Dev, Type: one.Type, Path: one.Source.File + one.Source.Dev, Format: one.Driver.Type}
		if disk.Format == "" {
			disk.Format = "raw" // libvirt does not probe
		}
		if disk.Target == "" || slices.ContainsFunc(d.Disks, func(o Disk) bool { return o.Target == disk.Target }) {
			return nil, fmt.Errorf("read the domain's XML: a disk has the target %q, as another or none", disk.Target)
		}
		d.Disks = append(d.Disks, disk)
	}
	for _, l := range x.Labels {
		if l.Model != "dac" {
			continue
		}
		uid, gid, _ := strings.Cut(l.Label, ":") // +64055:+64055
		u, uerr := strconv.Atoi(strings.TrimPrefix(uid, "+"))
		g, gerr := strconv.Atoi(strings.TrimPrefix(gid, "+"))
		if uerr == nil && gerr == nil && u >= 0 && g >= 0 {
			d.UID, d.GID = u, g
		}
	}
	return d, nil
}

// Backup describes a backup job in pull mode (libvirt, formatbackup).
type Backup struct {
	Socket string // of its NBD server, on libvirt's machine; empty for TCP with TLS
	Host   string
	Port   int
	Disks  []BackupDisk
}

// BackupDisk is one disk of a job.
type BackupDisk struct {
	Target      string
	Leave       bool   // it is not backed up
	Incremental string // the checkpoint since which changes are listed; empty for none
	Scratch     string // a file that is not there yet
}

// BitmapOf is the bitmap that lists the changes of a disk on the job's NBD server.
func BitmapOf(target string) string { return "backup-" + target }

type xmlServer struct {
	Transport string `xml:"transport,attr"`
	Socket    string `xml:"socket,attr,omitempty"`
	Name      string `xml:"name,attr,omitempty"`
	Port      int    `xml:"port,attr,omitempty"`
	TLS       string `xml:"tls,attr,omitempty"`
}

type xmlFile struct {
	File string `xml:"file,attr"`
}

type xmlType struct {
	Type string `xml:"type,attr"`
}

type xmlBackupDisk struct {
	Name         string   `xml:"name,attr"`
	Backup       string   `xml:"backup,attr"`
	Type         string   `xml:"type,attr,omitempty"`
	Mode         string   `xml:"backupmode,attr,omitempty"`
	Incremental  string   `xml:"incremental,attr,omitempty"`
	ExportName   string   `xml:"exportname,attr,omitempty"`
	ExportBitmap string   `xml:"exportbitmap,attr,omitempty"`
	Driver       *xmlType `xml:"driver"`
	Scratch      *xmlFile `xml:"scratch"`
}

// XML is what libvirt takes.
func (b *Backup) XML() (string, error) {
	x := struct {
		XMLName xml.Name        `xml:"domainbackup"`
		Mode    string          `xml:"mode,attr"`
		Server  xmlServer       `xml:"server"`
		Disks   []xmlBackupDisk `xml:"disks>disk"`
	}{Mode: "pull", Server: xmlServer{Transport: "unix", Socket: b.Socket}}
	if b.Socket == "" {
		x.Server = xmlServer{Transport: "tcp", Name: b.Host, Port: b.Port, TLS: "yes"}
	}
	for _, d := range b.Disks {
		if d.Leave {
			x.Disks = append(x.Disks, xmlBackupDisk{Name: d.Target, Backup: "no"})
			continue
		}
		one := xmlBackupDisk{
			Name: d.Target, Backup: "yes", Type: "file", Mode: "full", ExportName: d.Target,
			Driver: &xmlType{"qcow2"}, Scratch: &xmlFile{d.Scratch},
		}
		if d.Incremental != "" {
			one.Mode, one.Incremental, one.ExportBitmap = "incremental", d.Incremental, BitmapOf(d.Target)
		}
		x.Disks = append(x.Disks, one)
	}
	out, err := xml.Marshal(x)
	return string(out), err
}

// ParseBackup reads what libvirt says of the job that runs: its socket, or host and port.
func ParseBackup(text string) (*Backup, error) {
	var x struct {
		XMLName xml.Name  `xml:"domainbackup"`
		Server  xmlServer `xml:"server"`
		Disks   []struct {
			Name    string   `xml:"name,attr"`
			Backup  string   `xml:"backup,attr"`
			Scratch *xmlFile `xml:"scratch"`
		} `xml:"disks>disk"`
	}
	if err := xml.Unmarshal([]byte(text), &x); err != nil {
		return nil, fmt.Errorf("read the XML of the backup job: %w", err)
	}
	b := &Backup{Socket: x.Server.Socket, Host: x.Server.Name, Port: x.Server.Port}
	for _, d := range x.Disks {
		one := BackupDisk{Target: d.Name, Leave: d.Backup == "no"}
		if d.Scratch != nil {
			one.Scratch = d.Scratch.File
		}
		b.Disks = append(b.Disks, one)
	}
	return b, nil
}

// CheckpointXML describes a checkpoint with a bitmap of its name on some disks, and none on the
// others. With a domain's XML it is one that is to be defined again.
func CheckpointXML(name string, tracked, others []string, created int64, domain string) (string, error) {
	type disk struct {
		Name       string `xml:"name,attr"`
		Checkpoint string `xml:"checkpoint,attr"`
		Bitmap     string `xml:"bitmap,attr,omitempty"`
	}
	x := struct {
		XMLName xml.Name `xml:"domaincheckpoint"`
		Name    string   `xml:"name"`
		Created int64    `xml:"creationTime,omitempty"`
		Disks   []disk   `xml:"disks>disk"`
	}{Name: name, Created: created}
	for _, t := range tracked {
		x.Disks = append(x.Disks, disk{t, "bitmap", name})
	}
	for _, t := range others {
		x.Disks = append(x.Disks, disk{Name: t, Checkpoint: "no"})
	}
	out, err := xml.Marshal(x)
	if err != nil || domain == "" {
		return string(out), err
	}
	return strings.TrimSuffix(string(out), "</domaincheckpoint>") + domain + "</domaincheckpoint>", nil
}

// CheckpointSizes reads how many bytes changed of each disk since a checkpoint, from its XML with
// sizes.
func CheckpointSizes(text string) (map[string]int64, error) {
	var x struct {
		XMLName xml.Name `xml:"domaincheckpoint"`
		Disks   []struct {
			Name string `xml:"name,attr"`
			Size *int64 `xml:"size,attr"`
		} `xml:"disks>disk"`
	}
	if err := xml.Unmarshal([]byte(text), &x); err != nil {
		return nil, fmt.Errorf("read the XML of the checkpoint: %w", err)
	}
	out := map[string]int64{}
	for _, d := range x.Disks {
		if d.Size != nil {
			out[d.Name] = *d.Size
		}
	}
	return out, nil
}
