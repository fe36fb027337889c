package mover

import (
	"cmp"
	"fmt"
	"path"
	"strings"

	batchv1 "k8s.io/api/batch/v1"
	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/resource"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"

	"github.com/varve-io/varve/api/v1alpha1"
	"github.com/varve-io/varve/populator/store"
)

// Labels and annotations of what Varve makes for a run, in its namespace or elsewhere. By
// them a run's objects are found after the run's own object was deleted.
const (
	LabelManagedBy = "app.kubernetes.io/managed-by"
	ManagedBy      = "varve"
	// LabelComponent of mover pods, for network policies.
	LabelComponent = "app.kubernetes.io/component"
	Component      = "mover"
	// LabelTenant is on pods of movers that open a tenant's Repository: network policies deny
	// them the cloud's metadata service.
	LabelTenant = "varve.io/tenant"
	// LabelRun is the UID of the object that the run belongs to.
	LabelRun = "varve.io/run"
	// LabelRole distinguishes kinds of runs: backup, populate, prune, maintain.
	LabelRole = "varve.io/role"
	// AnnotationOwner is the run's object, Kind/namespace/name, for users and for the
	// search for leftovers.
	AnnotationOwner = "varve.io/owner"
)

// RunLabels returns the labels of all objects of a run.
func RunLabels(role string, uid types.UID) map[string]string {
	return map[string]string{LabelManagedBy: ManagedBy, LabelRole: role, LabelRun: string(uid)}
}

// Pods is the common configuration of movers, from the installation.
type Pods struct {
	// Namespace is Varve's.
	Namespace string
	// Image of Varve, the controller's own, and how it is pulled.
	Image       string
	PullPolicy  corev1.PullPolicy
	PullSecrets []corev1.LocalObjectReference
	// ServiceAccount of movers unless the store names one. It only needs the right to get
	// volumesnapshots in Namespace, for SnapshotMetadata's access review.
	ServiceAccount string
	// NonRoot runs as user 65532: only if the container runtime gives block devices to
	// the pod's user (device_ownership_from_security_context).
	NonRoot       bool
	Resources     corev1.ResourceRequirements
	Tolerations   []corev1.Toleration
	NodeSelector  map[string]string
	PriorityClass string
	// Proxy for HTTPS of movers whose store names none, and NoProxy the hosts reached
	// without one: the controller's own HTTPS_PROXY and NO_PROXY.
	Proxy, NoProxy string
}

// Job is one attempt of one run.
type Job struct {
	Name        string // DNS label
	Labels      map[string]string
	Annotations map[string]string
	Task        Task
	// Secret in Varve's namespace with the store's credentials.
	Secret string
	// Device is a Block claim in Varve's namespace; empty for none.
	Device string
	// TokenAudience mounts a token for it; empty for none.
	TokenAudience string
	// StoreVolume is the claim of a volume storage.
	StoreVolume *v1alpha1.VolumeStorage
	// Proxy for HTTPS, and the store's ServiceAccount, if it names them.
	Proxy          string
	ServiceAccount string
	// Affinity to nodes that can reach the device.
	Affinity *corev1.NodeAffinity
}

// Container of a mover's pod.
const Container = "mover"

// configBytes bounds the memory of a mover for a connection's configuration.
const configBytes = 16 << 20

// nonRootID is the image's user.
const nonRootID = 65532

// nodeLostSeconds is how long a pod stays on a node that does not answer.
const nodeLostSeconds = 60

