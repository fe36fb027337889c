// Package proto names the numbers of the NBD wire protocol: magics, options,
// replies, commands, flags and errors.
//
// Source of every value: doc/proto.md of NetworkBlockDevice/nbd; those of
// extended headers: the same file on its branch extension-ext-header. All
// integers on the wire are big-endian.
package proto

// DefaultPort is the TCP port IANA assigned to NBD.
const DefaultPort = 10809

// Magic numbers.
const (
	MagicInit            uint64 = 0x4e42444d41474943 // "NBDMAGIC"
	MagicOption          uint64 = 0x49484156454f5054 // "IHAVEOPT"
	MagicOptionReply     uint64 = 0x0003e889045565a9
	MagicRequest         uint32 = 0x25609513
	MagicSimpleReply     uint32 = 0x67446698
	MagicStructuredReply uint32 = 0x668e33ef
	MagicExtendedRequest uint32 = 0x21e41c71
	MagicExtendedReply   uint32 = 0x6e8a278c
)

// Header sizes on the wire, in bytes.
const (
	OptionHeaderSize          = 16 // magic, option, length
	OptionReplyHeaderSize     = 20 // magic, option, type, length
	RequestSize               = 28
	ExtendedRequestSize       = 32
	SimpleReplySize           = 16
	StructuredReplyHeaderSize = 20
	ExtendedReplyHeaderSize   = 32
)

// Limits.
const (
	// MaxString is the longest string (name, description, query, message).
	MaxString = 4096
	// MaxPayload is the payload every peer can rely on: 32 MiB.
	MaxPayload = 32 << 20
	// MaxExtents is the most descriptors in one block status chunk.
	MaxExtents = 1 << 20
)

// Handshake flags, server and client side.
const (
	FlagFixedNewstyle  uint16 = 1 << 0
	FlagNoZeroes       uint16 = 1 << 1
	FlagCFixedNewstyle uint32 = 1 << 0
	FlagCNoZeroes      uint32 = 1 << 1
)

// TransmissionFlags tell a client what an export can do.
type TransmissionFlags uint16

// Transmission flags.
const (
	FlagHasFlags TransmissionFlags = 1 << iota
	FlagReadOnly
	FlagSendFlush
	FlagSendFUA
	FlagRotational
	FlagSendTrim
	FlagSendWriteZeroes
	FlagSendDF
	FlagCanMultiConn
	FlagSendResize
	FlagSendCache
	FlagSendFastZero
	FlagBlockStatusPayload
)

// Option is the number of a negotiation option.
type Option uint32

// Options.
const (
	OptExportName      Option = 1
	OptAbort           Option = 2
	OptList            Option = 3
	OptStartTLS        Option = 5
	OptInfo            Option = 6
	OptGo              Option = 7
	OptStructuredReply Option = 8
	OptListMetaContext Option = 9
	OptSetMetaContext  Option = 10
	OptExtendedHeaders Option = 11
)

// Reply is the type of an answer to an option. Errors have bit 31 set.
type Reply uint32

// Replies to options.
const (
	RepAck         Reply = 1
	RepServer      Reply = 2
	RepInfo        Reply = 3
	RepMetaContext Reply = 4

	RepErrUnsup         Reply = 1<<31 + 1
	RepErrPolicy        Reply = 1<<31 + 2
	RepErrInvalid       Reply = 1<<31 + 3
	RepErrPlatform      Reply = 1<<31 + 4
	RepErrTLSRequired   Reply = 1<<31 + 5
	RepErrUnknown       Reply = 1<<31 + 6
	RepErrShutdown      Reply = 1<<31 + 7
	RepErrBlockSize     Reply = 1<<31 + 8
	RepErrTooBig        Reply = 1<<31 + 9
	RepErrExtHeaderReqd Reply = 1<<31 + 10
)

// IsError reports whether the reply refuses the option.
func (r Reply) IsError() bool { return r&(1<<31) != 0 }

