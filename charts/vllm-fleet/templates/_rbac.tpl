{{- /*
Binds the rules of "vllm-fleet.<component>.rules" to the component: a Role in each watched namespace, or one ClusterRole where
all are watched. Takes (dict "root" $ "component" "gateway").
*/ -}}
{{- define "vllm-fleet.rbac" -}}
{{- $rules := include (printf "vllm-fleet.%s.rules" .component) .root -}}
{{- if .root.Values.watchNamespaces }}
{{- range .root.Values.watchNamespaces }}
{{ include "vllm-fleet.role" (merge (dict "kind" "Role" "namespace" . "rules" $rules) $) }}
{{- end }}
{{- else }}
{{ include "vllm-fleet.role" (merge (dict "kind" "ClusterRole" "rules" $rules) $) }}
{{- end }}
{{- end }}

{{- /* One (Cluster)Role and its binding. Takes as well: kind, rules, and for a Role namespace; suffix of the name. */ -}}
{{- define "vllm-fleet.role" -}}
{{- $name := printf "%s%s" (include "vllm-fleet.name" .) (default "" .suffix) }}
---
apiVersion: rbac.authorization.k8s.io/v1
kind: {{ .kind }}
metadata:
  name: {{ $name }}
  {{- with .namespace }}
  namespace: {{ . }}
  {{- end }}
  labels:
    {{- include "vllm-fleet.labels" . | nindent 4 }}
rules:
  {{- .rules | nindent 2 }}
---
apiVersion: rbac.authorization.k8s.io/v1
kind: {{ .kind }}Binding
metadata:
  name: {{ $name }}
  {{- with .namespace }}
  namespace: {{ . }}
  {{- end }}
  labels:
    {{- include "vllm-fleet.labels" . | nindent 4 }}
roleRef: {apiGroup: rbac.authorization.k8s.io, kind: {{ .kind }}, name: {{ $name }}}
subjects:
  - kind: ServiceAccount
    name: {{ include "vllm-fleet.serviceAccountName" . }}
    namespace: {{ .root.Release.Namespace }}
{{- end }}
