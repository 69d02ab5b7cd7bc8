"""The local cluster's containerd: its images outlive the cluster, its containers do not."""

from __future__ import annotations

import hashlib
import io
import json
import platform
import subprocess
import tarfile
from itertools import pairwise
from pathlib import Path

from config import PAUSE_IMAGE
from paths import RUNTIME
from process import Identity, boot_id, command_line, end, stat_fields
from shell import DriverError, find, output

SOCKET = RUNTIME / "containerd.sock"
NAMESPACE = "k8s.io"


def command(*arguments: str | Path) -> list[str]:
    return [find("ctr") or "ctr", "--address", str(SOCKET), "--namespace", NAMESPACE, *map(str, arguments)]


def ctr(*arguments: str | Path) -> str:
    """Runs `ctr` on the cluster's containerd and namespace; returns what it prints."""
    return output(command(*arguments))


def answers() -> bool:
    try:
        ctr("version")
    except DriverError:
        return False
    return True


def import_image(archive: Path) -> None:
    """Loads an OCI or docker archive, with the names written in it."""
    if not answers():
        raise DriverError("the local cluster does not run; start it first: make cluster")
    ctr("images", "import", archive)


def image_digest(listing: str, reference: str) -> str | None:
    """The digest of an image in what `ctr images list` prints (name, media type, digest, …)."""
    rows = (line.split() for line in listing.splitlines())
    return next((row[2] for row in rows if len(row) > 2 and row[0] == reference), None)


def clear() -> bool:
    """Removes every container, image and snapshots of images stay; True if there were any."""
    names = ctr("containers", "list", "-q").split()
    if not names:
        return False
    for task in ctr("tasks", "list", "-q").split():
        quietly("tasks", "delete", "--force", task)
    quietly("containers", "delete", *names)
    return True


def quietly(*arguments: str) -> None:
    """For removals, where gone already is as good."""
    subprocess.run(command(*arguments), check=False, stdin=subprocess.DEVNULL, capture_output=True)


def end_shims() -> None:
    """Ends shims that outlived their containerd: processes that name our own socket as theirs."""
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal() and is_shim(command_line(int(entry.name))):
            try:
                start = stat_fields((entry / "stat").read_text())[1]
            except OSError:
                continue
            end(Identity(int(entry.name), start, boot_id()))


def is_shim(arguments: list[str]) -> bool:
    if not arguments or not Path(arguments[0]).name.startswith("containerd-shim"):
        return False
    return ("-address", str(SOCKET)) in pairwise(arguments)


def pause_archive(program: bytes, reference: str = PAUSE_IMAGE) -> bytes:
    """An OCI image archive with one static program in it, the same bytes every time.

    Format: https://github.com/opencontainers/image-spec/blob/main/image-layout.md
    """
    layer = tar({"pause": program}, mode=0o755)
    architecture = {"x86_64": "amd64", "aarch64": "arm64"}.get(platform.machine(), platform.machine())
    config = encode(
        {
            "architecture": architecture,
            "os": "linux",
            "config": {"Entrypoint": ["/pause"], "User": "65535:65535"},
            "rootfs": {"type": "layers", "diff_ids": [digest(layer)]},
        }
    )
    oci = "application/vnd.oci.image"
    manifest = encode(
        {
            "schemaVersion": 2,
            "mediaType": f"{oci}.manifest.v1+json",
            "config": descriptor(f"{oci}.config.v1+json", config),
            "layers": [descriptor(f"{oci}.layer.v1.tar", layer)],
        }
    )
    named = descriptor(f"{oci}.manifest.v1+json", manifest)
    named["annotations"] = {
        "io.containerd.image.name": reference,
        "org.opencontainers.image.ref.name": reference,
    }
    blobs = {f"blobs/sha256/{digest(blob)[7:]}": blob for blob in (layer, config, manifest)}
    index = encode({"schemaVersion": 2, "mediaType": f"{oci}.index.v1+json", "manifests": [named]})
    return tar({"oci-layout": encode({"imageLayoutVersion": "1.0.0"}), "index.json": index, **blobs})


def encode(document: object) -> bytes:
    return json.dumps(document, sort_keys=True).encode()


def digest(blob: bytes) -> str:
    return "sha256:" + hashlib.sha256(blob).hexdigest()


def descriptor(media_type: str, blob: bytes) -> dict[str, object]:
    return {"mediaType": media_type, "digest": digest(blob), "size": len(blob)}


def tar(files: dict[str, bytes], mode: int = 0o644) -> bytes:
    sink = io.BytesIO()
    with tarfile.open(fileobj=sink, mode="w", format=tarfile.USTAR_FORMAT) as archive:
        for name, content in files.items():
            entry = tarfile.TarInfo(name)
            entry.size, entry.mode = len(content), mode
            archive.addfile(entry, io.BytesIO(content))
    return sink.getvalue()