// String names the reply as the protocol document does.
func (r Reply) String() string {
	switch r {
	case RepAck:
		return "ACK"
	case RepServer:
		return "SERVER"
	case RepInfo:
		return "INFO"
	case RepMetaContext:
		return "META_CONTEXT"
	case RepErrUnsup:
		return "ERR_UNSUP"
	case RepErrPolicy:
		return "ERR_POLICY"
	case RepErrInvalid:
		return "ERR_INVALID"
	case RepErrPlatform:
		return "ERR_PLATFORM"
	case RepErrTLSRequired:
		return "ERR_TLS_REQD"
	case RepErrUnknown:
		return "ERR_UNKNOWN"
	case RepErrShutdown:
		return "ERR_SHUTDOWN"
	case RepErrBlockSize:
		return "ERR_BLOCK_SIZE_REQD"
	case RepErrTooBig:
		return "ERR_TOO_BIG"
	case RepErrExtHeaderReqd:
		return "ERR_EXT_HEADER_REQD"
	}
	return "unknown reply"
}

// Information types of INFO and GO.
const (
	InfoExport      uint16 = 0
	InfoName        uint16 = 1
	InfoDescription uint16 = 2
	InfoBlockSize   uint16 = 3
)

// Command is the type of a transmission request.
type Command uint16

// Commands.
const (
	CmdRead        Command = 0
	CmdWrite       Command = 1
	CmdDisconnect  Command = 2
	CmdFlush       Command = 3
	CmdTrim        Command = 4
	CmdCache       Command = 5
	CmdWriteZeroes Command = 6
	CmdBlockStatus Command = 7
)

// String is the command in lower case, as used in logs and metric labels.
func (c Command) String() string {
	switch c {
	case CmdRead:
		return "read"
	case CmdWrite:
		return "write"
	case CmdDisconnect:
		return "disconnect"
	case CmdFlush:
		return "flush"
	case CmdTrim:
		return "trim"
	case CmdCache:
		return "cache"
	case CmdWriteZeroes:
		return "zero"
	case CmdBlockStatus:
		return "status"
	}
	return "unknown"
}

// Command flags.
const (
	CmdFlagFUA        uint16 = 1 << 0
	CmdFlagNoHole     uint16 = 1 << 1
	CmdFlagDF         uint16 = 1 << 2
	CmdFlagReqOne     uint16 = 1 << 3
	CmdFlagFastZero   uint16 = 1 << 4
	CmdFlagPayloadLen uint16 = 1 << 5
)

// ReplyFlagDone marks the last chunk of a structured or extended reply.
const ReplyFlagDone uint16 = 1

// Chunk types. Errors have bit 15 set.
const (
	ChunkNone           uint16 = 0
	ChunkOffsetData     uint16 = 1
	ChunkOffsetHole     uint16 = 2
	ChunkBlockStatus    uint16 = 5
	ChunkBlockStatusExt uint16 = 6
	ChunkError          uint16 = 1<<15 + 1
	ChunkErrorOffset    uint16 = 1<<15 + 2
)

// The standard context and its state bits.
const (
	ContextAllocation        = "base:allocation"
	StateHole         uint32 = 1 << 0
	StateZero         uint32 = 1 << 1
)

// ContextDirtyBitmap begins the names of qemu's contexts for what has changed
// (docs/interop/nbd.txt of qemu).
const ContextDirtyBitmap = "qemu:dirty-bitmap:"

// Errno is an error number of the protocol; it is an error itself.
type Errno uint32

// Error numbers.
const (
	EPERM     Errno = 1
	EIO       Errno = 5
	ENOMEM    Errno = 12
	EINVAL    Errno = 22
	ENOSPC    Errno = 28
	EOVERFLOW Errno = 75
	ENOTSUP   Errno = 95
	ESHUTDOWN Errno = 108
)

// Error is the text errno users know.
func (e Errno) Error() string {
	switch e {
	case 0:
		return "success"
	case EPERM:
		return "operation not permitted"
	case EIO:
		return "input/output error"
	case ENOMEM:
		return "cannot allocate memory"
	case EINVAL:
		return "invalid argument"
	case ENOSPC:
		return "no space left on device"
	case EOVERFLOW:
		return "value too large"
	case ENOTSUP:
		return "operation not supported"
	case ESHUTDOWN:
		return "server is shutting down"
	}
	return "unknown NBD error"
}
