package framework

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/base64"
	"errors"
	"fmt"
	"io"
	"strings"

	snapshotmetadata "github.com/kubernetes-csi/external-snapshot-metadata/pkg/api"
	snapshotv1 "github.com/kubernetes-csi/external-snapshotter/client/v8/apis/volumesnapshot/v1"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"
	authenticationv1 "k8s.io/api/authentication/v1"
	corev1 "k8s.io/api/core/v1"
	rbacv1 "k8s.io/api/rbac/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"github.com/varve-io/varve/e2e/cluster"
)

// Extent is a run of bytes of a disk.
type Extent struct{ Offset, Length int64 }

// Blocks is the metadata sidecar's answer about a snapshot.
type Blocks struct {
	Variable bool
	Capacity int64 // 0 if there was no message
	Extents  []Extent
	Messages int
}

// BlockService calls a driver's metadata sidecar as a backup application does: found
// through its SnapshotMetadataService, over TLS, as a service account with only the
// client's rights.
type BlockService struct {
	f      *F
	client snapshotmetadata.SnapshotMetadataClient
	token  string
}

// BlockServiceAccount is the service account that BlockService acts as, in the test's
// namespace.
const BlockServiceAccount = "block-reader"

// BlockService connects to a driver's sidecar.
func (f *F) BlockService(d *cluster.Driver) *BlockService {
	f.T.Helper()
	return f.BlockServiceWithToken(d, f.blockToken(d.Audience()))
}

// BlockServiceWithToken is BlockService with the caller's token.
func (f *F) BlockServiceWithToken(d *cluster.Driver, token string) *BlockService {
	f.T.Helper()
	ctx := f.T.Context()
	svc := &unstructured.Unstructured{}
	svc.SetGroupVersionKind(schema.GroupVersionKind{Group: "cbt.storage.k8s.io", Version: "v1beta1", Kind: "SnapshotMetadataService"})
	if err := f.Client.Get(ctx, client.ObjectKey{Name: d.Name}, svc); err != nil {
		f.T.Fatal(err)
	}
	field := func(name string) string {
		s, _, err := unstructured.NestedString(svc.Object, "spec", name)
		if err != nil || s == "" {
			f.T.Fatalf("SnapshotMetadataService %s has no %s", d.Name, name)
		}
		return s
	}
	ca, err := base64.StdEncoding.DecodeString(field("caCert"))
	if err != nil {
		f.T.Fatal(err)
	}
	pool := x509.NewCertPool()
	if !pool.AppendCertsFromPEM(ca) {
		f.T.Fatal("the service's CA certificate is not PEM")
	}
	conn, err := grpc.NewClient(field("address"), grpc.WithTransportCredentials(credentials.NewTLS(&tls.Config{RootCAs: pool, MinVersion: tls.VersionTLS12})))
	if err != nil {
		f.T.Fatal(err)
	}
	f.T.Cleanup(func() { _ = conn.Close() })
	return &BlockService{f: f, client: snapshotmetadata.NewSnapshotMetadataClient(conn), token: token}
}

func (f *F) blockToken(audience string) string {
	ctx := f.T.Context()
	account := &corev1.ServiceAccount{ObjectMeta: metav1.ObjectMeta{Namespace: f.Namespace, Name: BlockServiceAccount}}
	if err := f.Client.Create(ctx, account); client.IgnoreAlreadyExists(err) != nil {
		f.T.Fatal(err)
	}
	binding := &rbacv1.ClusterRoleBinding{
		ObjectMeta: metav1.ObjectMeta{Name: f.Namespace + "-" + BlockServiceAccount},
		RoleRef:    rbacv1.RoleRef{APIGroup: rbacv1.GroupName, Kind: "ClusterRole", Name: "external-snapshot-metadata-client-runner"},
		Subjects:   []rbacv1.Subject{{Kind: rbacv1.ServiceAccountKind, Namespace: f.Namespace, Name: BlockServiceAccount}},
	}
	if err := f.Client.Create(ctx, binding); client.IgnoreAlreadyExists(err) != nil {
		f.T.Fatal(err)
	}
	f.T.Cleanup(func() {
		if err := client.IgnoreNotFound(f.Client.Delete(context.Background(), binding)); err != nil {
			f.T.Error(err)
		}
	})
	tr, err := f.Clientset.CoreV1().ServiceAccounts(f.Namespace).CreateToken(ctx, BlockServiceAccount,
		&authenticationv1.TokenRequest{Spec: authenticationv1.TokenRequestSpec{Audiences: []string{audience}}}, metav1.CreateOptions{})
	if err != nil {
		f.T.Fatal(err)
	}
	return tr.Status.Token
}

