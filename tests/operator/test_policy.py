"""What a VLLMModel may make of its pods: `settings.policy`, and the merge of `spec.podTemplate`.

Proves: the merge keeps ours, adds theirs, follows the lists' keys, `$patch: delete` and `replace`; one
red-team row for each line of the policy is refused with its field; the same rows pass where the policy allows
them; prefixes of images and folders end at a boundary and are no text tricks; hostPath is read-only whatever
the mode; `full` opens what `safe` closes, except labels, ports and folders; the platform's own image needs no
prefix. That a refused edit leaves what runs alone is in test_reconcile, `validate --config` in test_commands.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
from judged import Json, engine_with, pod_of, refusals, settings

from vllm_operator.render.merge import merged
from vllm_operator.render.policy import image_matches, under
from vllm_operator.settings import Settings


def sidecar_with(**fields: Any) -> Json:
    return {"spec": {"containers": [{"name": "x", "image": "x:1", **fields}]}}


# The merge


def test_lists_merge_by_their_keys_and_others_are_replaced() -> None:
    base = {"containers": [{"name": "engine", "args": ["a", "b"], "env": [{"name": "A", "value": "1"}]}]}
    patch = {"containers": [{"name": "engine", "args": ["c"], "env": [{"name": "B"}]}, {"name": "x"}]}
    before = copy.deepcopy(base)
    env = [{"name": "A", "value": "1"}, {"name": "B"}]
    assert merged(base, patch) == {
        "containers": [{"name": "engine", "args": ["c"], "env": env}, {"name": "x"}]
    }
    assert base == before


def test_directives_delete_and_replace() -> None:
    base = {"volumes": [{"name": "a"}, {"name": "b"}], "securityContext": {"x": 1, "y": 2}, "affinity": {}}
    patch = {
        "volumes": [{"name": "a", "$patch": "delete"}],
        "securityContext": {"$patch": "replace", "z": 3},
        "affinity": {"$patch": "delete"},
    }
    assert merged(base, patch) == {"volumes": [{"name": "b"}], "securityContext": {"z": 3}}
    assert merged({}, {"tolerations": [{"$patch": "delete"}, {"key": "k"}]}) == {
        "tolerations": [{"key": "k"}]
    }


def test_a_volume_has_one_source_after_the_merge() -> None:
    base = {"volumes": [{"name": "shm", "emptyDir": {"medium": "Memory"}}]}
    claim = {"name": "shm", "persistentVolumeClaim": {"claimName": "c"}}
    sized = {"name": "shm", "emptyDir": {"sizeLimit": "1Gi"}}
    assert merged(base, {"volumes": [claim]}) == {"volumes": [claim]}
    both = {"medium": "Memory", "sizeLimit": "1Gi"}
    assert merged(base, {"volumes": [sized]}) == {"volumes": [{"name": "shm", "emptyDir": both}]}


def test_the_hash_covers_what_was_merged() -> None:
    def stamp(**spec: Any) -> str:
        return str(pod_of(Settings(), **spec)["metadata"]["annotations"]["vllm-fleet.dev/template-hash"])

    assert stamp() == stamp(podTemplate={})
    assert stamp() != stamp(podTemplate={"metadata": {"annotations": {"a": "b"}}})


# One row a line of the policy: what a hostile author would write, and the field that is named

HOST_VOLUME = {"volumes": [{"name": "h", "hostPath": {"path": "/"}}]}
TOKEN = {"name": "t", "projected": {"sources": [{"serviceAccountToken": {"path": "token"}}]}}
REFUSED_BY_SAFE: dict[str, tuple[Json, str]] = {
    "host network": ({"spec": {"hostNetwork": True}}, "spec.hostNetwork"),
    "host processes": ({"spec": {"hostPID": True}}, "spec.hostPID"),
    "host IPC": ({"spec": {"hostIPC": True}}, "spec.hostIPC"),
    "host port": (sidecar_with(ports=[{"containerPort": 9, "hostPort": 9}]), "ports"),
    "probe of another host": (
        engine_with(livenessProbe={"httpGet": {"host": "169.254.169.254"}}),
        "containers[engine].livenessProbe",
    ),
    "hook to another host": (
        sidecar_with(lifecycle={"preStop": {"tcpSocket": {"host": "127.0.0.1", "port": 10250}}}),
        "containers[x].preStop",
    ),
    "host folder": ({"spec": HOST_VOLUME}, "spec.volumes[h]"),
    "host folder in place of ours": (
        {"spec": {"volumes": [{"name": "tmp", "hostPath": {"path": "/etc"}}]}},
        "spec.volumes[tmp]",
    ),
    "volume of another kind": (
        {"spec": {"volumes": [{"name": "n", "nfs": {"server": "s"}}]}},
        "volumes[n].nfs",
    ),
    "privileged": (engine_with(securityContext={"privileged": True}), "securityContext.privileged"),
    "privileged sidecar": (
        sidecar_with(securityContext={"privileged": True}),
        "[x].securityContext.privileged",
    ),
    "privileged init container": (
        {"spec": {"initContainers": [{"name": "i", "securityContext": {"privileged": True}}]}},
        "initContainers[i].securityContext.privileged",
    ),
    "escalation": (
        engine_with(securityContext={"allowPrivilegeEscalation": True}),
        "securityContext.allowPrivilegeEscalation",
    ),
    "security context taken away": (
        engine_with(securityContext={"$patch": "delete"}),
        "securityContext.allowPrivilegeEscalation",
    ),
    "added capability": (
        engine_with(securityContext={"capabilities": {"add": ["SYS_ADMIN"]}}),
        "capabilities.add",
    ),
    "added capability of a sidecar": (
        sidecar_with(securityContext={"capabilities": {"add": ["NET_RAW"]}}),
        "capabilities.add",
    ),
    "capabilities not dropped": (
        engine_with(securityContext={"capabilities": {"drop": []}}),
        "securityContext.capabilities",
    ),
    "no seccomp": (
        {"spec": {"securityContext": {"seccompProfile": {"type": "Unconfined"}}}},
        "securityContext.seccompProfile",
    ),
    "seccomp of the node": (
        {"spec": {"securityContext": {"seccompProfile": {"type": "Localhost", "localhostProfile": "x"}}}},
        "securityContext.seccompProfile",
    ),
    "seccomp taken away": (
        {"spec": {"securityContext": {"$patch": "replace", "fsGroup": 1}}},
        "spec.securityContext",
    ),
    "no AppArmor": (
        sidecar_with(securityContext={"appArmorProfile": {"type": "Unconfined"}}),
        "appArmorProfile",
    ),
    "no AppArmor by its old name": (
        {"metadata": {"annotations": {"container.apparmor.security.beta.kubernetes.io/x": "unconfined"}}},
        "metadata.annotations",
    ),
    "Windows host process": (
        {"spec": {"securityContext": {"windowsOptions": {"hostProcess": True}}}},
        "securityContext.windowsOptions",
    ),
    "SELinux label": (
        engine_with(securityContext={"seLinuxOptions": {"type": "spc_t"}}),
        "seLinuxOptions",
    ),
    "unmasked proc": (engine_with(securityContext={"procMount": "Unmasked"}), "procMount"),
    "kernel parameters": (
        {"spec": {"securityContext": {"sysctls": [{"name": "kernel.msgmax", "value": "1"}]}}},
        "sysctls",
    ),
    "service account": ({"spec": {"serviceAccountName": "admin"}}, "spec.serviceAccountName"),
    "service account's old name": ({"spec": {"serviceAccount": "admin"}}, "spec.serviceAccount"),
    "token": ({"spec": {"automountServiceAccountToken": True}}, "spec.automountServiceAccountToken"),
    "token in a volume": ({"spec": {"volumes": [TOKEN]}}, "spec.volumes[t]"),
    "node": ({"spec": {"nodeName": "control-plane"}}, "spec.nodeName"),
    "image": (engine_with(image="evil:1"), "containers[engine].image"),
    "command": (engine_with(command=["sh"]), "containers[engine].command"),
    "managed flags": (engine_with(args=["--trust-remote-code"]), "containers[engine].args"),
    "managed variable": (engine_with(env=[{"name": "HOME", "value": "/"}]), "containers[engine].env"),
    "everything anew": ({"spec": {"$patch": "replace", "containers": []}}, "spec.containers"),
}
REFUSED_ALWAYS: dict[str, tuple[Json, str]] = {
    "selector's label": ({"metadata": {"labels": {"vllm-fleet.dev/model": "other"}}}, "metadata.labels"),
    "label of ours": ({"metadata": {"labels": {"app.kubernetes.io/component": "x"}}}, "metadata.labels"),
    "hash": ({"metadata": {"annotations": {"vllm-fleet.dev/template-hash": "x"}}}, "metadata.annotations"),
    "engine's port taken away": (
        engine_with(ports=[{"containerPort": 8000, "$patch": "delete"}]),
        "containers[engine].ports",
    ),
    "engine's port renamed": (engine_with(ports=[{"containerPort": 8000, "name": "x"}]), "[engine].ports"),
    "engine's port in a sidecar": (sidecar_with(ports=[{"name": "http", "containerPort": 1}]), "[x].ports"),
    "engine taken away": (
        {"spec": {"containers": [{"name": "engine", "$patch": "delete"}, {"name": "x", "image": "x:1"}]}},
        "spec.containers",
    ),
    "the pod taken away": ({"spec": {"$patch": "delete"}}, "spec.podTemplate.spec"),
    "engine without an image": (
        {"spec": {"containers": [{"name": "engine", "$patch": "replace"}]}},
        "containers[engine].image",
    ),
    "host folder": ({"spec": HOST_VOLUME}, "spec.volumes[h]"),
}


@pytest.mark.parametrize("row", [*REFUSED_BY_SAFE, *REFUSED_ALWAYS])
def test_safe_refuses(row: str) -> None:
    template, field = (REFUSED_BY_SAFE | REFUSED_ALWAYS)[row]
    assert any(field in text.split(": ")[0] for text in refusals(Settings(), podTemplate=template))


@pytest.mark.parametrize("row", REFUSED_ALWAYS)
def test_full_refuses_what_would_break_the_chain(row: str) -> None:
    template, field = REFUSED_ALWAYS[row]
    found = refusals(settings(podTemplate="full"), podTemplate=template)
    assert any(field in text.split(": ")[0] for text in found)


@pytest.mark.parametrize("row", sorted(REFUSED_BY_SAFE.keys() - {"everything anew", "host folder"}))
def test_full_opens_what_safe_closes(row: str) -> None:
    template, _ = REFUSED_BY_SAFE[row]
    open_to_all = settings(podTemplate="full", hostPathPrefixes=["/etc"])
    if row == "host folder in place of ours":
        mounts = [{"mountPath": "/tmp", "name": "tmp", "readOnly": True}]
        template = {"spec": template["spec"] | {"containers": [{"name": "engine", "volumeMounts": mounts}]}}
    pod_of(open_to_all, podTemplate=template)


def test_none_refuses_any_template() -> None:
    closed = settings(podTemplate="none")
    (found,) = refusals(closed, podTemplate={"metadata": {"labels": {"a": "b"}}})
    assert found == 'spec.podTemplate: is refused by settings.policy.podTemplate "none"'
    pod_of(closed)


def test_remote_code_only_where_the_platform_allows_it() -> None:
    trusting = {"engine": {"trustRemoteCode": True}}
    pod_of(Settings(), **trusting)
    (found,) = refusals(settings(trustRemoteCode=False), **trusting)
    assert found.startswith("spec.engine.trustRemoteCode: ")


# Images


@pytest.mark.parametrize(
    ("image", "prefix", "wanted"),
    [
        ("ghcr.io/acme/vllm:1", "ghcr.io/acme", True),
        ("ghcr.io/acme/vllm:1", "ghcr.io/acme/", True),
        ("ghcr.io/acme/vllm:1", "ghcr.io/acme/vllm", True),
        ("ghcr.io/acme/vllm@sha256:0", "ghcr.io/acme/vllm", True),
        ("ghcr.io/acme-evil/vllm:1", "ghcr.io/acme", False),
        ("ghcr.io/acme/vllm-evil:1", "ghcr.io/acme/vllm", False),
        ("evil.io/ghcr.io/acme/vllm:1", "ghcr.io/acme", False),
        ("ghcr.io/acme/vllm", "ghcr.io/acme/vllm", True),
        ("GHCR.io/acme/vllm", "ghcr.io/acme", False),
    ],
)
def test_an_image_prefix_ends_at_a_boundary(image: str, prefix: str, wanted: bool) -> None:
    assert image_matches(image, prefix) is wanted


def test_every_image_of_the_pod_is_judged_but_the_platforms_own() -> None:
    closed = settings(imagePrefixes=["ghcr.io/acme/"])
    pod_of(closed)
    pod_of(closed, image="ghcr.io/acme/vllm:1")
    volume = {"name": "v", "image": {"reference": "evil:1"}}
    weights = {"image": {"reference": "evil:1", "path": "x"}}
    hostile: dict[str, Json] = {
        "spec.image": {"image": "evil:1"},
        "spec.source.image.reference": {"source": weights},
        "spec.adapters[0].source.image.reference": {"adapters": [{"name": "a", "source": weights}]},
        "spec.podTemplate.spec.containers[x].image": {"podTemplate": sidecar_with(image="evil:1")},
        "spec.podTemplate.spec.volumes[v].image": {"podTemplate": {"spec": {"volumes": [volume]}}},
    }
    for field, spec in hostile.items():
        told = "evil:1 is not within settings.policy.imagePrefixes (ghcr.io/acme/)"
        assert refusals(closed, **spec) == [f"{field}: {told}"]
    default = closed.images.cuda
    assert f"{default} is not within" in refusals(closed, image=default)[0]


# Folders of nodes


@pytest.mark.parametrize(
    ("path", "wanted"),
    [
        ("/srv/models", True),
        ("/srv/models/a", True),
        ("/srv/models-of-others", False),
        ("/srv/models/../../etc", False),
        ("//srv/models", False),
        ("srv/models", False),
        ("/", False),
        ("", False),
    ],
)
def test_a_folder_is_within_a_prefix_or_not(path: str, wanted: bool) -> None:
    assert under(path, "/srv/models") is wanted


def test_a_source_on_the_node_needs_the_platforms_consent() -> None:
    spec = {"model": "/models/x", "source": {"hostPath": {"path": "/srv/models"}}}
    (found,) = refusals(Settings(), **spec)
    assert found == (
        "spec.source.hostPath.path: /srv/models is not within settings.policy.hostPathPrefixes (none)"
    )
    pod_of(settings(hostPathPrefixes=["/srv"]), **spec)


@pytest.mark.parametrize("mode", ["safe", "full"])
def test_a_folder_of_the_node_is_never_writable(mode: str) -> None:
    allowed = settings(hostPathPrefixes=["/srv"], podTemplate=mode)
    spec = {"model": "/models/x", "source": {"hostPath": {"path": "/srv/models"}}}
    writable = engine_with(volumeMounts=[{"mountPath": "/models", "readOnly": False}])
    again = sidecar_with(volumeMounts=[{"name": "weights", "mountPath": "/w"}])
    for template in (writable, again):
        (found,) = refusals(allowed, podTemplate=template, **spec)
        assert found.endswith("/srv/models must be mounted with readOnly: true")


def test_a_wrong_type_in_the_template_is_left_to_the_api_server() -> None:
    """No exception of ours: the object is refused with the server's own words."""
    odd = {"spec": {"volumes": ["x"], "securityContext": {"seccompProfile": {"type": "RuntimeDefault"}}}}
    pod_of(Settings(), podTemplate=odd)
    pod_of(Settings(), podTemplate={"spec": {"initContainers": {"a": 1}}})
