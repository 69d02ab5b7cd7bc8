"""The cluster for development: `python3 k8s/local/driver --help`."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

import clusters
import config
from console import say
from shell import DriverError, add_no_proxy

EPILOG = """environment:
  CLUSTER            existing, kind or local (default: kind where a Docker engine answers, else local)
  KUBECONFIG         the cluster that CLUSTER=existing means
  GPUS               how many nvidia.com/gpu the node pretends to have (default 2)
  IMAGE_REGISTRY     where the demo's images are pulled from, with CLUSTER=existing
  KUBE_API_QPS       request limit of controller-manager and scheduler, for benches (local)
  VLLM_FLEET_CACHE   what is built once for all clones (default ~/.cache/vllm-fleet)
"""


def parser() -> argparse.ArgumentParser:
    shape = argparse.RawDescriptionHelpFormatter
    top = argparse.ArgumentParser(
        prog="k8s/local/driver", description=__doc__, epilog=EPILOG, formatter_class=shape
    )
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")
    up = commands.add_parser("up", help="make the cluster run; quick when it does already")
    up.add_argument(
        "--images", action="store_true", help="also build the images that are missing or stale, and load them"
    )
    up.set_defaults(act=lambda given: clusters.up(images=given.images))
    simple(commands, "down", "remove the cluster and every change to this machine", clusters.down)
    simple(commands, "status", "what runs", clusters.status)
    simple(
        commands, "kubeconfig", "print the path of the kubeconfig", lambda: say(str(clusters.kubeconfig()))
    )
    load = commands.add_parser("load", help="load an image archive (OCI or docker) into the cluster")
    load.add_argument("archive", type=Path)
    load.set_defaults(act=lambda given: clusters.load(given.archive))
    older = commands.add_parser("older", help="build and load operator and gateway of another tree")
    older.add_argument("tree", type=Path, help="an older state of this repository (git archive)")
    older.add_argument("--tag", required=True, help="of these images, so that the present ones stay")
    older.set_defaults(act=lambda given: clusters.load_older(given.tree, given.tag))
    gpus = commands.add_parser("gpus", help="change how many GPUs the node pretends to have")
    gpus.add_argument("count", metavar="N")
    gpus.set_defaults(act=lambda given: clusters.set_gpu_count(clusters.gpu_number(given.count, "gpus ")))
    add_faults(commands)
    add_kwok(commands)
    simple(commands, "images", "build the images; --help tells more", lambda: run_images([]))
    simple(commands, "prometheus", "fetch what the monitoring's tests run", run_prometheus)
    simple(commands, "demo", "from nothing to a streamed chat", run_demo)
    return top


class Commands(Protocol):
    """What argparse's subparsers object is used for here."""

    def add_parser(self, name: str, *, help: str) -> argparse.ArgumentParser: ...  # noqa: A002


def simple(commands: Commands, name: str, text: str, act: Callable[[], None]) -> None:
    commands.add_parser(name, help=text).set_defaults(act=lambda _: act())


def add_faults(commands: Commands) -> None:
    for verb, text, act in (
        ("stop", "end one program of the local cluster, to see what its absence does", clusters.stop_program),
        ("start", "run it again, and wait until it is healthy", clusters.start_program),
    ):
        command = commands.add_parser(verb, help=text)
        command.add_argument("program", metavar="PROGRAM", help="such as kube-apiserver; `status` lists them")
        command.set_defaults(act=lambda given, act=act: act(given.program))


def add_kwok(commands: Commands) -> None:
    kwok = commands.add_parser("kwok", help="fake nodes for benches (local)")
    kwok.add_argument("action", choices=("up", "down"))
    kwok.add_argument("--nodes", type=int, default=10)
    kwok.add_argument("--gpus", type=int, default=8)
    kwok.set_defaults(act=run_kwok)


def run_kwok(given: argparse.Namespace) -> None:
    import kwok

    if given.action == "up":
        kwok.up(given.nodes, given.gpus)
    else:
        kwok.down()


def run_images(arguments: list[str]) -> None:
    import images

    images.main(arguments)


def run_prometheus() -> None:
    import prometheus

    prometheus.ensure()


def run_demo() -> None:
    import demo

    demo.main()


def main() -> None:
    add_no_proxy(config.DIRECT)
    try:
        if sys.argv[1:2] == ["images"]:  # its options are its own: argparse hands none on
            run_images(sys.argv[2:])
        else:
            given = parser().parse_args()
            given.act(given)
    except DriverError as error:
        sys.exit(f"\n{error}")
    except BrokenPipeError:  # a reader such as `head` has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except KeyboardInterrupt:
        sys.exit("\nInterrupted. Run the same again to go on; cleaning up: make cluster-down")


if __name__ == "__main__":
    main()
