"""A model judged by `settings.policy`: its pod template, or what is refused of it."""

from __future__ import annotations

from typing import Any

import pytest
from vllm_models import model_body

from vllm_operator.api.parsing import parse
from vllm_operator.errors import SpecError
from vllm_operator.render import render
from vllm_operator.settings import Settings, parse_settings

Json = dict[str, Any]


def settings(**policy: Any) -> Settings:
    return parse_settings({"policy": policy}, "test")


def pod_of(made: Settings, /, **spec: Any) -> Json:
    template: Json = render(parse(model_body(**spec)), made)[1]["spec"]["template"]
    return template


def refusals(made: Settings, /, **spec: Any) -> list[str]:
    with pytest.raises(SpecError) as caught:
        pod_of(made, **spec)
    return [str(problem) for problem in caught.value.problems]


def engine_with(**fields: Any) -> Json:
    return {"spec": {"containers": [{"name": "engine", **fields}]}}
