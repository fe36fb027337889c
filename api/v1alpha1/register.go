package v1alpha1

import (
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"
)

// GroupVersion of the objects of this package.
var GroupVersion = schema.GroupVersion{Group: "varve.io", Version: "v1alpha1"}

// AddToScheme adds the objects of this package to a scheme.
func AddToScheme(s *runtime.Scheme) error {
	s.AddKnownTypes(GroupVersion,
		&BackupStore{}, &BackupStoreList{},
		&Repository{}, &RepositoryList{},
		&BackupPolicy{}, &BackupPolicyList{},
		&ProtectedVolume{}, &ProtectedVolumeList{},
		&VolumeBackup{}, &VolumeBackupList{},
		&RecoverySource{}, &RecoverySourceList{},
		&VolumePopulation{}, &VolumePopulationList{},
		&VolumeReplacement{}, &VolumeReplacementList{},
		&VolumeRestore{}, &VolumeRestoreList{},
		&DumpRestore{}, &DumpRestoreList{},
	)
	metav1.AddToGroupVersion(s, GroupVersion)
	return nil
}
