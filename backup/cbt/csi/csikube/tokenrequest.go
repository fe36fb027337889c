package csikube

import (
	"context"
	"fmt"
	"sync"
	"time"

	authenticationv1 "k8s.io/api/authentication/v1"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"github.com/varve-io/varve/backup/cbt/csi"
)

// TokenRequest requests tokens of a service account through the TokenRequest API, and renews
// them after four fifths of their life. In a pod use a projected token volume and
// csi.TokenFile instead. Safe for concurrent use; do not change the fields after the first
// call.
type TokenRequest struct {
	// Client makes the requests; client.Client is one.
	Client client.SubResourceClientConstructor
	// Account is the namespace and name of the service account.
	Account client.ObjectKey
	// Audience is that of the csi.Endpoint.
	Audience string
	// Lifetime requested; 0 for ten minutes, the minimum. The server may return another.
	Lifetime time.Duration
	// Now is the clock; nil for the system's.
	Now func() time.Time

	mu    sync.Mutex
	token csi.Token
	until time.Time // when it has to be renewed
}

var _ csi.Refresher = (*TokenRequest)(nil)

const (
	leastLifetime = 10 * time.Minute
	// margin is how long a returned token lives at least, unless the server returns shorter
	// ones.
	margin = time.Minute
)

// Token implements csi.TokenSource.
func (t *TokenRequest) Token(ctx context.Context) (csi.Token, error) {
	t.mu.Lock()
	defer t.mu.Unlock()

	now := t.now()
	if now.Before(t.until) {
		return t.token, nil
	}

	seconds := int64(max(t.Lifetime, leastLifetime) / time.Second)
	request := &authenticationv1.TokenRequest{Spec: authenticationv1.TokenRequestSpec{
		Audiences: []string{t.Audience}, ExpirationSeconds: &seconds,
	}}
	account := &corev1.ServiceAccount{ObjectMeta: metav1.ObjectMeta{Namespace: t.Account.Namespace, Name: t.Account.Name}}

	if err := t.Client.SubResource("token").Create(ctx, account, request); err != nil {
		return csi.Token{}, fmt.Errorf("request a token of service account %s for audience %q: %w", t.Account, t.Audience, err)
	}

	token, err := csi.NewToken(request.Status.Token)
	if err != nil {
		return csi.Token{}, fmt.Errorf("request a token of service account %s: %w", t.Account, err)
	}

	life := request.Status.ExpirationTimestamp.Sub(now)
	t.token = token
	t.until = now.Add(min(life*4/5, life-margin))
	return token, nil
}

// Refused implements csi.Refresher.
func (t *TokenRequest) Refused(token csi.Token) {
	t.mu.Lock()
	defer t.mu.Unlock()

	if token.Equal(t.token) {
		t.token, t.until = csi.Token{}, time.Time{}
	}
}

func (t *TokenRequest) now() time.Time {
	if t.Now != nil {
		return t.Now()
	}
	return time.Now()
}
