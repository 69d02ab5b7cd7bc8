// Definitions of other projects that the chart's objects are checked against; nothing is compiled.
module vllm-fleet.dev/tests/definitions

go 1.25.0

require sigs.k8s.io/gateway-api v1.6.3
