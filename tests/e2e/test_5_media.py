"""What URLs a model's callers can make vLLM fetch, tried on vLLM's own code with what the operator renders.

The model of these tests takes no images, so vLLM's connector is asked in the engine's image, made as its
requests make it: with the rendered arguments after vLLM's own parser, under the rendered variables, beside a
server on the pod's loopback interface that tells what it was asked for.

Proves: without allowedMediaDomains nothing is fetched; with it the named host is, and no other, however it is
spelled; no redirect is followed; no file is read; link-local addresses are not asked; without our arguments
and variables all of these would be. The variables that settings.policy judges are vLLM's own.
"""

from __future__ import annotations

import json
from typing import Any

import engine_image
import pytest
from vllm_models import model_body

from vllm_operator.api.parsing import parse
from vllm_operator.render import render
from vllm_operator.render.engine_options import ENV_EFFECTS
from vllm_operator.settings import Settings

pytestmark = pytest.mark.e2e
NAME, PORT = "media-urls", "8099"
OF_OLDER_VERSIONS = {"VLLM_TORCH_PROFILER_DIR"}
OTHER_HOSTS = (
    f"http://127.0.0.1:{PORT}/image",
    f"http://LOCALHOST.evil.example:{PORT}/image",
    f"http://localhost@127.0.0.1:{PORT}/image",
    f"http://127.0.0.1:{PORT}#@localhost/image",
    f"http://127.0.0.1:{PORT}\\@localhost/image",
    f"http://[::1]:{PORT}/image",
    f"http://2130706433:{PORT}/image",
    f"http://localhost.:{PORT}/image",
    "http://169.254.169.254/latest/meta-data/",
    "http://[::ffff:a9fe:a9fe]/latest/meta-data/",
    "http://[fe80::1]/",
)
FILES = ("file:///image.png", "file://localhost/image.png", "FILE:///image.png")
OTHER_SCHEMES = (f"ftp://localhost:{PORT}/image", "gopher://localhost/", "/image.png", "")
ALLOWED, REDIRECT = f"http://localhost:{PORT}/image", f"http://localhost:{PORT}/redirect"

# Prints, for each set of arguments, what came of each URL, and the paths that the server was asked for.
ASK = """
import asyncio, http.server, io, json, os, threading
import vllm.envs as envs
from PIL import Image
from vllm.entrypoints.cli.serve import ServeSubcommand
from vllm.multimodal.media.connector import MEDIA_CONNECTOR_REGISTRY
from vllm.utils.argparse_utils import FlexibleArgumentParser

picture = io.BytesIO()
Image.new("RGB", (2, 2)).save(picture, "PNG")
with open("/scratch/image.png", "wb") as file:
    file.write(picture.getvalue())
asked = []

class Server(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        asked.append(f"{self.headers['host']}{self.path}")
        redirect = self.path == "/redirect"
        self.send_response(302 if redirect else 200)
        self.send_header("location", f"http://127.0.0.1:{os.environ['PORT']}/image")
        self.end_headers()
        self.wfile.write(b"" if redirect else picture.getvalue())

    def log_message(self, *_):
        pass

server = http.server.ThreadingHTTPServer(("127.0.0.1", int(os.environ["PORT"])), Server)
threading.Thread(target=server.serve_forever, daemon=True).start()
serve, top = ServeSubcommand(), FlexibleArgumentParser()
serve.subparser_init(top.add_subparsers(dest="subparser"))

async def fetched(connector, url):
    asked.clear()
    try:
        image = await asyncio.wait_for(connector.fetch_image_async(url), 30)
        said = f"fetched {image.size}"
    except TimeoutError:
        said = "it was tried"
    except Exception as error:
        said = f"{type(error).__name__}: {error}"
    return {"said": said, "asked": list(asked)}

async def all_of(arguments, redirects, urls):
    os.environ["VLLM_MEDIA_URL_ALLOW_REDIRECTS"] = redirects
    made = top.parse_args(["serve", *arguments])
    connector = MEDIA_CONNECTOR_REGISTRY.load(
        envs.VLLM_MEDIA_CONNECTOR,
        allowed_local_media_path=made.allowed_local_media_path,
        allowed_media_domains=made.allowed_media_domains,
    )
    return {url: await fetched(connector, url) for url in urls}

async def main():
    cases = json.loads(os.environ["CASES"])
    return {name: await all_of(**case) for name, case in cases.items()}

answer = {"urls": asyncio.run(main()), "variables": sorted(envs.environment_variables)}
print("ANSWER", json.dumps(answer))
"""


