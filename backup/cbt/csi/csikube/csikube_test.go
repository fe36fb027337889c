package csikube

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"testing"
	"time"

	snapshotmetadatav1beta1 "github.com/kubernetes-csi/external-snapshot-metadata/client/apis/snapshotmetadataservice/v1beta1"
	snapshotv1 "github.com/kubernetes-csi/external-snapshotter/client/v8/apis/volumesnapshot/v1"
	authenticationv1 "k8s.io/api/authentication/v1"
	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/controller-runtime/pkg/client/fake"
	"sigs.k8s.io/controller-runtime/pkg/client/interceptor"

	"github.com/varve-io/varve/backup/cbt/csi"
)

func newClient(t *testing.T, funcs interceptor.Funcs, objects ...client.Object) client.Client {
	t.Helper()

	scheme := runtime.NewScheme()
	if err := AddToScheme(scheme); err != nil {
		t.Fatal(err)
	}
	return fake.NewClientBuilder().WithScheme(scheme).WithObjects(objects...).WithInterceptorFuncs(funcs).Build()
}

func TestService(t *testing.T) {
	service := func(name string, spec snapshotmetadatav1beta1.SnapshotMetadataServiceSpec) *snapshotmetadatav1beta1.SnapshotMetadataService {
		return &snapshotmetadatav1beta1.SnapshotMetadataService{ObjectMeta: metav1.ObjectMeta{Name: name}, Spec: spec}
	}
	c := newClient(t, interceptor.Funcs{},
		service("good", snapshotmetadatav1beta1.SnapshotMetadataServiceSpec{Address: "a:1", Audience: "aud", CACert: []byte("pem")}),
		service("bad", snapshotmetadatav1beta1.SnapshotMetadataServiceSpec{Address: "a:1", Audience: "aud"}))

	e, err := Service(t.Context(), c, "good")
	if err != nil || e.Address != "a:1" || e.Audience != "aud" || string(e.CABundle) != "pem" {
		t.Errorf("good: %+v, %v", e, err)
	}

	if e, err = Service(t.Context(), c, "none"); err != nil || e.Address != "" {
		t.Errorf("none: %+v, %v", e, err)
	}

	if e, err = Service(t.Context(), c, "bad"); err != nil || !strings.Contains(e.Trouble, "lacks") {
		t.Errorf("bad: %+v, %v", e, err)
	}

	noKind := &meta.NoKindMatchError{GroupKind: schema.GroupKind{Group: "cbt.storage.k8s.io", Kind: "SnapshotMetadataService"}}
	for want, failure := range map[string]error{"": noKind, "boom": errors.New("boom")} {
		c := newClient(t, interceptor.Funcs{Get: func(context.Context, client.WithWatch, client.ObjectKey, client.Object, ...client.GetOption) error {
			return failure
		}})

		e, err := Service(t.Context(), c, "good")
		if (err != nil) != (want != "") || e.Address != "" || err != nil && !strings.Contains(err.Error(), want) {
			t.Errorf("%v: %+v, %v", failure, e, err)
		}
	}
}

// boundSnapshot returns a snapshot that is ready.
func boundSnapshot() (*snapshotv1.VolumeSnapshot, *snapshotv1.VolumeSnapshotContent) {
	content, handle, volume, ready := "content", "handle", "vol", true
	return &snapshotv1.VolumeSnapshot{
			ObjectMeta: metav1.ObjectMeta{Namespace: "ns", Name: "snap", UID: "uid"},
			Status:     &snapshotv1.VolumeSnapshotStatus{BoundVolumeSnapshotContentName: &content, ReadyToUse: &ready},
		}, &snapshotv1.VolumeSnapshotContent{
			ObjectMeta: metav1.ObjectMeta{Name: content},
			Spec: snapshotv1.VolumeSnapshotContentSpec{
				Driver: "driver", Source: snapshotv1.VolumeSnapshotContentSource{VolumeHandle: &volume},
			},
			Status: &snapshotv1.VolumeSnapshotContentStatus{SnapshotHandle: &handle, ReadyToUse: &ready},
		}
}

