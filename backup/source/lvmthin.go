package source

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"regexp"
	"strconv"
	"strings"
	"time"

	"github.com/varve-io/varve/backup/cbt"
	"github.com/varve-io/varve/internal/plain"
)

// lvmThin is a snapshot in a thin pool of LVM: its bytes come from its device, its changes from
// thin_delta, which compares it with the snapshot that the parent was read from.
type lvmThin struct {
	Session // of the device

	vg, name string
	lv       thinLV
	snapshot bool // of a volume of its pool
}

// thinLV is what lvs says of a logical volume.
type thinLV struct {
	UUID   string `json:"lv_uuid"`
	Name   string `json:"lv_name"`
	Pool   string `json:"pool_lv"`
	ID     string `json:"thin_id"` // in the pool's metadata
	Path   string `json:"lv_path"`
	Active string `json:"lv_active"`
	Origin string `json:"origin_uuid"` // empty if that is gone
}

// thinName is lvmthin://VG/LV, of the characters that LVM allows (lvm(8)); none of its parts can be
// an option.
var thinName = regexp.MustCompile(`^lvmthin://([A-Za-z0-9_+.][A-Za-z0-9_+.-]*)/([A-Za-z0-9_+.][A-Za-z0-9_+.-]*)$`)

// thinUUID is LVM's own form.
var thinUUID = regexp.MustCompile(`^[A-Za-z0-9]{6}(-[A-Za-z0-9]{4}){5}-[A-Za-z0-9]{6}$`)

func openLVMThin(ctx context.Context, uri string, opt Options) (Session, error) {
	m := thinName.FindStringSubmatch(uri)
	switch {
	case m == nil:
		return nil, fmt.Errorf("%w: %q; it is lvmthin://VG/SNAPSHOT, of letters, digits, '.', '+', '-' and '_'", ErrURI, uri)
	case opt.Track:
		return nil, fmt.Errorf("%s: %w: LVM keeps the snapshots; keep that of the last backup until the next one", uri, ErrNoTracking)
	case opt.Bitmap != "" || opt.ChangeID != "" || opt.BaseChangeID != "" || opt.Format != "":
		return nil, fmt.Errorf("%w: %s: its change ID is the UUID of the snapshot; leave out --bitmap, --change-id, --base-change-id and --format", ErrURI, uri)
	}
	t := &lvmThin{vg: m[1], name: m[2]}
	all, err := readThin(ctx, t.vg)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", uri, err)
	}
	for _, lv := range all {
		if lv.Name == t.name {
			t.lv = lv
		}
	}
	switch {
	case t.lv.Name == "":
		return nil, fmt.Errorf("%s: the volume group has no such logical volume", uri)
	case t.lv.Pool == "" || t.lv.ID == "":
		return nil, fmt.Errorf("%s: it is in no thin pool; back up its device, %s", uri, t.lv.Path)
	case t.lv.Active != "active":
		return nil, fmt.Errorf("%s: the snapshot is not active; activate it with 'lvchange -ay -K %s/%s'", uri, t.vg, t.name)
	}
	for _, lv := range all {
		// An external origin lies outside of the pool.
		t.snapshot = t.snapshot || lv.UUID == t.lv.Origin && lv.Pool == t.lv.Pool
	}
	t.Session, err = openLocal(t.lv.Path, opt)
	if err != nil {
		return nil, err
	}
	return t, nil
}

// Disks is the one.
func (t *lvmThin) Disks() []Disk {
	d := t.Session.Disks()[0]
	d.Kind = "LVM thin snapshot"
	target := t.lv.UUID
	if !t.snapshot {
		target = "" // what is written to it from now on, its own snapshots have too
		d.Notes = append(d.Notes, fmt.Sprintf("%s/%s is no snapshot of a volume in its pool: the next backup compares all of it", t.vg, t.name))
	}
	d.Changes = []cbt.Source{&lvmDelta{t}, wholeDisk{target: target}}
	return []Disk{d}
}

// readThin lists the logical volumes of a group.
func readThin(ctx context.Context, vg string) ([]thinLV, error) {
	text, err := output(ctx, 16<<20, "lvs", "lvm2", "--reportformat", "json", "-o", "lv_uuid,lv_name,pool_lv,thin_id,lv_path,lv_active,origin_uuid", "--", vg)
	if err != nil {
		return nil, err
	}
	return parseThin(text)
}

// parseThin reads what lvs prints.
func parseThin(text []byte) ([]thinLV, error) {
	var answer struct {
		Report []struct {
			LV []thinLV `json:"lv"`
		} `json:"report"`
	}
	if err := json.Unmarshal(text, &answer); err != nil {
		return nil, fmt.Errorf("read what lvs printed: %w", err)
	}
	var list []thinLV
	for _, r := range answer.Report {
		for _, lv := range r.LV {
			if _, err := strconv.ParseUint(lv.ID, 10, 24); lv.ID != "" && err != nil || !thinUUID.MatchString(lv.UUID) {
				return nil, fmt.Errorf("read what lvs printed: the logical volume %q has the UUID %q and the thin ID %q", lv.Name, lv.UUID, lv.ID)
			}
			list = append(list, lv)
		}
	}
	return list, nil
}

// lvmDelta runs thin_delta on the metadata of the pool, of which the kernel keeps a copy meanwhile.
type lvmDelta struct{ t *lvmThin }

// thinSource is the name of changes from thin_delta in records.
const thinSource = "thin_delta"