// Build returns the Job's object. It has one attempt: the controller makes the next.
func (p Pods) Build(j Job) (*batchv1.Job, error) {
	j.Task.Version = ProtocolVersion
	task, err := j.Task.Variables()
	if err != nil {
		return nil, fmt.Errorf("task of %s: %w", j.Name, err)
	}
	labels := map[string]string{LabelManagedBy: ManagedBy, LabelComponent: Component}
	if j.Task.Store.Tenant {
		labels[LabelTenant] = "true"
	}
	for k, v := range j.Labels {
		labels[k] = v
	}
	yes, no, none, once := true, false, int32(0), int32(1)
	user, group := int64(0), int64(0)
	if p.NonRoot {
		user, group = nonRootID, nonRootID
	}
	if j.StoreVolume != nil {
		group = store.VolumeGroup // user 0 without capabilities reads only its group's files
	}
	account := p.ServiceAccount
	if j.ServiceAccount != "" {
		account = j.ServiceAccount
	}
	c := corev1.Container{
		Name: Container, Image: p.Image, ImagePullPolicy: p.PullPolicy,
		Args:                     []string{"mover", string(j.Task.Action)},
		Env:                      append(task, corev1.EnvVar{Name: "HOME", Value: ScratchDir}, corev1.EnvVar{Name: "TMPDIR", Value: ConfigDir}),
		Resources:                p.Resources,
		TerminationMessagePath:   TerminationPath,
		TerminationMessagePolicy: corev1.TerminationMessageReadFile,
		SecurityContext: &corev1.SecurityContext{
			AllowPrivilegeEscalation: &no, ReadOnlyRootFilesystem: &yes, Privileged: &no,
			Capabilities: &corev1.Capabilities{Drop: []corev1.Capability{"ALL"}},
		},
		VolumeMounts: []corev1.VolumeMount{
			{Name: "scratch", MountPath: ScratchDir},
			{Name: "connection", MountPath: ConfigDir},
			{Name: "store", MountPath: StoreDir, ReadOnly: true},
		},
	}
	if proxy := cmp.Or(j.Proxy, p.Proxy); proxy != "" {
		// The storage's metadata service is in the cluster.
		none := strings.Trim(p.NoProxy+",.svc,.cluster.local", ",")
		c.Env = append(c.Env, corev1.EnvVar{Name: "HTTPS_PROXY", Value: proxy}, corev1.EnvVar{Name: "NO_PROXY", Value: none})
	}
	// The mover must be able to read a Secret's files as any user.
	mode := int32(0o444)
	volumes := []corev1.Volume{
		{Name: "scratch", VolumeSource: corev1.VolumeSource{EmptyDir: &corev1.EmptyDirVolumeSource{}}},
		{Name: "connection", VolumeSource: corev1.VolumeSource{EmptyDir: &corev1.EmptyDirVolumeSource{
			Medium: corev1.StorageMediumMemory, SizeLimit: resource.NewQuantity(configBytes, resource.BinarySI)}}},
		{Name: "store", VolumeSource: corev1.VolumeSource{Secret: &corev1.SecretVolumeSource{SecretName: j.Secret, DefaultMode: &mode}}},
	}
	if j.Device != "" {
		c.VolumeDevices = []corev1.VolumeDevice{{Name: "device", DevicePath: DevicePath}}
		volumes = append(volumes, corev1.Volume{Name: "device", VolumeSource: corev1.VolumeSource{
			PersistentVolumeClaim: &corev1.PersistentVolumeClaimVolumeSource{ClaimName: j.Device}}})
	}
	if j.TokenAudience != "" {
		seconds := int64(3600)
		c.VolumeMounts = append(c.VolumeMounts, corev1.VolumeMount{Name: "metadata", MountPath: path.Dir(TokenFile), ReadOnly: true})
		volumes = append(volumes, corev1.Volume{Name: "metadata", VolumeSource: corev1.VolumeSource{Projected: &corev1.ProjectedVolumeSource{
			DefaultMode: &mode,
			Sources: []corev1.VolumeProjection{{ServiceAccountToken: &corev1.ServiceAccountTokenProjection{
				Audience: j.TokenAudience, ExpirationSeconds: &seconds, Path: path.Base(TokenFile)}}},
		}}})
	}
	if v := j.StoreVolume; v != nil {
		c.VolumeMounts = append(c.VolumeMounts, corev1.VolumeMount{Name: "volume", MountPath: VolumeDir})
		volumes = append(volumes, corev1.Volume{Name: "volume", VolumeSource: corev1.VolumeSource{
			PersistentVolumeClaim: &corev1.PersistentVolumeClaimVolumeSource{ClaimName: v.ClaimName}}})
	}
	spec := corev1.PodSpec{
		RestartPolicy: corev1.RestartPolicyNever, ServiceAccountName: account, AutomountServiceAccountToken: &no, EnableServiceLinks: &no,
		SecurityContext: &corev1.PodSecurityContext{
			RunAsUser: &user, RunAsGroup: &group, RunAsNonRoot: &p.NonRoot,
			SeccompProfile: &corev1.SeccompProfile{Type: corev1.SeccompProfileTypeRuntimeDefault},
		},
		Containers: []corev1.Container{c}, Volumes: volumes,
		ImagePullSecrets: p.PullSecrets, NodeSelector: p.NodeSelector, PriorityClassName: p.PriorityClass,
		Tolerations: append(nodeLost(), p.Tolerations...),
	}
	if j.Affinity != nil {
		spec.Affinity = &corev1.Affinity{NodeAffinity: j.Affinity}
	}
	return &batchv1.Job{
		ObjectMeta: metav1.ObjectMeta{Namespace: p.Namespace, Name: j.Name, Labels: labels, Annotations: j.Annotations},
		Spec: batchv1.JobSpec{
			BackoffLimit: &none, Completions: &once, Parallelism: &once,
			Template: corev1.PodTemplateSpec{ObjectMeta: metav1.ObjectMeta{Labels: labels, Annotations: j.Annotations}, Spec: spec},
		},
	}, nil
}

// nodeLost returns the tolerations with which a pod leaves a node that does not answer
// sooner than after the API server's default of five minutes.
func nodeLost() []corev1.Toleration {
	seconds := int64(nodeLostSeconds)
	out := make([]corev1.Toleration, 0, 2)
	for _, key := range []string{corev1.TaintNodeNotReady, corev1.TaintNodeUnreachable} {
		out = append(out, corev1.Toleration{Key: key, Operator: corev1.TolerationOpExists, Effect: corev1.TaintEffectNoExecute, TolerationSeconds: &seconds})
	}
	return out
}
