"""docs/admission.md and the code say the same.

Proves: the example of a file of keys is one that the gateway reads; the table of refusals names codes and
statuses that the gateway has, and every refusal of the admission layer stands in it.
"""

from __future__ import annotations

import re
from pathlib import Path

from vllm_gateway import errors
from vllm_gateway.policy import keyring, keys, queue, rates, room

PAGE = (Path(__file__).resolve().parents[2] / "docs/admission.md").read_text()
RAISED = re.compile(r'GatewayError\(\s*(\d{3}), "(\w+)"')


def test_the_example_of_keys_can_be_read(tmp_path: Path) -> None:
    example = re.search(r"```yaml\n(.*?)```", PAGE, flags=re.DOTALL)
    assert example is not None
    (tmp_path / "keys.yaml").write_text(example[1])
    read = keys.read_keys(tmp_path)
    alice = read.caller_of(b"sk-alice-8f2c6b1d9a")
    assert alice is not None
    assert (len(read), alice.name) == (2, "alice")


def test_every_refusal_is_in_the_table() -> None:
    modules = (keyring, keys, queue, rates, room)
    raised = {
        found for module in modules for found in RAISED.findall(Path(module.__file__ or "").read_text())
    }
    raised |= {
        (str(error.status), error.code)
        for error in (
            errors.model_not_allowed("m", ()),
            errors.model_not_found("m", ()),
            errors.model_not_ready("m", "", ""),
        )
    }
    listed = set(re.findall(r"^\| (\d{3}) \| `(\w+)` \|", PAGE, flags=re.MULTILINE))
    assert listed == raised