// Allocated lists the blocks that hold data in a snapshot, from an offset on.
func (s *BlockService) Allocated(ctx context.Context, snap *snapshotv1.VolumeSnapshot, from int64) (Blocks, error) {
	st, err := s.client.GetMetadataAllocated(ctx, &snapshotmetadata.GetMetadataAllocatedRequest{
		SecurityToken: s.token, Namespace: snap.Namespace, SnapshotName: snap.Name, StartingOffset: from})
	if err != nil {
		return Blocks{}, err
	}
	return receive(st)
}

// Delta lists the blocks that changed between two snapshots, from an offset on. The
// base is named by its handle.
func (s *BlockService) Delta(ctx context.Context, base string, target *snapshotv1.VolumeSnapshot, from int64) (Blocks, error) {
	st, err := s.client.GetMetadataDelta(ctx, &snapshotmetadata.GetMetadataDeltaRequest{
		SecurityToken: s.token, Namespace: target.Namespace, BaseSnapshotId: base, TargetSnapshotName: target.Name, StartingOffset: from})
	if err != nil {
		return Blocks{}, err
	}
	return receive(st)
}

type message interface {
	GetBlockMetadataType() snapshotmetadata.BlockMetadataType
	GetVolumeCapacityBytes() int64
	GetBlockMetadata() []*snapshotmetadata.BlockMetadata
}

// receive reads a stream to its end and checks it against KEP-3314: one type, one
// capacity, rising offsets, nothing beyond the end. What was received before an error is
// returned with it.
func receive[M any, P interface {
	*M
	message
}](st grpc.ServerStreamingClient[M]) (Blocks, error) {
	var b Blocks
	end := int64(0)
	for {
		m, err := st.Recv()
		if errors.Is(err, io.EOF) {
			return b, nil
		}
		if err != nil {
			return b, err
		}
		p := P(m)
		variable := p.GetBlockMetadataType() == snapshotmetadata.BlockMetadataType_VARIABLE_LENGTH
		if b.Messages > 0 && (variable != b.Variable || p.GetVolumeCapacityBytes() != b.Capacity) {
			return b, errors.New("the sidecar changed type or capacity within a stream")
		}
		b.Messages++
		b.Variable, b.Capacity = variable, p.GetVolumeCapacityBytes()
		for _, t := range p.GetBlockMetadata() {
			if t.GetByteOffset() < end || t.GetSizeBytes() <= 0 || t.GetByteOffset() > b.Capacity-t.GetSizeBytes() {
				return b, fmt.Errorf("the sidecar sent %d bytes at %d after %d of %d", t.GetSizeBytes(), t.GetByteOffset(), end, b.Capacity)
			}
			end = t.GetByteOffset() + t.GetSizeBytes()
			b.Extents = append(b.Extents, Extent{t.GetByteOffset(), t.GetSizeBytes()})
		}
	}
}

// Verify checks a delta: copying the listed extents from target to base must make the two
// disks equal. Both are devices in the pod; base is changed. It reports whether they are
// equal.
func (f *F) Verify(pod, base, target string, extents []Extent) bool {
	f.T.Helper()
	const sector = 512
	var script strings.Builder
	for _, e := range extents {
		if e.Offset%sector != 0 || e.Length%sector != 0 {
			f.T.Fatalf("extent %+v does not fall on sectors", e)
		}
		unit := int64(sector)
		for unit < 1<<20 && e.Offset%(2*unit) == 0 && e.Length%(2*unit) == 0 {
			unit *= 2
		}
		fmt.Fprintf(&script, "dd if=%s of=%s bs=%d skip=%d seek=%d count=%d conv=notrunc 2>/dev/null\n",
			target, base, unit, e.Offset/unit, e.Offset/unit, e.Length/unit)
	}
	if _, err := f.TryExec(f.T.Context(), pod, strings.NewReader(script.String()), "sh -e; sync"); err != nil {
		f.T.Fatal(err)
	}
	return f.SHA256(pod, base) == f.SHA256(pod, target)
}