func TestSnapshot(t *testing.T) {
	no := false

	for name, c := range map[string]struct {
		change   func(*snapshotv1.VolumeSnapshot, *snapshotv1.VolumeSnapshotContent)
		volume   string // as the caller knows it
		want     csi.Snapshot
		notReady bool
		fails    bool
	}{
		"taken here": {nil, "vol", csi.Snapshot{Namespace: "ns", Name: "snap", Handle: "handle", ChangeID: "handle", VolumeHandle: "vol"}, false, false},
		"volume from the content": {
			nil, "", csi.Snapshot{Namespace: "ns", Name: "snap", Handle: "handle", ChangeID: "handle", VolumeHandle: "vol"}, false, false,
		},
		"made for a handle": {func(_ *snapshotv1.VolumeSnapshot, c *snapshotv1.VolumeSnapshotContent) {
			c.Spec.Source = snapshotv1.VolumeSnapshotContentSource{SnapshotHandle: c.Status.SnapshotHandle}
		}, "other", csi.Snapshot{Namespace: "ns", Name: "snap", Handle: "handle", ChangeID: "handle", VolumeHandle: "other"}, false, false},
		"vSphere": {func(vs *snapshotv1.VolumeSnapshot, c *snapshotv1.VolumeSnapshotContent) {
			c.Spec.Driver = csi.VSphereDriver
			vs.Annotations = map[string]string{"csi.vsphere.volume/change-id": "52/1"}
		}, "vol", csi.Snapshot{Namespace: "ns", Name: "snap", Handle: "handle", ChangeID: "52/1", VolumeHandle: "vol"}, false, false},
		"vSphere without tracking": {func(_ *snapshotv1.VolumeSnapshot, c *snapshotv1.VolumeSnapshotContent) {
			c.Spec.Driver = csi.VSphereDriver
		}, "vol", csi.Snapshot{Namespace: "ns", Name: "snap", Handle: "handle", VolumeHandle: "vol"}, false, false},
		"another volume": {nil, "other", csi.Snapshot{}, false, true},
		"no status":      {func(vs *snapshotv1.VolumeSnapshot, _ *snapshotv1.VolumeSnapshotContent) { vs.Status = nil }, "vol", csi.Snapshot{}, true, true},
		"not bound": {func(vs *snapshotv1.VolumeSnapshot, _ *snapshotv1.VolumeSnapshotContent) {
			vs.Status.BoundVolumeSnapshotContentName = nil
		}, "vol", csi.Snapshot{}, true, true},
		"not ready":       {func(vs *snapshotv1.VolumeSnapshot, _ *snapshotv1.VolumeSnapshotContent) { vs.Status.ReadyToUse = &no }, "vol", csi.Snapshot{}, true, true},
		"ready unknown":   {func(vs *snapshotv1.VolumeSnapshot, _ *snapshotv1.VolumeSnapshotContent) { vs.Status.ReadyToUse = nil }, "vol", csi.Snapshot{}, true, true},
		"content unready": {func(_ *snapshotv1.VolumeSnapshot, c *snapshotv1.VolumeSnapshotContent) { c.Status.ReadyToUse = &no }, "vol", csi.Snapshot{}, true, true},
		"content without status": {func(_ *snapshotv1.VolumeSnapshot, c *snapshotv1.VolumeSnapshotContent) {
			c.Status = nil
		}, "vol", csi.Snapshot{}, true, true},
		"content of another": {func(_ *snapshotv1.VolumeSnapshot, c *snapshotv1.VolumeSnapshotContent) {
			c.Spec.VolumeSnapshotRef.UID = "another"
		}, "vol", csi.Snapshot{}, true, true},
		"no content": {func(_ *snapshotv1.VolumeSnapshot, c *snapshotv1.VolumeSnapshotContent) { c.Name = "gone" }, "vol", csi.Snapshot{}, false, true},
	} {
		t.Run(name, func(t *testing.T) {
			vs, content := boundSnapshot()
			content.Spec.VolumeSnapshotRef.Namespace, content.Spec.VolumeSnapshotRef.Name = vs.Namespace, vs.Name
			content.Spec.VolumeSnapshotRef.UID = vs.UID

			if c.change != nil {
				c.change(vs, content)
			}

			got, _, err := Snapshot(t.Context(), newClient(t, interceptor.Funcs{}, vs, content), client.ObjectKeyFromObject(vs), c.volume)
			if got != c.want || (err != nil) != c.fails || errors.Is(err, ErrNotReady) != c.notReady {
				t.Errorf("%+v, %v; want %+v", got, err, c.want)
			}
		})
	}
}

func TestTokenRequest(t *testing.T) {
	now := time.Date(2026, 11, 21, 0, 0, 0, 0, time.UTC)
	made := 0
	life := 10 * time.Minute

	var failure error

	c := newClient(t, interceptor.Funcs{SubResourceCreate: func(_ context.Context, _ client.Client, name string, account, request client.Object, _ ...client.SubResourceCreateOption) error {
		if failure != nil {
			return failure
		}

		r, ok := request.(*authenticationv1.TokenRequest)
		if !ok || name != "token" || account.GetNamespace() != "ns" || account.GetName() != "mover" {
			t.Errorf("asked %s of %s/%s", name, account.GetNamespace(), account.GetName())
			return errors.New("unexpected")
		}

		if len(r.Spec.Audiences) != 1 || r.Spec.Audiences[0] != "aud" || *r.Spec.ExpirationSeconds != 600 {
			t.Errorf("asked for %+v", r.Spec)
		}

		made++
		r.Status = authenticationv1.TokenRequestStatus{Token: fmt.Sprint("token-", made), ExpirationTimestamp: metav1.NewTime(now.Add(life))}
		return nil
	}})
	tokens := &TokenRequest{
		Client: c, Account: client.ObjectKey{Namespace: "ns", Name: "mover"}, Audience: "aud",
		Now: func() time.Time { return now },
	}
	get := func(want int) csi.Token {
		t.Helper()

		token, err := tokens.Token(t.Context())
		if err != nil {
			t.Fatal(err)
		}

		if expect, _ := csi.NewToken(fmt.Sprint("token-", want)); !token.Equal(expect) || made != want {
			t.Fatalf("%d tokens were made, want %d", made, want)
		}
		return token
	}

	get(1)

	now = now.Add(8*time.Minute - 1)

	get(1)

	now = now.Add(1) // four fifths

	second := get(2)

	tokens.Refused(csi.Token{})
	get(2)
	tokens.Refused(second)
	get(3)
	tokens.Refused(second)
	get(3)

	// A token with a shorter life than the margin is used once.
	now, life = now.Add(time.Hour), 30*time.Second

	get(4)
	get(5)

	failure = errors.New("forbidden")
	now = now.Add(time.Hour)

	if _, err := tokens.Token(t.Context()); !errors.Is(err, failure) || strings.Contains(err.Error(), "token-") {
		t.Errorf("%v", err)
	}
}