// Changes implements cbt.Source.
func (d *lvmDelta) Changes(ctx context.Context, req cbt.Request, emit func(cbt.Extent) error) (cbt.Report, error) {
	refuse := func(kind error, reason cbt.Reason, format string, args ...any) (cbt.Report, error) {
		return cbt.Report{}, &cbt.Error{Source: thinSource, Kind: kind, Reason: reason, Detail: fmt.Sprintf(format, args...)}
	}
	if req.Base == nil {
		return refuse(cbt.ErrNoBase, "", "thin_delta compares two snapshots")
	}
	id := req.Base.ChangeID
	if !thinUUID.MatchString(id) || id == d.t.lv.UUID {
		return refuse(cbt.ErrBaseMismatch, cbt.ReasonNoChangeID, "the parent was not made from an earlier snapshot: its change ID is %q", id)
	}
	base, err := d.t.base(ctx, id)
	if err != nil {
		return refuse(cbt.ErrUnavailable, cbt.ReasonNotFound, "%v", err)
	}
	// What was written to the base after its backup, its descendants share: the two must be snapshots of one volume. Ancestors
	// as lvs lists them do not show it: the removal of one cuts the list.
	if !d.t.snapshot || base.Origin != d.t.lv.Origin {
		return refuse(cbt.ErrBaseMismatch, cbt.ReasonBaseMismatch,
			"%s/%s and %s/%s, which the parent was read from, are not known to be snapshots of the same volume", d.t.vg, d.t.name, d.t.vg, base.Name)
	}
	pool := mapped(d.t.vg, d.t.lv.Pool)
	if _, err := output(ctx, 4096, "dmsetup", "dmsetup", "message", pool+"-tpool", "0", "reserve_metadata_snap"); err != nil {
		return refuse(cbt.ErrUnavailable, cbt.ReasonFailedPrecondition,
			"the metadata of the pool cannot be read beside its use: %v; if a backup was killed: 'dmsetup message %s-tpool 0 release_metadata_snap'", err, pool)
	}
	release := func() error {
		ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), time.Minute)
		defer cancel()
		_, err := output(ctx, 4096, "dmsetup", "dmsetup", "message", pool+"-tpool", "0", "release_metadata_snap")
		return err
	}
	list := &cbt.ThinDelta{Base: id, Target: d.t.lv.UUID}
	rep, printed, err := runTool(ctx, "thin_delta", "thin-provisioning-tools",
		[]string{"--metadata-snap", "--snap1", base.ID, "--snap2", d.t.lv.ID, "/dev/mapper/" + pool + "_tmeta"},
		func(out io.Reader) (cbt.Report, error) {
			list.List = out
			return list.Changes(ctx, req, emit)
		})
	if rerr := release(); rerr != nil && err == nil && printed == "" {
		return cbt.Report{}, fmt.Errorf("the metadata of the pool stays reserved: %w; run 'dmsetup message %s-tpool 0 release_metadata_snap'", rerr, pool)
	}
	switch {
	case err != nil:
		return cbt.Report{}, err
	case printed != "": // by thin_delta, of why it failed
		return refuse(cbt.ErrUnavailable, cbt.ReasonUnknown, "%s", printed)
	}
	// The number of a snapshot that was removed is given to another.
	if now, err := d.t.base(ctx, id); err != nil || now.ID != base.ID {
		return refuse(cbt.ErrUnavailable, cbt.ReasonNotFound, "the snapshot of the parent was removed meanwhile")
	}
	rep.Source = thinSource
	return rep, nil
}

// base finds the snapshot of the parent, and that of this backup as it was opened.
func (t *lvmThin) base(ctx context.Context, uuid string) (thinLV, error) {
	all, err := readThin(ctx, t.vg)
	if err != nil {
		return thinLV{}, err
	}
	var base thinLV
	same := false
	for _, lv := range all {
		if lv.UUID == uuid {
			base = lv
		}
		same = same || lv == t.lv
	}
	switch {
	case !same:
		return thinLV{}, fmt.Errorf("the snapshot %s/%s is another one than was opened", t.vg, t.name)
	case base.UUID == "":
		return thinLV{}, fmt.Errorf("the snapshot that the parent was read from (%s) is gone", uuid)
	case base.Pool != t.lv.Pool || base.ID == "":
		return thinLV{}, fmt.Errorf("the snapshot that the parent was read from (%s) is in another pool", uuid)
	}
	return base, nil
}

// mapped is device mapper's name of a logical volume: hyphens are doubled.
func mapped(vg, lv string) string {
	double := func(s string) string { return strings.ReplaceAll(s, "-", "--") }
	return double(vg) + "-" + double(lv)
}

// output is what a program printed, at most so many bytes.
func output(ctx context.Context, most int64, program, from string, args ...string) (text []byte, err error) {
	_, printed, err := runTool(ctx, program, from, args, func(out io.Reader) (cbt.Report, error) {
		text, err = io.ReadAll(io.LimitReader(out, most+1))
		if err == nil && int64(len(text)) > most {
			err = fmt.Errorf("%s printed more than %d bytes", program, most)
		}
		return cbt.Report{}, err
	})
	if printed != "" {
		err = errors.New(plain.Clip(printed, 1000))
	}
	return text, err
}

// wholeDisk lists all of a disk, which is compared with the base where there is one, and names the
// state for the next increment.
type wholeDisk struct{ target string }

// Changes implements cbt.Source.
func (w wholeDisk) Changes(ctx context.Context, req cbt.Request, emit func(cbt.Extent) error) (cbt.Report, error) {
	rep, err := cbt.Compare{}.Changes(ctx, req, emit)
	rep.Source, rep.BaseChangeID, rep.TargetChangeID = cmp.Or(rep.Source, "compare"), "", w.target
	rep.Exact, rep.Allocated = true, true
	return rep, err
}
