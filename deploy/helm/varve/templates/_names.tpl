{{- define "varve.labels" -}}
app.kubernetes.io/name: varve
app.kubernetes.io/instance: {{ .Release.Name }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
{{- end -}}

{{- define "varve.controllerSelector" -}}
app.kubernetes.io/name: varve
app.kubernetes.io/component: controller
{{- end -}}

{{- define "varve.moverSelector" -}}
app.kubernetes.io/managed-by: varve
app.kubernetes.io/component: mover
{{- end -}}

{{- define "varve.image" -}}
{{- if .Values.image.digest -}}
{{ .Values.image.repository }}@{{ .Values.image.digest }}
{{- else -}}
{{ .Values.image.repository }}:{{ .Values.image.tag | default .Chart.AppVersion }}
{{- end -}}
{{- end -}}

{{- /* Version of the admission API to use; empty where the cluster has none. */ -}}
{{- define "varve.admissionVersion" -}}
{{- if .Values.admissionPolicy.apiVersion -}}
{{ .Values.admissionPolicy.apiVersion }}
{{- else if .Capabilities.APIVersions.Has "admissionregistration.k8s.io/v1/MutatingAdmissionPolicy" -}}
v1
{{- else if .Capabilities.APIVersions.Has "admissionregistration.k8s.io/v1beta1/MutatingAdmissionPolicy" -}}
v1beta1
{{- end -}}
{{- end -}}
