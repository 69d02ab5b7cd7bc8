{{- /* The Deployment's parts that do not depend on the component. Each takes (dict "root" $ "component" "gateway"). */ -}}

{{- define "vllm-fleet.podMetadata" -}}
{{- $values := index .root.Values .component -}}
annotations:
  checksum/config: {{ include "vllm-fleet.config" . | sha256sum }}
  {{- with $values.podAnnotations }}
  {{- toYaml . | nindent 2 }}
  {{- end }}
{{- /* Without version and chart: an upgrade that changes nothing for this component must not restart its pods. */}}
labels:
  {{- include "vllm-fleet.selectorLabels" . | nindent 2 }}
  app.kubernetes.io/part-of: vllm-fleet
  {{- with mergeOverwrite (deepCopy .root.Values.commonLabels) $values.podLabels }}
  {{- toYaml . | nindent 2 }}
  {{- end }}
{{- end }}

{{- define "vllm-fleet.podSpec" -}}
{{- $values := index .root.Values .component -}}
serviceAccountName: {{ include "vllm-fleet.serviceAccountName" . }}
automountServiceAccountToken: true
enableServiceLinks: false
{{- with .root.Values.image.pullSecrets }}
imagePullSecrets:
  {{- toYaml . | nindent 2 }}
{{- end }}
securityContext:
  {{- toYaml $values.podSecurityContext | nindent 2 }}
{{- with $values.priorityClassName }}
priorityClassName: {{ . }}
{{- end }}
{{- range $key := list "nodeSelector" "tolerations" "affinity" }}
{{- with index $values $key }}
{{ $key }}:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- end }}
{{- with $values.topologySpreadConstraints }}
topologySpreadConstraints:
  {{- range . }}
  {{- $own := dict "labelSelector" (dict "matchLabels" (include "vllm-fleet.selectorLabels" $ | fromYaml)) }}
  - {{- toYaml (merge (deepCopy .) (hasKey . "labelSelector" | ternary dict $own)) | nindent 4 }}
  {{- end }}
{{- end }}
volumes:
  - name: config
    configMap: {name: {{ include "vllm-fleet.name" . }}}
  - name: tmp
    emptyDir: {sizeLimit: 64Mi}
  {{- range $index, $name := include "vllm-fleet.secretNames" . | fromYamlArray }}
  - name: secret-{{ $index }}
    secret: {secretName: {{ $name }}}
  {{- end }}
  {{- if and (eq .component "gateway") (include "vllm-fleet.engineKeySecret" .root) }}
  # The operator makes it: until then the pod waits, and the kubelet tries again.
  - name: engine-keys
    secret: {secretName: {{ include "vllm-fleet.engineKeySecret" .root }}}
  {{- end }}
  {{- if and (eq .component "gateway") .root.Values.gateway.tls.secretName }}
  - name: tls
    secret: {secretName: {{ .root.Values.gateway.tls.secretName }}}
  {{- end }}
{{- end }}

{{- /* Everything of the one container but its name, arguments and ports. Starting takes seconds; the budget is a minute. */ -}}
{{- define "vllm-fleet.container" -}}
{{- $values := index .root.Values .component -}}
image: {{ include "vllm-fleet.image" . }}
imagePullPolicy: {{ .root.Values.image.pullPolicy }}
env:
  - name: POD_NAME
    valueFrom: {fieldRef: {fieldPath: metadata.name}}
  - name: POD_NAMESPACE
    valueFrom: {fieldRef: {fieldPath: metadata.namespace}}
  {{- with $values.extraEnv }}
  {{- toYaml . | nindent 2 }}
  {{- end }}
startupProbe:
  httpGet: {path: /livez, port: metrics}
  initialDelaySeconds: 2
  periodSeconds: 1
  failureThreshold: 60
# Two minutes without any answer. On a node whose CPU is taken, half a minute of silence is no hang, and a restart would
# cost more CPU and every stream; what hangs is out of the Service after six seconds, and has lost its Lease after fifteen.
livenessProbe:
  httpGet: {path: /livez, port: metrics}
  periodSeconds: 20
  timeoutSeconds: 10
  failureThreshold: 6
readinessProbe:
  httpGet: {path: /readyz, port: metrics}
  periodSeconds: 3
  timeoutSeconds: 3
  failureThreshold: 2
resources:
  {{- toYaml $values.resources | nindent 2 }}
securityContext:
  {{- toYaml $values.securityContext | nindent 2 }}
volumeMounts:
  - {name: config, mountPath: /etc/vllm-fleet, readOnly: true}
  - {name: tmp, mountPath: /tmp}
  {{- range $index, $name := include "vllm-fleet.secretNames" . | fromYamlArray }}
  - {name: secret-{{ $index }}, mountPath: {{ include "vllm-fleet.secretPath" $name }}, readOnly: true}
  {{- end }}
  {{- if and (eq .component "gateway") (include "vllm-fleet.engineKeySecret" .root) }}
  - {name: engine-keys, mountPath: /etc/vllm-fleet-engine-keys, readOnly: true}
  {{- end }}
  {{- if and (eq .component "gateway") .root.Values.gateway.tls.secretName }}
  - {name: tls, mountPath: /etc/vllm-fleet-tls, readOnly: true}
  {{- end }}
{{- end }}

{{- /* The Secrets that a component's pods mount, each once. */ -}}
{{- define "vllm-fleet.secretNames" -}}
{{- $values := index .root.Values .component -}}
{{- $names := list $values.keysSecret -}}
{{- range $values.secrets }}{{ $names = append $names .name }}{{ end -}}
{{- $names | compact | uniq | toYaml -}}
{{- end }}

{{- define "vllm-fleet.secretPath" -}}
/etc/vllm-fleet-secrets/{{ . }}
{{- end }}
