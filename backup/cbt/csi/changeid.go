package csi

import "fmt"

// VSphereDriver is the name of VMware's driver.
const VSphereDriver = "csi.vsphere.vmware.com"

// vSphereChangeID is where VMware's driver notes, on the VolumeSnapshot, the ID that its
// delta takes as the base. Its snapshot handle will not do.
const vSphereChangeID = "csi.vsphere.volume/change-id"

// Annotations are those of a VolumeSnapshot and of its VolumeSnapshotContent.
type Annotations struct{ Snapshot, Content map[string]string }

// ChangeIDFunc finds what a driver's delta takes as the base. An error means that the
// driver has not told it: a point is then recorded without, and the next one is
// no delta.
type ChangeIDFunc func(handle string, a Annotations) (string, error)

// changeIDs are the drivers whose delta takes another base than the snapshot handle.
var changeIDs = map[string]ChangeIDFunc{
	VSphereDriver: func(_ string, a Annotations) (string, error) {
		for _, annotations := range []map[string]string{a.Snapshot, a.Content} {
			if id := annotations[vSphereChangeID]; id != "" {
				return id, nil
			}
		}

		return "", fmt.Errorf("the VolumeSnapshot has no annotation %s: is change tracking on for this volume?", vSphereChangeID)
	},
}

// ChangeID is the change ID of a snapshot: its handle, as KEP-3314 has it, or what the
// driver is known to want instead. Copies of a VolumeSnapshot must carry its
// annotations along.
func ChangeID(driver, handle string, a Annotations) (string, error) {
	if handle == "" {
		return "", fmt.Errorf("the snapshot of driver %s has no handle yet", driver)
	}

	if find := changeIDs[driver]; find != nil {
		return find(handle, a)
	}

	return handle, nil
}
