"""What a model's pod may be: `settings.policy`, judged on the pod as it would be applied, after the merge.

Who may create a VLLMModel must not own the node by it. Each line of the policy is one function of the same
form; the lists at the end are the whole of it. `safe` is Pod Security's "baseline" for what podTemplate adds,
and further: https://kubernetes.io/docs/concepts/security/pod-security-standards/
"""

from __future__ import annotations

import posixpath
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from vllm_operator import names
from vllm_operator.errors import Problem
from vllm_operator.render.engine_options import ENV_EFFECTS, REFUSED, env_refusal, option_problems
from vllm_operator.render.facts import Manifest
from vllm_operator.render.storage import field_of_volume
from vllm_operator.settings import Policy

TEMPLATE = "spec.podTemplate"
HOST_NAMESPACES = ("hostNetwork", "hostPID", "hostIPC")
PROBES = ("startupProbe", "readinessProbe", "livenessProbe")
HOOKS = ("postStart", "preStop")
OLD_APPARMOR = "container.apparmor.security.beta.kubernetes.io/"
VOLUME_KINDS = {
    "configMap", "csi", "downwardAPI", "emptyDir", "ephemeral", "image", "persistentVolumeClaim",
    "projected", "secret",
}  # fmt: skip
_FULL = 'is refused by settings.policy.podTemplate "safe"'


@dataclass(frozen=True)
class Review:
    """A pod template before podTemplate (`base`) and after (`merged`).

    `default_image` is the platform's own, which needs no prefix; empty where the model names its image.
    """

    policy: Policy
    base: Manifest
    merged: Manifest
    default_image: str
    has_template: bool
    trusts_remote_code: bool = False
    extra_args: tuple[str, ...] = ()
    env: tuple[str, ...] = ()  # names

    @property
    def spec(self) -> Manifest:
        spec: Manifest = self.merged["spec"]
        return spec

    @property
    def containers(self) -> list[Manifest]:
        return [item for field in ("initContainers", "containers") for item in _items(self.spec, field)]

    @property
    def added_volumes(self) -> list[Manifest]:
        """Those that the podTemplate brought or changed."""
        return [item for item in _items(self.spec, "volumes") if item not in self.base["spec"]["volumes"]]


Judge = Callable[[Review], Iterator[Problem]]


def policy_problems(review: Review) -> Iterator[Problem]:
    """Every breach; nothing where the pod is within the policy."""
    if review.has_template and not isinstance(review.merged.get("spec"), dict):
        yield Problem(f"{TEMPLATE}.spec", "must leave a pod's spec")
        return
    for judge in ALWAYS:
        yield from judge(review)
    if review.has_template:
        for judge in TEMPLATE_JUDGES[review.policy.pod_template]:
            yield from judge(review)


def under(path: str, prefix: str) -> bool:
    """Whether `path` is `prefix` or inside it: /models has no /models-of-others, nor /models/../etc."""
    inside = posixpath.normpath(path)
    folder = posixpath.normpath(prefix)
    return path.startswith("/") and (inside == folder or inside.startswith(f"{folder.rstrip('/')}/"))


def image_matches(image: str, prefix: str) -> bool:
    """At a boundary: ghcr.io/acme is no prefix of ghcr.io/acme-evil/vllm."""
    return image.startswith(prefix) and (
        prefix.endswith(("/", ":", "@")) or image[len(prefix) :][:1] in "/:@"
    )


def _images(review: Review) -> Iterator[Problem]:
    prefixes = review.policy.image_prefixes
    for where, image in _named_images(review) if prefixes else ():
        if image != review.default_image and not any(image_matches(image, prefix) for prefix in prefixes):
            allowed = ", ".join(prefixes)
            yield Problem(where, f"{image} is not within settings.policy.imagePrefixes ({allowed})")


def _named_images(review: Review) -> Iterator[tuple[str, str]]:
    """Every image that the node would pull, with the field that names it."""
    ours = _engine(review.base["spec"])["image"]
    for container in review.containers:
        image = str(container.get("image", ""))
        own = container.get("name") == names.ENGINE and image == ours
        yield "spec.image" if own else f"{_path(review, container)}.image", image
    for volume in _items(review.spec, "volumes"):
        if "image" in volume:
            added = f"{TEMPLATE}.spec.volumes[{volume.get('name')}].image"
            ours = f"{field_of_volume(str(volume.get('name')))}.image.reference"
            where = added if volume in review.added_volumes else ours
            yield where, str(_map(volume, "image").get("reference", ""))


def _host_paths(review: Review) -> Iterator[Problem]:
    prefixes = review.policy.host_path_prefixes
    for volume in _items(review.spec, "volumes"):
        if not isinstance(host := volume.get("hostPath"), dict):
            continue
        path, where = str(host.get("path", "")), _where(review, volume)
        if not any(under(path, prefix) for prefix in prefixes):
            allowed = ", ".join(prefixes) or "none"
            yield Problem(where, f"{path} is not within settings.policy.hostPathPrefixes ({allowed})")
        mounts = (mount for item in review.containers for mount in _items(item, "volumeMounts"))
        if any(
            mount.get("name") == volume.get("name") and mount.get("readOnly") is not True for mount in mounts
        ):
            yield Problem(where, f"{path} must be mounted with readOnly: true")


