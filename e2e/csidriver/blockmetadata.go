package csidriver

import (
	"bytes"
	"context"
	"errors"
	"io"
	"os"
	"time"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"golang.org/x/sys/unix"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

// GetMetadataAllocated implements csi.SnapshotMetadataServer.
func (d *Driver) GetMetadataAllocated(req *csi.GetMetadataAllocatedRequest, st csi.SnapshotMetadata_GetMetadataAllocatedServer) error {
	return d.answer(st.Context(), request{target: req.GetSnapshotId(), offset: req.GetStartingOffset(),
		max: req.GetMaxResults(), secrets: req.GetSecrets()},
		func(t csi.BlockMetadataType, capacity int64, b []*csi.BlockMetadata) error {
			return st.Send(&csi.GetMetadataAllocatedResponse{BlockMetadataType: t, VolumeCapacityBytes: capacity, BlockMetadata: b})
		})
}

// GetMetadataDelta implements csi.SnapshotMetadataServer.
func (d *Driver) GetMetadataDelta(req *csi.GetMetadataDeltaRequest, st csi.SnapshotMetadata_GetMetadataDeltaServer) error {
	if req.GetBaseSnapshotId() == "" {
		return status.Error(codes.InvalidArgument, "a base snapshot is required")
	}
	return d.answer(st.Context(), request{base: req.GetBaseSnapshotId(), target: req.GetTargetSnapshotId(),
		offset: req.GetStartingOffset(), max: req.GetMaxResults(), secrets: req.GetSecrets()},
		func(t csi.BlockMetadataType, capacity int64, b []*csi.BlockMetadata) error {
			return st.Send(&csi.GetMetadataDeltaResponse{BlockMetadataType: t, VolumeCapacityBytes: capacity, BlockMetadata: b})
		})
}

type request struct {
	base, target string // base is empty for allocated blocks
	offset       int64
	max          int32
	secrets      map[string]string
}

type sendFunc func(csi.BlockMetadataType, int64, []*csi.BlockMetadata) error

func (d *Driver) answer(ctx context.Context, req request, send sendFunc) error {
	o, err := d.options()
	if err != nil {
		return err
	}
	m := o.Metadata
	if m.Absent {
		return status.Error(codes.Unimplemented, "this driver has no snapshot metadata")
	}
	if err := o.checkSecret(req.secrets); err != nil {
		return err
	}
	if code, _ := m.failCode(); code != codes.OK && (req.base != "" || !m.FailDeltaOnly) {
		if n := d.failedCalls.Add(1); m.FailCalls == 0 || n <= m.FailCalls {
			return status.Error(code, "failing as the options say")
		}
	}
	if req.target == "" {
		return status.Error(codes.InvalidArgument, "a snapshot is required")
	}
	if req.max < 0 {
		return status.Error(codes.InvalidArgument, "max_results is negative")
	}
	var target, base *snapshot
	if err := d.state.with(func(r *records) error {
		if target = r.Snaps[req.target]; target == nil || target.Deleted {
			return status.Errorf(codes.NotFound, "no snapshot %s", req.target)
		}
		if req.base == "" {
			return nil
		}
		if base = r.Snaps[req.base]; base == nil || base.Deleted && !m.BaseNotRequired {
			return status.Errorf(codes.NotFound, "no base snapshot %s", req.base)
		}
		if base.VolID != target.VolID {
			return status.Error(codes.InvalidArgument, "the snapshots are of different volumes")
		}
		if base.Created.After(target.Created) {
			return status.Error(codes.InvalidArgument, "the base snapshot is the younger one")
		}
		return nil
	}); err != nil {
		return internal(err)
	}
	if req.offset < 0 || req.offset > target.Size {
		return status.Errorf(codes.OutOfRange, "offset %d is outside of %d bytes", req.offset, target.Size)
	}
	if m.BlockModeOnly && target.Filesystem {
		return status.Error(codes.FailedPrecondition, "changed blocks are tracked for Block volumes only")
	}
	tf, err := os.Open(d.state.image(target.ID))
	if err != nil {
		return internal(err)
	}
	defer func() { _ = tf.Close() }()
	var bf *os.File
	if base != nil {
		if bf, err = os.Open(d.state.image(base.ID)); err != nil {
			return internal(err)
		}
		defer func() { _ = bf.Close() }()
	}
	s := newTupleStream(ctx, m, req, target.Size, send)
	return internal(changedBlocks(ctx, tf, bf, req.offset, s.blockSize, target.Size, s.add, s.end))
}

// changedBlocks calls add for each block from offset on that differs between base
// and target, or, without a base, is allocated in target. add ends the walk by
// returning errEnough.
func changedBlocks(ctx context.Context, target, base *os.File, offset, blockSize, size int64, add func(int64) error, end func() error) error {
	tb, bb := make([]byte, blockSize), make([]byte, blockSize)
	for o := offset / blockSize * blockSize; o < size; {
		if err := ctx.Err(); err != nil {
			return status.FromContextError(err).Err()
		}
		start, stop := nextData(target, o, size)
		if base != nil {
			if s, e := nextData(base, o, size); s < start {
				start, stop = s, e
			}
		}
		if start >= size {
			break
		}
		for o = max(o, start/blockSize*blockSize); o < stop; o += blockSize {
			if base != nil {
				if err := errors.Join(readBlock(target, tb, o), readBlock(base, bb, o)); err != nil {
					return err
				}
				if bytes.Equal(tb, bb) {
					continue
				}
			}
			if err := add(o); errors.Is(err, errEnough) {
				return end()
			} else if err != nil {
				return err
			}
		}
	}
	return end()
}

// nextData returns the next range at or after off that is no hole; at the end it is empty
// and at size.
func nextData(f *os.File, off, size int64) (start, end int64) {
	start, err := unix.Seek(int(f.Fd()), off, unix.SEEK_DATA)
	if err != nil || start > size {
		return size, size
	}
	end, err = unix.Seek(int(f.Fd()), start, unix.SEEK_HOLE)
	if err != nil || end > size {
		end = size
	}
	return start, end
}

// readBlock fills b; beyond the end of the file are zeros.
func readBlock(f *os.File, b []byte, off int64) error {
	n, err := f.ReadAt(b, off)
	if err != nil && !errors.Is(err, io.EOF) {
		return err
	}
	clear(b[n:])
	return nil
}

var errEnough = errors.New("enough")

// tupleStream makes messages of blocks and misbehaves as the options say.
type tupleStream struct {
	ctx       context.Context
	m         MetadataOptions
	blockSize int64
	max       int32
	capacity  int64
	send      sendFunc

	pending []*csi.BlockMetadata
	sent    int64 // tuples, including pending ones
	seen    int64 // blocks, also those left out
}

func newTupleStream(ctx context.Context, m MetadataOptions, req request, capacity int64, send sendFunc) *tupleStream {
	s := &tupleStream{ctx: ctx, m: m, blockSize: m.BlockSize, max: req.max, capacity: capacity, send: send}
	if s.blockSize == 0 {
		s.blockSize = defaultBlockSize
	}
	if s.max == 0 {
		s.max = m.MessageTuples
	}
	if s.max == 0 {
		s.max = defaultMessageTuples
	}
	return s
}

// add adds the block at off.
func (s *tupleStream) add(off int64) error {
	s.seen++
	if s.m.OmitEvery > 0 && s.seen%s.m.OmitEvery == 0 {
		return nil
	}
	n := min(s.blockSize, s.capacity-off)
	if last := len(s.pending) - 1; s.m.Variable && last >= 0 {
		if l := s.pending[last]; l.ByteOffset+l.SizeBytes == off {
			l.SizeBytes += n
			return nil
		}
	}
	if s.m.TruncateAfter > 0 && s.sent == s.m.TruncateAfter {
		return errEnough
	}
	if s.m.CutAfter > 0 && s.sent == s.m.CutAfter {
		if err := s.flush(); err != nil {
			return err
		}
		return status.Error(codes.Unavailable, "cut as the options say")
	}
	if len(s.pending) == int(s.max) {
		if err := s.flush(); err != nil {
			return err
		}
	}
	s.pending = append(s.pending, &csi.BlockMetadata{ByteOffset: off, SizeBytes: n})
	s.sent++
	return nil
}

// end sends the rest. If nothing changed there is no message at all.
func (s *tupleStream) end() error {
	return s.flush()
}

func (s *tupleStream) flush() error {
	if len(s.pending) == 0 {
		return nil
	}
	if s.m.MessageDelay > 0 {
		select {
		case <-time.After(time.Duration(s.m.MessageDelay)):
		case <-s.ctx.Done():
			return status.FromContextError(s.ctx.Err()).Err()
		}
	}
	t := csi.BlockMetadataType_FIXED_LENGTH
	if s.m.Variable {
		t = csi.BlockMetadataType_VARIABLE_LENGTH
	}
	err := s.send(t, s.capacity, s.pending)
	s.pending = nil
	return err
}
