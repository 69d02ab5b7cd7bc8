"""VLLMModels and EndpointSlices as an API server gives them to a gateway."""

from __future__ import annotations

from typing import Any


def model(
    name: str = "m", *, ready: str = "True", served: list[str] | None = None, **spec: Any
) -> dict[str, Any]:
    condition = {"type": "Ready", "status": ready, "reason": "Loading", "message": "weights: 40 %"}
    return {
        "apiVersion": "vllm-fleet.dev/v1alpha1",
        "kind": "VLLMModel",
        "metadata": {"name": name},
        "spec": {"model": "x/y", **spec},
        "status": {"servedNames": served if served is not None else [name], "conditions": [condition]},
    }


def endpoint(uid: str = "pod-1", address: str = "10.0.0.1", **conditions: bool) -> dict[str, Any]:
    target = {"kind": "Pod", "name": uid, "uid": uid}
    return {"addresses": [address], "conditions": {"ready": True} | conditions, "targetRef": target}


def slice_of(body: dict[str, Any], *endpoints: dict[str, Any], service_uid: str = "s") -> dict[str, Any]:
    model_name, uid = body["metadata"]["name"], body["metadata"]["uid"]
    owner = {"apiVersion": "v1", "kind": "Service", "name": f"{model_name}-engine", "controller": True}
    standard = {
        "vllm-fleet.dev/model": model_name,
        "vllm-fleet.dev/model-uid": uid,
        "kubernetes.io/service-name": f"{model_name}-engine",
        "endpointslice.kubernetes.io/managed-by": "endpointslice-controller.k8s.io",
    }
    return {
        "apiVersion": "discovery.k8s.io/v1",
        "kind": "EndpointSlice",
        "metadata": {
            "name": f"{model_name}-engine-x",
            "labels": standard,
            "ownerReferences": [owner | {"uid": service_uid}],
        },
        "addressType": "IPv4",
        "endpoints": list(endpoints),
        "ports": [{"name": "http", "port": 8000, "protocol": "TCP"}],
    }
