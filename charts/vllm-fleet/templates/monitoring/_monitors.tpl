{{- /* Not empty where objects of the Prometheus Operator are to be rendered. Takes the root and `wanted`: auto, true, false. */ -}}
{{- define "vllm-fleet.monitored" -}}
{{- $wanted := toString .wanted -}}
{{- if or (eq $wanted "true") (and (eq $wanted "auto") (.root.Capabilities.APIVersions.Has "monitoring.coreos.com/v1")) -}}
true
{{- end -}}
{{- end }}

{{- define "vllm-fleet.monitors" -}}
{{ include "vllm-fleet.monitored" (dict "root" . "wanted" .Values.monitoring.monitors) }}
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
