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

// TokenRequest mints tokens of a service account through the TokenRequest API, and
// renews them once four fifths of their life are over. A pod does better with a
// projected token volume and csi.TokenFile. Safe for concurrent use; the fields are not
// to be changed after the first call.
type TokenRequest struct {
	// Client makes the requests; client.Client is one.
	Client client.SubResourceClientConstructor
	// Account is the namespace and name of the service account.
	Account client.ObjectKey
	// Audience is that of the csi.Endpoint.
	Audience string
	// Lifetime asked for; 0 for ten minutes, the least there is. The server may give
	// another.
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
	// margin is what a token given out lives for at least, unless the server gives
	// out shorter ones.
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
