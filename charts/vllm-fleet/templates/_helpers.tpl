{{- /*
Names, labels and parts that operator and gateway share. All but fullname take (dict "root" $ "component" "gateway"), so
that nothing is written twice and a third component is a folder of one-line files.
*/ -}}

{{- define "vllm-fleet.fullname" -}}
{{- $name := default .Chart.Name .Values.nameOverride -}}
{{- $full := contains $name .Release.Name | ternary .Release.Name (printf "%s-%s" .Release.Name $name) -}}
{{- default $full .Values.fullnameOverride | trunc 40 | trimSuffix "-" -}}
{{- end }}

{{- define "vllm-fleet.name" -}}
{{ include "vllm-fleet.fullname" .root }}-{{ .component }}
{{- end }}

{{- /* Immutable in a Deployment, so these never change within a release. */ -}}
{{- define "vllm-fleet.selectorLabels" -}}
app.kubernetes.io/name: {{ default .root.Chart.Name .root.Values.nameOverride }}
app.kubernetes.io/instance: {{ .root.Release.Name }}
app.kubernetes.io/component: {{ .component }}
{{- end }}

{{- define "vllm-fleet.labels" -}}
{{ include "vllm-fleet.selectorLabels" . }}
app.kubernetes.io/version: {{ .root.Chart.AppVersion | quote }}
app.kubernetes.io/part-of: vllm-fleet
app.kubernetes.io/managed-by: {{ .root.Release.Service }}
helm.sh/chart: {{ .root.Chart.Name }}-{{ .root.Chart.Version | replace "+" "_" }}
{{- with .root.Values.commonLabels }}
{{ toYaml . }}
{{- end }}
{{- end }}

{{- /* The metadata of every namespaced object that is named after its component. */ -}}
{{- define "vllm-fleet.metadata" -}}
name: {{ include "vllm-fleet.name" . }}
namespace: {{ .root.Release.Namespace }}
labels:
  {{- include "vllm-fleet.labels" . | nindent 2 }}
{{- end }}

{{- define "vllm-fleet.image" -}}
{{- $image := (index .root.Values .component).image -}}
{{- with .root.Values.image.registry }}{{ trimSuffix "/" . }}/{{ end -}}
{{- $image.repository -}}
{{- if $image.digest }}@{{ $image.digest }}{{ else }}:{{ default .root.Chart.AppVersion $image.tag }}{{ end -}}
{{- end }}

{{- define "vllm-fleet.serviceAccountName" -}}
{{- $account := (index .root.Values .component).serviceAccount -}}
{{- if $account.create -}}
{{ default (include "vllm-fleet.name" .) $account.name }}
{{- else -}}
{{ required (printf "%s.serviceAccount.name is needed where %s.serviceAccount.create is false" .component .component) $account.name }}
{{- end -}}
{{- end }}

{{- define "vllm-fleet.serviceAccount" -}}
{{- $account := (index .root.Values .component).serviceAccount -}}
{{- if $account.create -}}
apiVersion: v1
kind: ServiceAccount
metadata:
  name: {{ include "vllm-fleet.serviceAccountName" . }}
  namespace: {{ .root.Release.Namespace }}
  labels:
    {{- include "vllm-fleet.labels" . | nindent 4 }}
  {{- with $account.annotations }}
  annotations:
    {{- toYaml . | nindent 4 }}
  {{- end }}
automountServiceAccountToken: false
{{- end }}
{{- end }}

{{- /* A component's configuration file: `config` as the user gave it, and over it what the chart alone decides. */ -}}
{{- define "vllm-fleet.config" -}}
{{- $owned := include (printf "vllm-fleet.%s.ownedConfig" .component) .root | fromYaml -}}
{{- mustMergeOverwrite (deepCopy (index .root.Values .component).config) $owned | toYaml -}}
{{- end }}

{{- define "vllm-fleet.configMap" -}}
apiVersion: v1
kind: ConfigMap
metadata:
  {{- include "vllm-fleet.metadata" . | nindent 2 }}
data:
  {{ .component }}.yaml: |
    {{- include "vllm-fleet.config" . | nindent 4 }}
{{- end }}

{{- /*
Prometheus and the operator reach port 9090 here. A Service of its own, so that exposing the API never exposes it; headless
and with unready pods, so that a draining pod is still scraped.
*/ -}}
{{- define "vllm-fleet.metricsService" -}}
apiVersion: v1
kind: Service
metadata:
  name: {{ include "vllm-fleet.name" . }}-metrics
  namespace: {{ .root.Release.Namespace }}
  labels:
    {{- include "vllm-fleet.labels" . | nindent 4 }}
    vllm-fleet.dev/metrics: "true"
spec:
  clusterIP: None
  publishNotReadyAddresses: true
  selector:
    {{- include "vllm-fleet.selectorLabels" . | nindent 4 }}
  ports:
    - {name: metrics, port: 9090, targetPort: metrics}
{{- end }}

{{- define "vllm-fleet.podDisruptionBudget" -}}
{{- $values := index .root.Values .component -}}
{{- if and $values.podDisruptionBudget.enabled (gt (include "vllm-fleet.leastReplicas" . | int) 1) -}}
apiVersion: policy/v1
kind: PodDisruptionBudget
metadata:
  {{- include "vllm-fleet.metadata" . | nindent 2 }}
spec:
  maxUnavailable: 1
  unhealthyPodEvictionPolicy: AlwaysAllow
  selector:
    matchLabels:
      {{- include "vllm-fleet.selectorLabels" . | nindent 6 }}
{{- end }}
{{- end }}

{{- /* The Secret with the engines' master key, in the release's namespace; empty where engines ask for no key. */ -}}
{{- define "vllm-fleet.engineKeySecret" -}}
{{- if .Values.engineKeys.enabled -}}
{{ default (printf "%s-engine-keys" (include "vllm-fleet.fullname" .)) .Values.engineKeys.existingSecret }}
{{- end -}}
{{- end }}

{{- /* What callers in the cluster put before the gateway's name. */ -}}
{{- define "vllm-fleet.scheme" -}}
{{ if .Values.gateway.tls.secretName }}https{{ else }}http{{ end }}
{{- end }}

{{- /* Seconds of a duration such as 1h30m, in Go's notation, which Sprig reads only as a change of a date. */ -}}
{{- define "vllm-fleet.seconds" -}}
{{- mustToDate "2006-01-02T15:04:05Z07:00" "1970-01-01T00:00:00Z" | mustDateModify . | unixEpoch -}}
{{- end }}

{{- /* The fewest pods that a component has: the autoscaler's least where there is one. */ -}}
{{- define "vllm-fleet.leastReplicas" -}}
{{- $values := index .root.Values .component -}}
{{- $scaled := $values.autoscaling | default (dict "enabled" false) -}}
{{- if $scaled.enabled }}{{ $scaled.minReplicas }}{{ else }}{{ $values.replicas }}{{ end -}}
{{- end }}
