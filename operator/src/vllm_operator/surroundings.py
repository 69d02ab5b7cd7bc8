"""What others make that concerns a model: warnings about its pods, autoscalers of its child, its Secrets.

All of it is advice. Without a right to watch one of these, the operator works and says less.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping

from vllm_operator import names
from vllm_operator.clock import Clock
from vllm_operator.errors import clip
from vllm_operator.kinds import AUTOSCALERS, EVENTS, SECRETS, Body, Kind, ObjectKey, key_of, uid_of
from vllm_operator.names import ModelKey
from vllm_operator.reflector import Change, Reflector, Source
from vllm_operator.settings import Settings

# What a container's state or the scheduler's condition tells too, or what every start of an engine brings.
_TOLD_ELSEWHERE = ("Unhealthy", "BackOff", "Failed", "FailedScheduling")
WARNINGS = ",".join(
    ("involvedObject.kind=Pod", "type=Warning", *(f"reason!={reason}" for reason in _TOLD_ELSEWHERE))
)
# A Job has no condition for it, unlike a Deployment.
REFUSED_JOBS = "involvedObject.kind=Job,type=Warning,reason=FailedCreate"
_SUFFIX = f"-{names.ENGINE}"


class Surroundings:
    """`enqueue(key)` is called for each model that a change concerns; `model_of` knows whose pod or Job an
    Event tells of.
    """

    def __init__(
        self,
        source: Source,
        settings: Settings,
        clock: Clock,
        enqueue: Callable[[ModelKey], None],
        model_of: Callable[[str, ObjectKey], ModelKey | None],
    ) -> None:
        self._source, self._clock, self._enqueue, self._model_of = source, clock, enqueue, model_of
        self._warnings: dict[str, dict[ObjectKey, Body]] = defaultdict(dict)  # by uid of what they tell of
        self._autoscalers: dict[ModelKey, set[str]] = defaultdict(set)
        self._users: dict[ObjectKey, set[ModelKey]] = defaultdict(set)
        self._versions: dict[str, dict[str, str]] = defaultdict(dict)
        self._secrets: dict[str, Reflector] = {}
        self.reflectors: list[Reflector] = []
        for scope in settings.watch_namespaces or ("",):
            for fields in (WARNINGS, REFUSED_JOBS):
                self._watch(EVENTS, scope, self._warned, _slim_warning, fields)
            self._watch(AUTOSCALERS, scope, self._scaled, _slim_autoscaler)
            if settings.secret_access:
                self._secrets[scope] = self._watch(SECRETS, scope, self._secret_changed, _slim_secret)

    def warnings(self, bodies: Iterable[Body]) -> dict[str, str]:
        """The newest warning about each pod or Job that has one, by its uid."""
        found = {uid_of(body): self._warnings.get(uid_of(body)) for body in bodies}
        return {
            uid: str(max(told.values(), key=lambda event: str(event["at"]))["message"])
            for uid, told in found.items()
            if told
        }

    def autoscaler(self, key: ModelKey) -> str:
        """The name of a HorizontalPodAutoscaler that targets the model's Deployment; empty for none."""
        return min(self._autoscalers.get(key) or ("",))

    def secrets(self, namespace: str) -> Mapping[str, str] | None:
        """ResourceVersion by name of the namespace's Secrets; None where they are not to be seen (yet)."""
        reflector = self._secrets.get("") or self._secrets.get(namespace)
        if reflector is None or not reflector.synced.is_set():
            return None
        return self._versions.get(namespace, {})

    def follow(self, key: ModelKey, secrets: Iterable[str]) -> None:
        """From now on a change of one of these Secrets enqueues the model."""
        for name in secrets if self._secrets else ():
            self._users[ObjectKey(key.namespace, name)].add(key)

    def _watch(
        self, kind: Kind, scope: str, changed: Change, slim: Callable[[Body], Body], fields: str = ""
    ) -> Reflector:
        made = Reflector(
            self._source,
            kind,
            self._clock,
            changed,
            namespace=scope,
            fields=fields,
            project=slim,
            optional=True,
        )
        self.reflectors.append(made)
        return made

    def _warned(self, old: Body | None, new: Body | None) -> None:
        if old is not None:
            told = self._warnings[old["about_uid"]]
            told.pop(key_of(old), None)
            if not told:
                del self._warnings[old["about_uid"]]
        if new is not None:
            self._warnings[new["about_uid"]][key_of(new)] = new
            if (key := self._model_of(new["kind"], new["about"])) is not None:
                self._enqueue(key)

    def _scaled(self, old: Body | None, new: Body | None) -> None:
        for body, there in ((old, False), (new, True)):
            if body is not None and (key := body["model"]) is not None:
                known = self._autoscalers[key]
                (known.add if there else known.discard)(key_of(body).name)
        for key in {body["model"] for body in (old, new) if body is not None} - {None}:
            self._enqueue(key)

    def _secret_changed(self, old: Body | None, new: Body | None) -> None:
        if old is not None:
            self._versions[key_of(old).namespace].pop(key_of(old).name, None)
        if new is not None:
            self._versions[key_of(new).namespace][key_of(new).name] = new["metadata"]["resourceVersion"]
        for key in self._users.get(key_of(new or old or {}), ()):
            self._enqueue(key)


def _slim_warning(event: Body) -> Body:
    about = event.get("involvedObject") or {}
    series = event.get("series") or {}
    at = series.get("lastObservedTime") or event.get("lastTimestamp") or event.get("eventTime") or ""
    return {
        "metadata": _identity(event),
        "kind": about.get("kind", ""),
        "about": ObjectKey(about.get("namespace", ""), about.get("name", "")),
        "about_uid": about.get("uid", ""),
        "message": clip(event.get("message") or event.get("reason") or "", 600),
        "at": at,
    }


def _slim_autoscaler(body: Body) -> Body:
    target = (body.get("spec") or {}).get("scaleTargetRef") or {}
    name = str(target.get("name", ""))
    ours = target.get("kind") == "Deployment" and name.endswith(_SUFFIX)
    namespace = body["metadata"]["namespace"]
    model = ModelKey(namespace, name.removesuffix(_SUFFIX)) if ours else None
    return {"metadata": _identity(body), "model": model}


def _slim_secret(body: Body) -> Body:
    return {"metadata": _identity(body)}


def _identity(body: Body) -> Body:
    kept = ("name", "namespace", "uid", "resourceVersion")
    return {key: body["metadata"][key] for key in kept if key in body["metadata"]}
