package kubernetes

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net/http"
	"regexp"
	"strings"
	"testing"

	authenticationv1 "k8s.io/api/authentication/v1"
	corev1 "k8s.io/api/core/v1"
	rbacv1 "k8s.io/api/rbac/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"github.com/varve-io/varve/api/v1alpha1"
	"github.com/varve-io/varve/e2e/cluster"
	"github.com/varve-io/varve/e2e/framework"
)

// A claim that names a recovery point and was bound by others to another volume is
// reported, by an event and a metric that only permitted users can read.
func TestBoundWithoutVarve(t *testing.T) {
	t.Parallel()
	s := newSite(t)
	mode, none := framework.Block, ""
	modes := []corev1.PersistentVolumeAccessMode{corev1.ReadWriteOnce}
	pv := &corev1.PersistentVolume{ObjectMeta: metav1.ObjectMeta{Name: s.Namespace}, Spec: corev1.PersistentVolumeSpec{
		AccessModes: modes, VolumeMode: &mode, PersistentVolumeReclaimPolicy: corev1.PersistentVolumeReclaimRetain,
		Capacity:               corev1.ResourceList{corev1.ResourceStorage: quantity("16Mi")},
		PersistentVolumeSource: corev1.PersistentVolumeSource{CSI: &corev1.CSIPersistentVolumeSource{Driver: cluster.DefaultDriver, VolumeHandle: "somebody's"}}}}
	s.Create(pv)
	s.atEnd(func() {
		if err := s.Client.Delete(context.Background(), pv); err != nil {
			t.Error(err)
		}
	})
	s.source("any", nil)
	group := v1alpha1.GroupVersion.Group
	s.Create(&corev1.PersistentVolumeClaim{ObjectMeta: metav1.ObjectMeta{Namespace: s.Namespace, Name: "bound"}, Spec: corev1.PersistentVolumeClaimSpec{
		AccessModes: modes, VolumeMode: &mode, StorageClassName: &none, VolumeName: pv.Name,
		DataSourceRef: &corev1.TypedObjectReference{APIGroup: &group, Kind: "RecoverySource", Name: "any"},
		Resources:     corev1.VolumeResourceRequirements{Requests: pv.Spec.Capacity}}})
	t.Log(s.waitEvent("bound", v1alpha1.ReasonBoundWithoutUs))
	s.Eventually("the metric", func(ctx context.Context) error {
		text, err := s.metrics(ctx)
		if err == nil && !regexp.MustCompile(`(?m)^varve_claims_bound_without_varve_total [1-9]`).MatchString(text) {
			err = errors.New("no controller counted it")
		}
		return err
	})
}

// metrics returns the metrics of all controllers, read with the shipped right; without it
// they are refused.
func (s *site) metrics(ctx context.Context) (string, error) {
	account := &corev1.ServiceAccount{ObjectMeta: metav1.ObjectMeta{Namespace: s.Namespace, Name: "scraper"}}
	if err := client.IgnoreAlreadyExists(s.Client.Create(ctx, account)); err != nil {
		return "", err
	}
	binding := &rbacv1.ClusterRoleBinding{ObjectMeta: metav1.ObjectMeta{Name: s.Namespace}, RoleRef: rbacv1.RoleRef{APIGroup: rbacv1.GroupName, Kind: "ClusterRole", Name: "varve-metrics"},
		Subjects: []rbacv1.Subject{{Kind: "ServiceAccount", Namespace: s.Namespace, Name: account.Name}}}
	if err := client.IgnoreAlreadyExists(s.Client.Create(ctx, binding)); err != nil {
		return "", err
	}
	s.atEnd(func() {
		if err := client.IgnoreNotFound(s.Client.Delete(context.Background(), binding)); err != nil {
			s.T.Error(err)
		}
	})
	token := func(name string) (string, error) {
		tr, err := s.Clientset.CoreV1().ServiceAccounts(s.Namespace).CreateToken(ctx, name, &authenticationv1.TokenRequest{}, metav1.CreateOptions{})
		if err != nil {
			return "", err
		}
		return tr.Status.Token, nil
	}
	may, err := token(account.Name)
	if err != nil {
		return "", err
	}
	mayNot, err := token("default")
	if err != nil {
		return "", err
	}
	pods, err := s.controllers(ctx)
	if err != nil {
		return "", err
	}
	var all strings.Builder
	for _, p := range pods {
		url := "https://" + p.Status.PodIP + ":8443/metrics"
		get := func(token string) (int, string, error) {
			req, err := http.NewRequestWithContext(ctx, http.MethodGet, url, nil)
			if err != nil {
				return 0, "", err
			}
			req.Header.Set("Authorization", "Bearer "+token)
			// The certificate is self-signed.
			res, err := (&http.Client{Transport: &http.Transport{TLSClientConfig: &tls.Config{InsecureSkipVerify: true}, DisableKeepAlives: true}}).Do(req)
			if err != nil {
				return 0, "", err
			}
			defer func() { _ = res.Body.Close() }()
			text, err := io.ReadAll(res.Body)
			return res.StatusCode, string(text), err
		}
		if code, _, err := get(mayNot); err != nil || code != http.StatusForbidden {
			return "", fmt.Errorf("who may not read metrics got %d, %w", code, err)
		}
		code, text, err := get(may)
		if err != nil || code != http.StatusOK {
			return "", fmt.Errorf("who may read metrics got %d, %w", code, err)
		}
		all.WriteString(text)
	}
	return all.String(), nil
}