def _where(review: Review, volume: Manifest) -> str:
    added = volume in review.added_volumes
    return f"{TEMPLATE}.spec.volumes[{volume.get('name')}]" if added else "spec.source.hostPath.path"


def _remote_code(review: Review) -> Iterator[Problem]:
    if review.trusts_remote_code and not review.policy.trust_remote_code:
        yield Problem("spec.engine.trustRemoteCode", "is refused by settings.policy.trustRemoteCode")


def _engine_options(review: Review) -> Iterator[Problem]:
    if review.policy.engine_options == "safe":
        yield from option_problems(review.extra_args, review.env)


def _template_env(review: Review) -> Iterator[Problem]:
    """Else podTemplate would be the way around engineOptions."""
    if review.policy.engine_options != "safe":
        return
    before, after = _engine(review.base["spec"]), _engine(review.spec)
    for item in _items(after, "env"):
        if item not in before["env"] and (name := str(item.get("name"))) in ENV_EFFECTS:
            yield Problem(f"{_path(review, after)}.env", env_refusal(name))
    if after.get("envFrom"):
        yield Problem(f"{_path(review, after)}.envFrom", f"can set any variable: {REFUSED}; use engine.env")


def _selectors(review: Review) -> Iterator[Problem]:
    """Our labels and annotations tell whose pod it is, and which revision."""
    for field in ("labels", "annotations"):
        ours = review.base["metadata"].get(field, {})
        found = review.merged["metadata"].get(field, {})
        for key in {**ours, **found}:
            managed = key in ours or key.startswith(f"{names.GROUP}/")
            if managed and found.get(key) != ours.get(key):
                yield Problem(f"{TEMPLATE}.metadata.{field}", f"{key} is set by the operator")


def _ports(review: Review) -> Iterator[Problem]:
    """The Service and the gateway find the engine by its port's name and number."""
    for container in review.containers:
        where = f"{_path(review, container)}.ports"
        ports = _items(container, "ports")
        if container.get("name") == names.ENGINE:
            if any(port not in ports for port in _engine(review.base["spec"])["ports"]):
                yield Problem(where, "the engine's port http (8000) is set by the operator")
            ports = [port for port in ports if port not in _engine(review.base["spec"])["ports"]]
        if any(
            port.get("name") == names.ENGINE_PORT_NAME or port.get("containerPort") == names.ENGINE_PORT
            for port in ports
        ):
            yield Problem(where, "port 8000 and the name http are the engine's own")


def _engine_is_there(review: Review) -> Iterator[Problem]:
    containers = _items(review.spec, "containers")
    if not containers or containers[0].get("name") != names.ENGINE:
        yield Problem(
            f"{TEMPLATE}.spec.containers", f"the container {names.ENGINE} must stay, and be the first"
        )
    elif not isinstance(containers[0].get("image"), str):
        yield Problem(f"{_path(review, containers[0])}.image", "is required")


def _no_template(_review: Review) -> Iterator[Problem]:
    yield Problem(TEMPLATE, 'is refused by settings.policy.podTemplate "none"')


def _host_namespaces(review: Review) -> Iterator[Problem]:
    for field in HOST_NAMESPACES:
        if review.spec.get(field):
            yield Problem(f"{TEMPLATE}.spec.{field}", _FULL)


def _host_ports(review: Review) -> Iterator[Problem]:
    for container in review.containers:
        if any(port.get("hostPort") for port in _items(container, "ports")):
            yield Problem(f"{_path(review, container)}.ports", f"a hostPort {_FULL}")


def _host_handlers(review: Review) -> Iterator[Problem]:
    """The kubelet would ask from the node's own network, whatever a NetworkPolicy says of the pod."""
    for container in review.containers:
        handlers = {probe: _map(container, probe) for probe in PROBES}
        handlers |= {hook: _map(_map(container, "lifecycle"), hook) for hook in HOOKS}
        for field, handler in handlers.items():
            if _map(handler, "httpGet").get("host") or _map(handler, "tcpSocket").get("host"):
                yield Problem(f"{_path(review, container)}.{field}", f"another host {_FULL}")


def _volume_kinds(review: Review) -> Iterator[Problem]:
    for volume in review.added_volumes:
        if refused := sorted(volume.keys() - {"name"} - VOLUME_KINDS):
            yield Problem(f"{TEMPLATE}.spec.volumes[{volume.get('name')}].{refused[0]}", _FULL)


