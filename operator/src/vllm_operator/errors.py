"""The operator's errors, one tree. Messages are written for whoever reads a condition or a log line."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

MAX_MESSAGE = 1024


def clip(text: str, limit: int = MAX_MESSAGE) -> str:
    """At most `limit` characters: what others sent us never fills a status or a log."""
    return text if len(text) <= limit else f"{text[: limit - 1]}…"


@dataclass(frozen=True)
class Problem:
    """One bad field. `field` is a path from the root (`spec.gpu.count`); `message` says how to mend it."""

    field: str
    message: str

    def __str__(self) -> str:
        return f"{self.field}: {self.message}"


class OperatorError(Exception):
    """Base of everything that the operator raises on purpose."""


class SpecError(OperatorError):
    """A VLLMModel that cannot be rendered: every problem found, not only the first."""

    def __init__(self, problems: tuple[Problem, ...]) -> None:
        super().__init__("; ".join(map(str, problems)))
        self.problems = problems


class SettingsError(OperatorError):
    """A settings file that cannot be used."""


class SchemaError(OperatorError):
    """A model class that has no structural schema."""


class ApiError(OperatorError):
    """The API server's refusal, or that it could not be reached (`code` 0).

    `retry_after` is in seconds, where the server asked for it.
    """

    def __init__(self, code: int, reason: str, message: str, retry_after: float | None = None) -> None:
        super().__init__(clip(message))
        self.code, self.reason, self.retry_after = code, reason, retry_after

    @property
    def message(self) -> str:
        return str(self.args[0])


class NotFound(ApiError):
    """404."""


class Conflict(ApiError):
    """409: it exists already, or it is not the object that was meant."""


class Gone(ApiError):
    """410: the resourceVersion is too old; list again."""


class Forbidden(ApiError):
    """403: a missing right, a quota or an admission policy. `message` is the server's own."""


class Invalid(ApiError):
    """400 or 422: the server refuses the object's content."""


class Unavailable(ApiError):
    """429, 5xx, a timeout or no connection: the same request may pass later."""


class MissingApi(OperatorError):
    """The cluster does not serve a kind that a model needs."""


class FormerObject(OperatorError):
    """An object of the child's name is a deleted model's of the same name, and is still there."""

    def __init__(self, kind: str, name: str, finalizers: Sequence[str] = ()) -> None:
        held = f", held by {', '.join(finalizers)}" if finalizers else ""
        super().__init__(
            clip(
                f"{kind} {name} of the deleted model that had this name is still being deleted{held}; when "
                "it is gone, the model goes on by itself"
            )
        )


class ForeignObject(OperatorError):
    """An object of the child's name exists and is not ours; it is never taken over."""

    def __init__(self, kind: str, name: str) -> None:
        super().__init__(
            f"a {kind} named {name} exists that this model does not own: delete it, or rename the model"
        )
