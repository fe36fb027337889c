package csi

import "fmt"

// VSphereDriver is the name of VMware's driver.
const VSphereDriver = "csi.vsphere.vmware.com"

// vSphereChangeID is the annotation in which VMware's driver writes, on the VolumeSnapshot,
// the ID that its delta accepts as the base. It does not accept the snapshot handle.
const vSphereChangeID = "csi.vsphere.volume/change-id"

// Annotations of a VolumeSnapshot and of its VolumeSnapshotContent.
type Annotations struct{ Snapshot, Content map[string]string }

// ChangeIDFunc finds the base ID for a driver's delta. An error means that the driver has not
// written it: the point is then recorded without, and the next one is no delta.
type ChangeIDFunc func(handle string, a Annotations) (string, error)

// changeIDs are the drivers whose delta does not take the snapshot handle as its base.
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

// ChangeID returns the change ID of a snapshot: its handle, as in KEP-3314, or what the
// driver is known to need instead. Copies of a VolumeSnapshot must keep its annotations.
func ChangeID(driver, handle string, a Annotations) (string, error) {
	if handle == "" {
		return "", fmt.Errorf("the snapshot of driver %s has no handle yet", driver)
	}

	if find := changeIDs[driver]; find != nil {
		return find(handle, a)
	}
	return handle, nil
}
