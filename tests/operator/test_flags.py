"""extraArgs: whatever argparse would take for a managed flag is refused, and nothing else.

Proves: the shipped table is vLLM's own; every managed flag exists in it; every prefix of a managed flag is
judged as argparse would; spelling with underscores or a value makes no difference; flags of others pass.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import pytest
from hypothesis import given
from hypothesis import strategies as st
from vllm_models import model_body

from vllm_operator.api import flag_table
from vllm_operator.api.flag_table import FLAGS
from vllm_operator.api.flags import MANAGED, REMOVED, extra_args_problems, normalise
from vllm_operator.api.parsing import parse

DUMP: dict[str, Any] = json.loads(
    (Path(__file__).resolve().parents[1] / "golden" / "vllm-0.32.0-flags.json").read_text()
)
HEADER, FOOTER = (
    "FLAGS = frozenset(  # one word a flag: a list would be 430 lines\n",
    ".split()  # noqa: SIM905\n)\n",
)


def refused(*args: str) -> list[str]:
    spec = parse(model_body()).spec
    engine = spec.engine.model_copy(update={"extra_args": args})
    return [problem.message for problem in extra_args_problems(spec.model_copy(update={"engine": engine}))]


class Ambiguous(Exception):
    pass


class VllmsParser(argparse.ArgumentParser):
    """Argparse with vLLM's option strings, so that what an abbreviation means is argparse's own judgement."""

    def __init__(self) -> None:
        super().__init__(add_help=False)
        for flag in DUMP:
            self.add_argument(flag, dest=flag)

    def error(self, message: str) -> NoReturn:
        raise Ambiguous(message)

    def taken(self, item: str) -> str:
        """The flag that an item stands for."""
        return next(name for name, value in vars(self.parse_args([item])).items() if value is not None)


PARSER = VllmsParser()


def test_the_shipped_table_is_vllms_own(golden: Callable[[Path, str], None]) -> None:
    words, lines = sorted(DUMP), [""]
    for word in words:
        if len(lines[-1]) + len(word) > 104:
            lines.append("")
        lines[-1] = f"{lines[-1]} {word}".strip()
    body = "".join(f"    {line}\n" for line in lines)
    doc = flag_table.__doc__
    text = f'"""{doc}"""\n\nfrom __future__ import annotations\n\n{HEADER}    """\n{body}    """{FOOTER}'
    golden(Path(flag_table.__file__), text)
    assert set(DUMP) == FLAGS


def test_every_managed_flag_is_a_flag_of_vllm_and_every_removed_one_is_not() -> None:
    assert not [flag for flag in MANAGED if flag not in DUMP]
    assert not [flag for flag in REMOVED if flag in DUMP]


def test_every_other_flag_of_vllm_passes() -> None:
    assert not [flag for flag in FLAGS if flag not in MANAGED and refused(flag)]


@given(st.sampled_from(sorted(flag for flag in MANAGED if flag.startswith("--"))), st.data())
def test_an_abbreviation_is_judged_as_argparse_takes_it(flag: str, data: st.DataObject) -> None:
    prefix = flag[: data.draw(st.integers(3, len(flag)))]
    try:
        fine = PARSER.taken(f"{prefix}=1") not in MANAGED
    except Ambiguous:
        fine = False
    assert fine == (not refused(f"{prefix}=1"))


@given(st.sampled_from(sorted(MANAGED)), st.sampled_from(["", "=2", "=a b"]), st.booleans())
def test_spelling_makes_no_difference(flag: str, value: str, underscores: bool) -> None:
    spelled = "--" + flag[2:].replace("-", "_") if underscores and flag.startswith("--") else flag
    assert refused(spelled + value)


@given(st.text(max_size=40))
def test_no_text_breaks_the_judgement(text: str) -> None:
    refused("--enforce-eager", text)
    assert normalise(normalise(text)) == normalise(text)


@pytest.mark.parametrize(
    "args",
    [
        ("--enforce-eager",),
        ("--max-num-batched-tokens", "4096"),
        ("--max_num_batched_tokens=4096",),
        ("--hf-overrides.rope_theta", "1"),
        ("--hf-overrides", '{"a b": 1}'),
        ("--seed", "-1"),
        ("--seed", "-1.5e3"),
        ("-O3",),
        ("-ep",),
        ("--flag-of-a-fork", "x"),
    ],
)
def test_what_passes(args: tuple[str, ...]) -> None:
    assert refused(*args) == []


def test_the_message_names_the_field_to_use() -> None:
    assert refused("--max-model-len=3") == [
        "--max-model-len is managed by the operator: use engine.maxModelLen"
    ]
    assert refused("--runn") == [
        "--runn abbreviates --runner, which is managed by the operator: use engine.runner"
    ]
    assert refused("-tp4") == [
        "-tp4 sets -tp, which is managed by the operator: use engine.tensorParallelSize"
    ]
