package v1alpha1

// Types of conditions.
const (
	ConditionReady         = "Ready"         // BackupStore, Repository, BackupPolicy, RecoverySource
	ConditionMaintained    = "Maintained"    // BackupStore, Repository: how the last maintenance ended
	ConditionPinned        = "Pinned"        // BackupStore: whether its pins are on the points
	ConditionProtected     = "Protected"     // ProtectedVolume
	ConditionComplete      = "Complete"      // runs of all kinds: Unknown until the end
	ConditionFailed        = "Failed"        // runs of all kinds: set once it failed
	ConditionInconsistent  = "Inconsistent"  // VolumeRestore: the claim's volume is half written
	ConditionRetrying      = "Retrying"      // VolumeBackup: since when its step meets errors
	ConditionChangedBlocks = "ChangedBlocks" // VolumeBackup: whether the driver reported them, and why not
	ConditionConsistent    = "Consistent"    // VolumeBackup: whether its hooks held the applications still
)

// Reasons of conditions and of events. docs/kubernetes.md says for each what it means and
// what to do.
const (
	// Of stores.
	ReasonConnected             = "Connected"
	ReasonCredentialsMissing    = "CredentialsMissing"
	ReasonWrongPassword         = "WrongPassword"
	ReasonRepositoryUnreachable = "RepositoryUnreachable"
	ReasonOtherRepository       = "OtherRepository"
	ReasonInvalidSpec           = "InvalidSpec"
	ReasonStoreNotReady         = "StoreNotReady"
	ReasonLeftBehind            = "LeftBehind"
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
	ReasonRunRefused        = "RunRefused"
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

	// Of hooks.
	ReasonFreezing      = "Freezing"
	ReasonHeld          = "Held"
	ReasonHookFailed    = "HookFailed"
	ReasonHookForbidden = "HookForbidden"
	ReasonNoPod         = "NoPod"
	ReasonHoldLost      = "HoldLost"
	ReasonThawFailed    = "ThawFailed"
	ReasonGroupFailed   = "GroupFailed"
	ReasonGroupMembers  = "GroupMembers"
	ReasonGroupSnapshot = "GroupSnapshot"

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
	ReasonStartingAgain        = "StartingAgain"
	ReasonHandingOver          = "HandingOver"

	// Of restores into claims that have data.
	ReasonClaimInUse       = "ClaimInUse"
	ReasonOtherRestore     = "OtherRestore"
	ReasonNoGroup          = "NoGroup"
	ReasonReplacing        = "ReplacingVolume"
	ReasonReplaced         = "ReplacedVolume"
	ReasonPutBack          = "PutBack"
	ReasonVolumeChanged    = "VolumeChanged"
	ReasonUndone           = "Undone"
	ReasonNothingToUndo    = "NothingToUndo"
	ReasonScaledDown       = "ScaledDown"
	ReasonScaledUp         = "ScaledUp"
	ReasonScaleForbidden   = "ScaleForbidden"
	ReasonNotScalable      = "NotScalable"
	ReasonScaleFought      = "ScaleFought"
	ReasonWritingInPlace   = "WritingInPlace"
	ReasonConsistent       = "Consistent"
	ReasonSafetySnapshot   = "SafetySnapshot"
	ReasonOldVolumeExpired = "OldVolumeExpired"

	// Of DumpRestores.
	ReasonFed        = "Fed"
	ReasonFeedFailed = "FeedFailed"
	ReasonFeedLost   = "FeedLost"
)
