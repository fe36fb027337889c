package step

import (
	"context"
	"fmt"
	"strings"

	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/controller-runtime/pkg/client/interceptor"
)

// Write is a write to the API server, before or after it.
type Write struct {
	Step  string // list/step; empty outside of a list
	Verb  string // create, update, patch, delete, deletecollection, apply; may end in /status and the like
	Kind  string // Go type of the object
	Name  string // namespace/name of the object
	After bool   // false before the write, true once it succeeded
}

// Hook is called for each write. An error before a write prevents it; one after it
// replaces its success. Called concurrently.
type Hook func(ctx context.Context, w Write) error

// Observe returns a client that calls hook for each write; for a nil hook it returns c.
func Observe(c client.WithWatch, hook Hook) client.WithWatch {
	if hook == nil {
		return c
	}

	around := func(ctx context.Context, verb string, obj any, name client.ObjectKey, do func() error) error {
		w := Write{Step: Current(ctx), Verb: verb, Kind: kindOf(obj), Name: name.String()}
		if err := hook(ctx, w); err != nil {
			return err
		}
		if err := do(); err != nil {
			return err
		}
		w.After = true
		return hook(ctx, w)
	}
	key := client.ObjectKeyFromObject
	return interceptor.NewClient(c, interceptor.Funcs{
		Create: func(ctx context.Context, c client.WithWatch, obj client.Object, opts ...client.CreateOption) error {
			return around(ctx, "create", obj, key(obj), func() error { return c.Create(ctx, obj, opts...) })
		},
		Update: func(ctx context.Context, c client.WithWatch, obj client.Object, opts ...client.UpdateOption) error {
			return around(ctx, "update", obj, key(obj), func() error { return c.Update(ctx, obj, opts...) })
		},
		Patch: func(ctx context.Context, c client.WithWatch, obj client.Object, patch client.Patch, opts ...client.PatchOption) error {
			return around(ctx, "patch", obj, key(obj), func() error { return c.Patch(ctx, obj, patch, opts...) })
		},
		Delete: func(ctx context.Context, c client.WithWatch, obj client.Object, opts ...client.DeleteOption) error {
			return around(ctx, "delete", obj, key(obj), func() error { return c.Delete(ctx, obj, opts...) })
		},
		DeleteAllOf: func(ctx context.Context, c client.WithWatch, obj client.Object, opts ...client.DeleteAllOfOption) error {
			return around(ctx, "deletecollection", obj, key(obj), func() error { return c.DeleteAllOf(ctx, obj, opts...) })
		},
		SubResourceCreate: func(ctx context.Context, c client.Client, sub string, obj, subObj client.Object, opts ...client.SubResourceCreateOption) error {
			return around(ctx, "create/"+sub, obj, key(obj), func() error { return c.SubResource(sub).Create(ctx, obj, subObj, opts...) })
		},
		SubResourceUpdate: func(ctx context.Context, c client.Client, sub string, obj client.Object, opts ...client.SubResourceUpdateOption) error {
			return around(ctx, "update/"+sub, obj, key(obj), func() error { return c.SubResource(sub).Update(ctx, obj, opts...) })
		},
		SubResourcePatch: func(ctx context.Context, c client.Client, sub string, obj client.Object, patch client.Patch, opts ...client.SubResourcePatchOption) error {
			return around(ctx, "patch/"+sub, obj, key(obj), func() error { return c.SubResource(sub).Patch(ctx, obj, patch, opts...) })
		},
	})
}

// kindOf names an object's type without its TypeMeta, which typed objects lack:
// *v1.PersistentVolumeClaim is PersistentVolumeClaim.
func kindOf(obj any) string {
	name := fmt.Sprintf("%T", obj)
	return name[strings.LastIndexByte(name, '.')+1:]
}
