"""What the prefetch Job runs, with the Python and the huggingface_hub of the engine's image.

`plan` asks the Hub what is to come, and whether it fits; its last words are the status's. `fetch` downloads.
The exit code says what went wrong, for observe.prefetch; the token is only ever in the environment.
"""

from __future__ import annotations

REFUSED, NOT_FOUND, NO_REVISION, NO_SPACE = 10, 11, 12, 13

_CODES = f"REFUSED, NOT_FOUND, NO_REVISION, NO_SPACE = {REFUSED}, {NOT_FOUND}, {NO_REVISION}, {NO_SPACE}\n"

# Other formats are left out where there are safetensors, as vLLM leaves them out.
_BODY = r"""
import errno, fnmatch, json, os, shutil, sys, urllib.parse
os.umask(0o002)  # the engine is another user of the same group
import huggingface_hub as hub
from huggingface_hub import constants, errors

HOME = os.environ["HF_HOME"]
SAYS = os.environ.get("TERMINATION_LOG", "/dev/termination-log")
UNUSED = ["original/*", "metal/*"]
OTHERS = "bin pt pth ckpt gguf h5 msgpack onnx ot tflite".split()
HOST = urllib.parse.urlsplit(constants.ENDPOINT).hostname
WHERE = "Hugging Face" if HOST == "huggingface.co" else f"{HOST} (HF_ENDPOINT)"
HOW = "with the token given" if os.environ.get("HF_TOKEN") else "without a token"

def end(code, text):
    with open(SAYS, "w") as log:
        log.write(text[:2000])
    print(text, flush=True)
    sys.exit(code)

def look(repo, revision):
    info = hub.HfApi().model_info(repo, revision=revision, files_metadata=True)
    sizes = {item.rfilename: item.size or 0 for item in info.siblings}
    safe = any(name.endswith(".safetensors") for name in sizes)
    left_out = UNUSED + (["*." + kind for kind in OTHERS] if safe else [])
    if "adapter_config.json" in sizes:  # offline, vLLM takes an adapter's folder only if nothing is missing
        left_out = []
    for name in list(sizes):
        if any(fnmatch.fnmatch(name, pattern) for pattern in left_out):
            del sizes[name]
    found = {name: hub.try_to_load_from_cache(repo, name, revision=info.sha) for name in sizes}
    there = [name for name, path in found.items() if isinstance(path, str)]
    return left_out, sum(sizes.values()), len(sizes), sum(sizes[name] for name in there)

def gb(size):
    return f"{size / 1e9:.1f} GB"

def plan(items):
    found = [look(*item) for item in items]
    size, files, there = (sum(part[index] for part in found) for index in (1, 2, 3))
    free = shutil.disk_usage(HOME).free
    if size - there > free:
        end(NO_SPACE, f"the cache has {gb(free)} free, and {gb(size - there)} are to come")
    end(0, f"{gb(size)} in {files} files" + (f", {gb(there)} of it there already" if there else ""))

def fetch(items):
    for repo, revision in items:
        hub.snapshot_download(repo, revision=revision, ignore_patterns=look(repo, revision)[0])

def judged(error, what):
    if isinstance(error, errors.LocalEntryNotFoundError):  # it blames the network, also for a refusal
        error = error.__cause__ or error
    status = getattr(getattr(error, "response", None), "status_code", 0)
    unseen = status == 401 and HOW == "without a token"  # said of what is not there and of what is private
    if isinstance(error, errors.RevisionNotFoundError):
        return NO_REVISION, f"{WHERE} has no such revision of {what}"
    if isinstance(error, errors.GatedRepoError):
        return REFUSED, f"{WHERE} refuses {what} {HOW}; its terms must be accepted there"
    if isinstance(error, errors.RepositoryNotFoundError) or unseen:
        return NOT_FOUND, f"{WHERE} has no {what}, or does not show it {HOW}"
    if status in (401, 403):
        return REFUSED, f"{WHERE} answers {status} {HOW} ({' '.join(str(error).split())})"
    if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT):
        return NO_SPACE, "the cache is full"
    if isinstance(error, json.JSONDecodeError) or status == 404:  # a Hub says what it lacks
        return 1, f"{WHERE} does not answer as a Hub does: check HF_ENDPOINT"
    return 1, f"{WHERE}: {type(error).__name__}: {' '.join(str(error).split())}"

def main(step, *asked):
    items = [(repo, revision or None) for repo, _, revision in (item.partition("@") for item in asked)]
    try:
        os.makedirs(HOME, exist_ok=True)
        {"plan": plan, "fetch": fetch}[step](items)
    except Exception as error:
        end(*judged(error, ", ".join(asked)))

main(*sys.argv[1:])
"""
SCRIPT = _CODES + _BODY.lstrip()
