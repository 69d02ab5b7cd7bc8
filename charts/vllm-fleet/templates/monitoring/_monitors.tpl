{{- /* Not empty where monitors are to be rendered. Takes the root. */ -}}
{{- define "vllm-fleet.monitors" -}}
{{- $wanted := toString .Values.monitoring.monitors -}}
{{- if or (eq $wanted "true") (and (eq $wanted "auto") (.Capabilities.APIVersions.Has "monitoring.coreos.com/v1")) -}}
true
{{- end -}}
{{- end }}

{{- /* What all monitors say of a scrape. Takes the root. */ -}}
{{- define "vllm-fleet.scrape" -}}
path: /metrics
{{- with .Values.monitoring.interval }}
interval: {{ . }}
{{- end }}
{{- with .Values.monitoring.scrapeTimeout }}
scrapeTimeout: {{ . }}
{{- end }}
{{- end }}

{{- define "vllm-fleet.monitorMetadata" -}}
{{ include "vllm-fleet.metadata" . }}
  {{- with .root.Values.monitoring.labels }}
  {{- toYaml . | nindent 2 }}
  {{- end }}
{{- end }}
