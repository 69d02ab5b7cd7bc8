{{- /*
A component's NetworkPolicy. "vllm-fleet.<component>.ingress" and "…egress" give its own rules, and the values add to them.
Takes (dict "root" $ "component" "gateway").
*/ -}}
{{- define "vllm-fleet.networkPolicy" -}}
{{- if .root.Values.networkPolicy.enabled -}}
{{- $more := (index .root.Values .component).networkPolicy -}}
{{- $egress := .root.Values.networkPolicy.egress.enabled -}}
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata:
  {{- include "vllm-fleet.metadata" . | nindent 2 }}
spec:
  podSelector:
    matchLabels:
      {{- include "vllm-fleet.selectorLabels" . | nindent 6 }}
  policyTypes: [Ingress{{ if $egress }}, Egress{{ end }}]
  {{- with concat (include (printf "vllm-fleet.%s.ingress" .component) .root | fromYamlArray) $more.ingress }}
  ingress:
    {{- toYaml . | nindent 4 }}
  {{- end }}
  {{- if $egress }}
  egress:
    # DNS, wherever the cluster's resolvers are: in pods, or on the node.
    - ports: [{port: 53, protocol: UDP}, {port: 53, protocol: TCP}]
    # The API server, whose address no selector names.
    - ports:
        {{- range .root.Values.networkPolicy.egress.apiServerPorts }}
        - {port: {{ . }}, protocol: TCP}
        {{- end }}
    {{- include (printf "vllm-fleet.%s.egress" .component) .root | nindent 4 }}
    {{- with $more.egress }}
    {{- toYaml . | nindent 4 }}
    {{- end }}
  {{- end }}
{{- end }}
{{- end }}

{{- /* The scrapers as peers of a NetworkPolicy; an absent map selects all. Takes the root. */ -}}
{{- define "vllm-fleet.scraperPeers" -}}
{{- range .Values.networkPolicy.scrapers }}
- namespaceSelector: {{ include "vllm-fleet.selector" .namespaceLabels }}
  podSelector: {{ include "vllm-fleet.selector" .podLabels }}
{{- end }}
{{- end }}

{{- /* A label selector in one line. Takes a map of labels, which may be absent. */ -}}
{{- define "vllm-fleet.selector" -}}
{{- if . }}{{ toJson (dict "matchLabels" .) }}{{ else }}{}{{ end -}}
{{- end }}

{{- /* The rule that lets scrapers, and any peers given as YAML in .more, reach port 9090; none where there are none. */ -}}
{{- define "vllm-fleet.metricsIngress" -}}
{{- with concat (include "vllm-fleet.scraperPeers" .root | fromYamlArray) (fromYamlArray (default "[]" .more)) }}
- ports: [{port: metrics, protocol: TCP}]
  from:
    {{- toYaml . | nindent 4 }}
{{- end }}
{{- end }}
