"""What only the real API server and the real vLLM can say of what this project writes.

Proves: the cost that the API server estimates for the definition's CEL rules, by its own figures, is far from
its limits; every argument that any golden model is rendered with is accepted by vLLM's own parser.
"""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path
from typing import Any

import cluster
import engine_image
import pytest
import yaml

pytestmark = pytest.mark.e2e
CRD = cluster.ROOT / "tests" / "golden" / "operator" / "crd.yaml"
# https://github.com/kubernetes/apiextensions-apiserver/blob/master/pkg/apis/apiextensions/validation/validation.go
RULE_LIMIT, TOTAL_LIMIT = 10_000_000, 100_000_000
MANY = 10_000
EXCEEDED = re.compile(
    r"^\* (?P<where>\S+): Forbidden: .*estimated rule cost (?P<total>total )?.*"
    r"exceeds budget by factor of (?P<more>more than )?(?P<factor>[0-9.]+)x",
    re.MULTILINE,
)


def definition_of_many(number: int) -> dict[str, Any]:
    """The definition with a list of so many specs in place of one, so that each rule costs as much more."""
    crd: dict[str, Any] = copy.deepcopy(yaml.safe_load(CRD.read_text()))
    group = "cost.vllm-fleet.dev"
    crd["metadata"] = {"name": f"vllmmodels.{group}"}
    crd["spec"]["group"] = group
    version = crd["spec"]["versions"][0]
    spec = version["schema"]["openAPIV3Schema"]["properties"]["spec"]
    specs = {"type": "array", "maxItems": number, "items": spec}
    version["schema"]["openAPIV3Schema"] = {"type": "object", "properties": {"spec": specs}}
    for key in ("additionalPrinterColumns", "subresources"):
        version.pop(key, None)
    return crd


def refusal(number: int) -> str:
    """What the API server says to it, empty if it takes it."""
    create = ("create", "--dry-run=server", "-f", "-")
    text = json.dumps(definition_of_many(number))
    done = cluster.run(cluster.tool("kubectl"), *create, stdin=text, check=False)
    return done.stderr if done.returncode else ""


def test_the_rules_cost_little_by_the_api_servers_own_estimate() -> None:
    """It tells costs only of what it refuses: ten thousand specs in one object."""
    said = refusal(MANY)
    found = list(EXCEEDED.finditer(said))
    assert [line for line in found if line["total"]], said
    for line in found:
        limit = TOTAL_LIMIT if line["total"] else RULE_LIMIT
        share = float(line["factor"]) / MANY
        more = "more than " if line["more"] else ""
        print(f"{line['where']}: {more}{share * limit:,.0f} of {limit:,} ({share:.3%})")
    assert refusal(20) == "", "a rule costs more than a twentieth of its limit"


def golden_arguments() -> dict[str, list[str]]:
    """What follows `vllm serve`, by golden model."""
    found: dict[str, list[str]] = {}
    for path in sorted((cluster.ROOT / "tests" / "golden" / "operator").glob("*.output.yaml")):
        for manifest in yaml.safe_load_all(path.read_text()):
            if manifest["kind"] == "Deployment":
                engine = manifest["spec"]["template"]["spec"]["containers"][0]
                assert engine["name"] == "engine"
                assert engine["command"] == ["vllm", "serve"]
                found[path.name.removesuffix(".output.yaml")] = engine["args"]
    return found


# Prints {"golden model": "what the parser says against it"}.
PARSE = """
import contextlib, io, json, os, sys
from vllm.entrypoints.cli.serve import ServeSubcommand
from vllm.utils.argparse_utils import FlexibleArgumentParser
open(os.environ["TEMPLATE"], "w").close()
serve = ServeSubcommand()
top = FlexibleArgumentParser()
serve.subparser_init(top.add_subparsers(dest="subparser"))
refused = {}
for name, arguments in json.loads(os.environ["ARGUMENTS"]).items():
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            serve.validate(top.parse_args(["serve", *arguments]))
    except SystemExit:
        refused[name] = said.getvalue()
    except Exception as error:
        refused[name] = repr(error)
print("ANSWER", json.dumps(refused))
"""


def parsed(arguments: dict[str, list[str]]) -> dict[str, str]:
    """What vLLM's parser says against each; it looks whether a chat template is there."""
    template = Path("/etc/vllm-fleet/chat-template/template.jinja")
    env = {"ARGUMENTS": json.dumps(arguments), "TEMPLATE": str(template)}
    said: dict[str, str] = engine_image.answer("argument-parser", PARSE, env, folder=str(template.parent))
    return said


def test_vllms_own_parser_takes_every_rendered_argument() -> None:
    """And it does refuse: one made-up flag goes with them."""
    arguments = golden_arguments()
    assert len(arguments) > 40
    arguments["no such flag"] = ["org/m", "--no-such-flag"]
    said = parsed(arguments)
    assert "unrecognized arguments: --no-such-flag" in said.pop("no such flag")
    assert said == {}
