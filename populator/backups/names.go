package backups

import (
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"strings"

	"k8s.io/apimachinery/pkg/types"

	"github.com/varve-io/varve/api/v1alpha1"
	"github.com/varve-io/varve/populator/mover"
	"github.com/varve-io/varve/populator/store"
)

// All objects of a run are named after its UID, so that creating them is idempotent, and
// labelled with it, so that they are found after the run's own object was deleted.

// Role of the objects of backups, in label mover.LabelRole.
const Role = "backup"

// LabelVolume is a short name of a claim and store: runs with the same one run one at a
// time, and share at most one retained base.
const LabelVolume = "varve.io/volume"

// LabelOrigin is on the snapshot in the claim's namespace, and on its content.
const LabelOrigin = "varve.io/origin"

func originName(uid types.UID) string { return "varve-" + string(uid) }
func twinName(uid types.UID) string   { return "varve-twin-" + string(uid) }

func clonePrefix(uid types.UID) string        { return "varve-" + string(uid) + "-c" }
func cloneName(uid types.UID, n int32) string { return fmt.Sprint(clonePrefix(uid), n) }
func jobName(uid types.UID, n int32) string   { return fmt.Sprintf("varve-%s-%d", uid, n) }
func secretName(uid types.UID) string         { return "varve-" + string(uid) + "-store" }

// volumeLabel returns the label of a claim in a store.
func volumeLabel(claim types.UID, k store.Key) string {
	sum := sha256.Sum256([]byte(string(claim) + "\n" + k.String()))
	return hex.EncodeToString(sum[:12])
}

// ProtectedVolumeName returns the name of the ProtectedVolume of a claim and store:
// readable and unique.
func ProtectedVolumeName(claim string, ref v1alpha1.StoreReference) string {
	kind := ref.Kind
	if kind == "" {
		kind = v1alpha1.StoreKindBackupStore
	}
	sum := sha256.Sum256([]byte(claim + "\n" + string(kind) + "\n" + ref.Name))
	const most = 200
	return claim[:min(len(claim), most)] + "-" + hex.EncodeToString(sum[:5])
}

// labels returns the labels of all objects of a run.
func (r *run) labels() map[string]string {
	l := mover.RunLabels(Role, r.vb.UID)
	if r.vb.Status.ClaimUID != "" {
		l[LabelVolume] = volumeLabel(r.vb.Status.ClaimUID, r.key())
	}
	if r.inGroupSnapshot() {
		l[LabelGroup] = string(r.vb.Status.Group.UID)
	}
	return l
}

func (r *run) annotations() map[string]string {
	return map[string]string{mover.AnnotationOwner: "VolumeBackup/" + r.vb.Namespace + "/" + r.vb.Name}
}

func (r *run) key() store.Key { return store.KeyOf(r.vb.Spec.StoreRef, r.vb.Namespace) }

// ownerKey reads mover.AnnotationOwner.
func ownerKey(owner string) (types.NamespacedName, bool) {
	parts := strings.Split(owner, "/")
	if len(parts) != 3 || parts[0] != "VolumeBackup" {
		return types.NamespacedName{}, false
	}
	return types.NamespacedName{Namespace: parts[1], Name: parts[2]}, true
}