def rendered(**engine: Any) -> dict[str, Any]:
    """What a model's engine is started with, as far as it decides on URLs."""
    manifests = render(parse(model_body(engine=engine)), Settings())
    pod = next(made for made in manifests if made["kind"] == "Deployment")["spec"]["template"]["spec"]
    variables = {item["name"]: item.get("value") for item in pod["containers"][0]["env"]}
    return {
        "arguments": pod["containers"][0]["args"],
        "redirects": variables["VLLM_MEDIA_URL_ALLOW_REDIRECTS"],
    }


@pytest.fixture(scope="module")
def vllm() -> dict[str, Any]:
    """What vLLM did; `bare` is vLLM by its own defaults, but for a folder that is open."""
    urls = [ALLOWED, REDIRECT, *OTHER_HOSTS, *FILES, *OTHER_SCHEMES]
    bare = ["org/m", "--allowed-local-media-path", "/scratch"]
    cases = {
        "closed": rendered() | {"urls": urls},
        "open": rendered(allowedMediaDomains=["localhost"]) | {"urls": urls},
        "bare": {
            "arguments": bare,
            "redirects": "1",
            "urls": [OTHER_HOSTS[0], REDIRECT, "file:///scratch/image.png"],
        },
    }
    env = {"CASES": json.dumps(cases), "PORT": PORT, "VLLM_IMAGE_FETCH_TIMEOUT": "30"}
    said: dict[str, Any] = engine_image.answer(NAME, ASK, env)
    return said


def outcome(vllm: dict[str, Any], case: str, url: str) -> tuple[str, list[str]]:
    found = vllm["urls"][case][url]
    return found["said"], found["asked"]


def test_by_itself_vllm_fetches_all_of_it(vllm: dict[str, Any]) -> None:
    """So what is refused below is refused by what we render."""
    for url in vllm["urls"]["bare"]:
        assert outcome(vllm, "bare", url)[0] == "fetched (2, 2)"
    assert outcome(vllm, "bare", REDIRECT)[1] == [f"localhost:{PORT}/redirect", f"127.0.0.1:{PORT}/image"]


def test_by_default_nothing_is_fetched(vllm: dict[str, Any]) -> None:
    for url in vllm["urls"]["closed"]:
        said, asked = outcome(vllm, "closed", url)
        assert "rror: " in said, url
        assert asked == [], url


def test_an_allowed_host_is_fetched_from(vllm: dict[str, Any]) -> None:
    assert outcome(vllm, "open", ALLOWED) == ("fetched (2, 2)", [f"localhost:{PORT}/image"])


@pytest.mark.parametrize("case", ["closed", "open"])
@pytest.mark.parametrize("url", OTHER_HOSTS)
def test_no_other_host_is_asked(vllm: dict[str, Any], case: str, url: str) -> None:
    said, asked = outcome(vllm, case, url)
    assert "The URL must be from one of the allowed domains" in said
    assert asked == []


def test_a_redirect_is_not_followed(vllm: dict[str, Any]) -> None:
    said, asked = outcome(vllm, "open", REDIRECT)
    assert "rror: " in said
    assert asked == [f"localhost:{PORT}/redirect"]


@pytest.mark.parametrize("url", FILES)
def test_no_file_is_read(vllm: dict[str, Any], url: str) -> None:
    assert "Cannot load local files" in outcome(vllm, "open", url)[0]


@pytest.mark.parametrize("url", OTHER_SCHEMES)
def test_no_other_scheme_is_known(vllm: dict[str, Any], url: str) -> None:
    assert outcome(vllm, "open", url) == ("ValueError: The URL must be either a HTTP, data or file URL.", [])


def test_the_judged_variables_are_vllms_own(vllm: dict[str, Any]) -> None:
    judged = {name for name in ENV_EFFECTS if name.startswith("VLLM_")}
    assert judged - set(vllm["variables"]) == OF_OLDER_VERSIONS
