"""Puts stand-ins for NVIDIA's libraries beside PyTorch, so that 2.7 GB of them can stay out of a CPU image.

The only PyTorch on PyPI for x86-64 Linux is linked against CUDA: `import torch` fails without libcudart,
cuBLAS, cuDNN and eleven others, although a machine with no GPU never calls them. NVIDIA ships a stub of
libcuda for the same need. Here each missing library becomes one of a few kilobytes that exports exactly the
functions that PyTorch's own libraries ask for. Each returns 100, which is cudaErrorNoDevice and an error in
all these APIs, so `torch.cuda.is_available()` is False, as with the real ones where there is no GPU.

Usage, in a build stage that has `readelf` and `cc`: python3 cuda_stubs.py …/site-packages/torch/lib
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path

NO_DEVICE = 100  # cudaErrorNoDevice, driver_types.h
VENDOR = re.compile(r"lib(cu(?!da\.so)|nv|nccl)\w*\.so\.\d+")
# Libraries that do not version their symbols: the function's prefix says whose it is.
UNVERSIONED = {
    "cuFile": "libcufile",
    "cusparseLt": "libcusparseLt",
    "curand": "libcurand",
    "nccl": "libnccl",
    "nvshmem": "libnvshmem_host",
}
RETURNS_TEXT = re.compile(r"(Error|Result|Status)(String|Name)$|^ncclGetLastError$")
SYMBOL = re.compile(r"\sUND\s+(?P<name>\w+)(?:@(?P<version>\S+))?")
VERSION = re.compile(r"File: (?P<library>\S+)|Name: (?P<version>\S+)")
NEEDED = re.compile(r"\(NEEDED\).*\[(?P<library>[^]]+)]")


def readelf(option: str, files: Iterable[Path]) -> str:
    return subprocess.run(
        ["readelf", "--wide", option, *files], check=True, stdout=subprocess.PIPE, text=True
    ).stdout


def missing_libraries(dynamic: str) -> set[str]:
    """The sonames of NVIDIA that `readelf --dynamic` lists as needed, e.g. {"libcudart.so.13", …}."""
    needed = {match["library"] for match in NEEDED.finditer(dynamic)}
    return {library for library in needed if VENDOR.fullmatch(library)}


def symbol_versions(version_info: str, libraries: set[str]) -> dict[str, str]:
    """Each symbol version that is needed of these libraries, and the library that must define it."""
    versions, library = {}, ""
    for match in VERSION.finditer(version_info):
        if match["library"]:
            library = match["library"]
        elif library in libraries:
            versions[match["version"]] = library
    return versions


def wanted_functions(symbols: str, libraries: set[str], versions: dict[str, str]) -> dict[str, set[str]]:
    """For each soname the functions that the undefined symbols of `readelf --dyn-syms` expect in it."""
    by_stem = {library.split(".so")[0]: library for library in libraries}
    wanted: dict[str, set[str]] = {library: set() for library in libraries}
    for match in SYMBOL.finditer(symbols):
        name = match["name"]
        if match["version"]:
            library = versions.get(match["version"])
        else:
            stem = next((stem for prefix, stem in UNVERSIONED.items() if name.startswith(prefix)), "")
            library = by_stem.get(stem)
        if library:
            wanted[library].add(name)
    return wanted


def source(functions: Iterable[str]) -> str:
    lines = []
    for name in sorted(functions):
        if RETURNS_TEXT.search(name):
            lines.append(f'const char *{name}(void) {{ return "no CUDA device: CPU image"; }}')
        else:
            lines.append(f"long {name}(void) {{ return {NO_DEVICE}; }}")
    return "\n".join(lines) + "\n"


def build_stub(folder: Path, library: str, version: str, functions: Iterable[str]) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        code, script = Path(scratch, "stub.c"), Path(scratch, "stub.map")
        code.write_text(source(functions))
        script.write_text(f"{version} {{ global: *; }};\n")
        flags = f"-shared -fPIC -O1 -fno-builtin -Wl,-soname,{library} -Wl,--version-script={script}".split()
        subprocess.run(["cc", *flags, "-o", folder / library, code], check=True)


def main() -> None:
    folder = Path(sys.argv[1])
    files = sorted(folder.glob("*.so"))
    libraries = missing_libraries(readelf("--dynamic", files))
    versions = symbol_versions(readelf("--version-info", files), libraries)
    wanted = wanted_functions(readelf("--dyn-syms", files), libraries, versions)
    version_of = {library: version for version, library in versions.items()}
    for library, functions in sorted(wanted.items()):
        build_stub(folder, library, version_of.get(library, library), functions)
    print(f"{len(wanted)} stubs, {sum(map(len, wanted.values()))} functions")


if __name__ == "__main__":
    main()