def _privilege(review: Review) -> Iterator[Problem]:
    for container in review.containers:
        context = _map(container, "securityContext")
        where = f"{_path(review, container)}.securityContext"
        for field in ("privileged", "allowPrivilegeEscalation"):
            if context.get(field):
                yield Problem(f"{where}.{field}", _FULL)
        if context.get("procMount", "Default") != "Default":
            yield Problem(f"{where}.procMount", _FULL)
        yield from _profiles(context, where)
    for key in _map(review.merged["metadata"], "annotations"):
        if key.startswith(OLD_APPARMOR):
            yield Problem(f"{TEMPLATE}.metadata.annotations", f"{key} {_FULL}; use appArmorProfile")
    pod = _map(review.spec, "securityContext")
    yield from _profiles(pod, f"{TEMPLATE}.spec.securityContext")
    if pod.get("sysctls"):
        yield Problem(f"{TEMPLATE}.spec.securityContext.sysctls", _FULL)


def _profiles(context: Manifest, where: str) -> Iterator[Problem]:
    for field in ("seccompProfile", "appArmorProfile"):
        if _map(context, field).get("type") == "Unconfined":
            yield Problem(f"{where}.{field}", f"Unconfined {_FULL}")
    for field in ("seLinuxOptions", "windowsOptions"):
        if context.get(field):
            yield Problem(f"{where}.{field}", _FULL)


def _capabilities(review: Review) -> Iterator[Problem]:
    for container in review.containers:
        if _map(_map(container, "securityContext"), "capabilities").get("add"):
            yield Problem(f"{_path(review, container)}.securityContext.capabilities.add", _FULL)


def _kept_security(review: Review) -> Iterator[Problem]:
    """What the operator closes stays closed: a merge could also take it away."""
    before, after = _engine(review.base["spec"]), _engine(review.spec)
    for field in ("allowPrivilegeEscalation", "capabilities"):
        if _map(after, "securityContext").get(field) != before["securityContext"].get(field):
            yield Problem(f"{_path(review, after)}.securityContext.{field}", f"a change {_FULL}")
    ours = review.base["spec"]["securityContext"]["seccompProfile"]
    if _map(review.spec, "securityContext").get("seccompProfile") not in (ours, None):
        yield Problem(f"{TEMPLATE}.spec.securityContext.seccompProfile", f"a change {_FULL}")
    if "seccompProfile" not in _map(review.spec, "securityContext"):
        yield Problem(f"{TEMPLATE}.spec.securityContext", f"without seccompProfile {_FULL}")


def _accounts(review: Review) -> Iterator[Problem]:
    for field in ("serviceAccountName", "serviceAccount"):
        if review.spec.get(field):
            yield Problem(f"{TEMPLATE}.spec.{field}", _FULL)
    if review.spec.get("automountServiceAccountToken") is not False:
        yield Problem(f"{TEMPLATE}.spec.automountServiceAccountToken", f"a token in the pod {_FULL}")
    for volume in review.added_volumes:
        sources = _items(_map(volume, "projected"), "sources")
        if any("serviceAccountToken" in source for source in sources):
            yield Problem(f"{TEMPLATE}.spec.volumes[{volume.get('name')}]", f"a token in the pod {_FULL}")


def _node_name(review: Review) -> Iterator[Problem]:
    if review.spec.get("nodeName"):
        yield Problem(f"{TEMPLATE}.spec.nodeName", f"{_FULL}; use scheduling.nodeSelector")


def _engine_command(review: Review) -> Iterator[Problem]:
    """Else every flag that is managed or refused could come in here."""
    before, after = _engine(review.base["spec"]), _engine(review.spec)
    for field, instead in (("image", "spec.image"), ("command", "engine"), ("args", "engine.extraArgs")):
        if after.get(field) != before.get(field):
            yield Problem(f"{_path(review, after)}.{field}", f"{_FULL}; use {instead}")
    ours = {item["name"]: item for item in before["env"]}
    for item in _items(after, "env"):
        if item.get("name") in ours and item != ours[item["name"]]:
            yield Problem(f"{_path(review, after)}.env", f"{item['name']} is set by the operator")


def _path(review: Review, container: Manifest) -> str:
    field = "containers" if container in _items(review.spec, "containers") else "initContainers"
    return f"{TEMPLATE}.spec.{field}[{container.get('name')}]"


def _engine(spec: Manifest) -> Manifest:
    return next((item for item in _items(spec, "containers") if item.get("name") == names.ENGINE), {})


def _map(parent: Manifest, field: str) -> Manifest:
    """Empty where it is absent or of another type, which the API server refuses."""
    found: Any = parent.get(field)
    return found if isinstance(found, dict) else {}


def _items(parent: Manifest, field: str) -> list[Manifest]:
    found: Any = parent.get(field)
    return [item for item in found if isinstance(item, dict)] if isinstance(found, list) else []


ALWAYS: tuple[Judge, ...] = (_images, _host_paths, _remote_code, _engine_options)
FULL: tuple[Judge, ...] = (_engine_is_there, _selectors, _ports)
SAFE: tuple[Judge, ...] = (
    *FULL,
    _host_namespaces,
    _host_ports,
    _host_handlers,
    _volume_kinds,
    _privilege,
    _capabilities,
    _kept_security,
    _accounts,
    _node_name,
    _engine_command,
    _template_env,
)
TEMPLATE_JUDGES: dict[str, tuple[Judge, ...]] = {"none": (_no_template,), "safe": SAFE, "full": FULL}
