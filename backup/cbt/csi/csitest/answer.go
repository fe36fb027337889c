package csitest

import (
	"context"

	"github.com/kubernetes-csi/external-snapshot-metadata/pkg/api"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/varve-io/varve/backup/cbt"
)

const defaultPerMessage = 100

// GetMetadataDelta implements api.SnapshotMetadataServer.
func (s *Server) GetMetadataDelta(r *api.GetMetadataDeltaRequest, stream grpc.ServerStreamingServer[api.GetMetadataDeltaResponse]) error {
	return s.answer(stream.Context(), Call{
		Method: "delta", Token: r.GetSecurityToken(), Namespace: r.GetNamespace(), Name: r.GetTargetSnapshotName(),
		Base: r.GetBaseSnapshotId(), Offset: r.GetStartingOffset(), MaxResults: r.GetMaxResults(),
	}, func(kind api.BlockMetadataType, capacity int64, ranges []*api.BlockMetadata) error {
		return stream.Send(&api.GetMetadataDeltaResponse{BlockMetadataType: kind, VolumeCapacityBytes: capacity, BlockMetadata: ranges})
	})
}

// GetMetadataAllocated implements api.SnapshotMetadataServer.
func (s *Server) GetMetadataAllocated(r *api.GetMetadataAllocatedRequest, stream grpc.ServerStreamingServer[api.GetMetadataAllocatedResponse]) error {
	return s.answer(stream.Context(), Call{
		Method: "allocated", Token: r.GetSecurityToken(), Namespace: r.GetNamespace(), Name: r.GetSnapshotName(),
		Offset: r.GetStartingOffset(), MaxResults: r.GetMaxResults(),
	}, func(kind api.BlockMetadataType, capacity int64, ranges []*api.BlockMetadata) error {
		return stream.Send(&api.GetMetadataAllocatedResponse{BlockMetadataType: kind, VolumeCapacityBytes: capacity, BlockMetadata: ranges})
	})
}

type sendFunc func(api.BlockMetadataType, int64, []*api.BlockMetadata) error

// take records a call and returns the answer to it.
func (s *Server) take(c Call) (Script, Behaviour, bool) {
	s.mu.Lock()
	defer s.mu.Unlock()

	script, b := s.script, s.script.Then
	if n := len(s.calls); n < len(script.Calls) {
		b = script.Calls[n]
	}

	s.calls = append(s.calls, c)

	if b.DeltaOnly && c.Method != "delta" {
		b = Behaviour{}
	}
	return script, b, c.Token == s.token
}

func (s *Server) answer(ctx context.Context, c Call, send sendFunc) error {
	script, b, known := s.take(c)
	if !known {
		// Worse than any real service: it echoes the token.
		return status.Errorf(codes.Unauthenticated, "unknown token %s", c.Token)
	}

	list := script.Allocated
	if c.Method == "delta" {
		list = script.Delta
	}

	kind := api.BlockMetadataType_VARIABLE_LENGTH
	if script.Fixed > 0 {
		kind, list = api.BlockMetadataType_FIXED_LENGTH, blocks(list, script.Fixed, script.Capacity)
	}

	if b.End != Clean {
		list = list[:min(b.After, len(list))]
	}

	if err := tell(script, b, kind, from(list, c.Offset, b), c.MaxResults, send); err != nil {
		return err
	}

	switch b.End {
	case Status:
		return status.Error(b.Code, b.Message)
	case Drop:
		s.dropAll()
		return status.Error(codes.Unavailable, "dropped")
	case Stall:
		s.stalled <- struct{}{}
		<-ctx.Done()
		return status.FromContextError(ctx.Err()).Err()
	}
	return nil
}

// from returns the part of the list to send for a call from offset on.
func from(list []cbt.Extent, offset int64, b Behaviour) []cbt.Extent {
	if b.Repeat {
		return list
	}

	// A wrong range has no usable end; only a right one is skipped.
	for len(list) > 0 && list[0].Length > 0 && list[0].Offset >= 0 && list[0].Length <= offset-list[0].Offset {
		list = list[1:]
	}

	if offset > 0 && b.Before > 0 && len(list) > 0 {
		first := list[0]
		start := max(0, min(offset, first.Offset)-b.Before)
		first.Offset, first.Length = start, first.End()-start
		list = append([]cbt.Extent{first}, list[1:]...)
	}
	return list
}

// tell sends the list in messages.
func tell(script Script, b Behaviour, kind api.BlockMetadataType, list []cbt.Extent, most int32, send sendFunc) error {
	size := script.PerMessage
	if size == 0 {
		size = defaultPerMessage
	}

	if most > 0 {
		size = min(size, int(most))
	}

	capacity := script.Capacity

	for n := 0; len(list) > 0; n++ {
		if n == 1 && b.Capacity != 0 {
			capacity = b.Capacity
		}

		if n == 1 && b.Type != 0 {
			kind = b.Type
		}

		count := min(size, len(list))
		message := make([]*api.BlockMetadata, count)

		for i, e := range list[:count] {
			message[i] = &api.BlockMetadata{ByteOffset: e.Offset, SizeBytes: e.Length}
		}

		if err := send(kind, capacity, message); err != nil {
			return err
		}

		list = list[count:]
	}
	return nil
}

// blocks returns the blocks of a length that touch the list, in order, the last one cut at
// the capacity.
func blocks(list []cbt.Extent, length, capacity int64) []cbt.Extent {
	var out []cbt.Extent

	for offset := int64(0); offset < capacity; offset += length {
		block := cbt.Extent{Offset: offset, Length: min(length, capacity-offset)}

		for _, e := range list {
			if e.Offset < block.End() && block.Offset < e.End() {
				out = append(out, block)
				break
			}
		}
	}
	return out
}
