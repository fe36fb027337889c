package v1alpha1

// Types of conditions.
const (
	ConditionReady         = "Ready"         // BackupStore, Repository, BackupPolicy, RecoverySource
	ConditionMaintained    = "Maintained"    // BackupStore, Repository: how the last maintenance ended
	ConditionPinned        = "Pinned"        // BackupStore: whether its pins are on the points
	ConditionProtected     = "Protected"     // ProtectedVolume
	ConditionComplete      = "Complete"      // VolumeBackup, VolumePopulation
	ConditionFailed        = "Failed"        // VolumeBackup
	ConditionRetrying      = "Retrying"      // VolumeBackup: since when its step meets errors
	ConditionChangedBlocks = "ChangedBlocks" // VolumeBackup: whether the driver told them, and why not
)

// Reasons of conditions and of events. docs/kubernetes.md says for each what it means
// and what to do.
const (
	// Of stores.
	ReasonConnected             = "Connected"
	ReasonCredentialsMissing    = "CredentialsMissing"
	ReasonWrongPassword         = "WrongPassword"
	ReasonRepositoryUnreachable = "RepositoryUnreachable"
	ReasonOtherRepository       = "OtherRepository"
	ReasonInvalidSpec           = "InvalidSpec"
	ReasonStoreNotReady         = "StoreNotReady"
	ReasonStoreNotFound         = "StoreNotFound"
	ReasonNamespaceNotAllowed   = "NamespaceNotAllowed"
	ReasonReadOnly              = "ReadOnly"
	ReasonPinned                = "Pinned"
	ReasonPinFailed             = "PinFailed"

	// Of backups.
	ReasonScheduled         = "Scheduled"
	ReasonQueued            = "Queued"
	ReasonRunning           = "Running"
	ReasonSucceeded         = "Succeeded"
	ReasonBackupFailed      = "BackupFailed"
	ReasonClaimNotFound     = "ClaimNotFound"
	ReasonClaimNotBound     = "ClaimNotBound"
	ReasonNotCSI            = "NotCSI"
	ReasonNoSnapshotClass   = "NoSnapshotClass"
	ReasonSnapshotFailed    = "SnapshotFailed"
	ReasonSnapshotGone      = "SnapshotGone"
	ReasonBlockUnsupported  = "BlockUnsupported"
	ReasonDeviceNotReadable = "DeviceNotReadable"
	ReasonDeviceShort       = "DeviceShort"
	ReasonMoverFailed       = "MoverFailed"
	ReasonCloneFailed       = "CloneFailed"
	ReasonStartTooLate      = "StartTooLate"
	ReasonOverlaps          = "Overlaps"
	ReasonPaused            = "Paused"
	ReasonNoRun             = "NoRunYet"
	ReasonCompared          = "Compared"
	ReasonRetentionFailed   = "RetentionFailed"
	ReasonRetentionFloor    = "RetentionFloor"
	ReasonNewLineage        = "NewLineage"
	ReasonMaintained        = "Maintained"
	ReasonSourceLied        = "ChangedBlocksMissing"
	ReasonDelta             = "Delta"
	ReasonAllocated         = "Allocated"
	ReasonFallback          = "Fallback"

	// Of restores.
	ReasonWaitingForConsumer   = "WaitingForFirstConsumer"
	ReasonSourceNotFound       = "SourceNotFound"
	ReasonNoRecoveryPoint      = "NoRecoveryPoint"
	ReasonNotGranted           = "NotGranted"
	ReasonPopulating           = "Populating"
	ReasonPopulated            = "Populated"
	ReasonClaimTooSmall        = "ClaimTooSmall"
	ReasonVolumeModeMismatch   = "VolumeModeMismatch"
	ReasonUnknownFileSystem    = "UnknownFileSystem"
	ReasonTenantSecrets        = "TenantSecrets"
	ReasonNamespaceInReference = "NamespaceInDataSourceRef"
	ReasonBoundWithoutUs       = "BoundWithoutVarve"
	ReasonRestoreFailed        = "RestoreFailed"
	ReasonRestoreError         = "RestoreError"
	ReasonMoverWaits           = "MoverWaits"
	ReasonNoStorageClass       = "NoStorageClass"
	ReasonProvisioning         = "Provisioning"
	ReasonStartingAnew         = "StartingAnew"
	ReasonHandingOver          = "HandingOver"
)
