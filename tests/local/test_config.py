"""The local cluster's configuration: its parts agree with each other.

- Every file that a program is told to read is one that the driver writes, and lies in the state folder.
- Addresses agree: the API server's certificate, the kubelet's DNS server, the Service of CoreDNS.
- containerd's file is TOML that says what small machines need; the kubelet never collects an image.
- KUBE_API_QPS reaches controller-manager and scheduler, and nothing else.
- What goes down goes in the right order, and keys are readable by their owner only.
"""

from __future__ import annotations

import ipaddress
import json
import re
import tomllib
from pathlib import Path
from typing import Any

import pytest

import config
import local
from pki import Authority
from shell import DriverError

STATE = Path("/home/me/fleet/.cluster")
LAYOUT = config.Layout(
    STATE, Path("/run/vllm-fleet/containerd.sock"), Path("/cache/containerd"), Path("/cni")
)
RESOLV = "# by hand\nsearch example.com\nnameserver 192.0.2.53\nnameserver 2001:db8::53\n"


def written() -> set[str]:
    configured = {str(path) for files in config.files(LAYOUT, None, RESOLV).values() for path in files}
    pairs = {
        f"{STATE}/pki/{certificate.name}.{x}" for certificate in config.CERTIFICATES for x in ("crt", "key")
    }
    credentials = {LAYOUT.kubeconfig(name) for name in config.CLIENTS}
    made = {
        f"{STATE}/pki/{name}" for name in ("ca.crt", "ca.key", "service-account.pub", "service-account.key")
    }
    return configured | pairs | credentials | made


def document(program: str, name: str, qps: int | None = None) -> Any:
    return json.loads(config.files(LAYOUT, qps, RESOLV)[program][LAYOUT.etc / name])


def test_every_file_named_is_written() -> None:
    texts = [text for files in config.files(LAYOUT, None, RESOLV).values() for text in files.values()]
    texts += ["\n".join(words) for words in config.arguments(LAYOUT, None).values()]
    named = set(re.findall(rf"{STATE}/(?:etc|pki)/[\w./-]+", "\n".join(texts)))
    assert named - written() == {f"{STATE}/etc/cni"}
    assert f"{STATE}/pki/service-account.key" in named


def test_every_client_has_a_certificate() -> None:
    assert set(config.CLIENTS) <= {certificate.name for certificate in config.CERTIFICATES}


def test_addresses_agree() -> None:
    apiserver = next(x for x in config.CERTIFICATES if x.name == "apiserver")
    assert {f"IP:{config.NODE_IP}", f"IP:{config.API_IP}"} <= set(apiserver.addresses)
    services = ipaddress.ip_network(config.SERVICE_SUBNET)
    assert str(services[1]) == config.API_IP
    assert ipaddress.ip_address(config.DNS_IP) in services
    assert ipaddress.ip_interface(config.BRIDGE_ADDRESS).network == ipaddress.ip_network(config.POD_SUBNET)
    service = next(x for x in config.objects() if x["kind"] == "Service")
    assert document("kubelet", "kubelet.json")["clusterDNS"] == [service["spec"]["clusterIP"]]


def test_dns_service_leads_to_the_program_on_the_bridge() -> None:
    service, endpoints = (
        next(x for x in config.objects() if x["kind"] == k) for k in ("Service", "EndpointSlice")
    )
    assert endpoints["metadata"]["labels"]["kubernetes.io/service-name"] == service["metadata"]["name"]
    assert endpoints["endpoints"][0]["addresses"] == [config.NODE_IP]
    assert f"bind {config.NODE_IP}" in config.corefile(LAYOUT, [])


def test_containerd_is_told_what_small_machines_need() -> None:
    text = config.files(LAYOUT, None, RESOLV)["containerd"][LAYOUT.etc / "containerd.toml"]
    parsed = tomllib.loads(text)
    cri = parsed["plugins"]["io.containerd.grpc.v1.cri"]
    assert cri["restrict_oom_score_adj"] is True
    assert cri["sandbox_image"] == config.PAUSE_IMAGE
    assert parsed["root"] == "/cache/containerd"
    assert parsed["state"].startswith(str(STATE))


def test_kubelet_keeps_images_that_cannot_be_pulled_again() -> None:
    assert document("kubelet", "kubelet.json")["imageGCHighThresholdPercent"] == 100


@pytest.mark.parametrize(
    ("text", "forward"),
    [
        (RESOLV, "forward . 192.0.2.53 2001:db8::53"),
        ("", None),
        ("nameserver\n#nameserver 192.0.2.1\n", None),
        ("nameserver 1.1.1.1\n" * 5, "forward . 1.1.1.1 1.1.1.1 1.1.1.1"),
    ],
)
def test_other_names_are_asked_where_the_host_asks(text: str, forward: str | None) -> None:
    lines = [line.strip() for line in config.corefile(LAYOUT, config.nameservers(text)).splitlines()]
    assert [line for line in lines if line.startswith("forward")] == ([forward] if forward else [])


def test_api_qps_reaches_the_two_that_limit_themselves() -> None:
    plain, fast = config.arguments(LAYOUT, None), config.arguments(LAYOUT, 500)
    assert {name for name in plain if plain[name] != fast[name]} == {"kube-controller-manager"}
    assert {"--kube-api-qps=500", "--kube-api-burst=1000"} <= set(fast["kube-controller-manager"])
    connection = document("kube-scheduler", "scheduler.json", 500)["clientConnection"]
    assert (connection["qps"], connection["burst"]) == (500, 1000)
    assert "qps" not in document("kube-scheduler", "scheduler.json")["clientConnection"]


@pytest.mark.parametrize("text", ["0", "-1", "fast", "1.5"])
def test_a_bad_api_qps_is_refused_by_name(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KUBE_API_QPS", text)
    with pytest.raises(DriverError, match=f"KUBE_API_QPS={text}"):
        local.api_qps()


def test_pods_go_before_their_runtime_and_the_api_server_after_both() -> None:
    order = local.stop_order(["etcd", "kwok", "stray"])
    assert order[:3] == ["kwok", "kubelet", "containerd"]
    assert order.index("kube-apiserver") < order.index("etcd")
    assert order[-1] == "stray"
    assert set(config.arguments(LAYOUT, None)) <= set(order)
    assert tuple(config.arguments(LAYOUT, None)) == local.STARTED


def test_certificates_are_signed_for_their_names_and_kept(tmp_path: Path) -> None:
    authority = Authority(tmp_path / "pki", tmp_path / "log")
    for _ in range(2):
        authority.create()
        for certificate in config.CERTIFICATES:
            authority.issue(certificate)
    keys = list((tmp_path / "pki").glob("*.key"))
    assert len(keys) == len(config.CERTIFICATES) + 2
    assert {key.stat().st_mode & 0o077 for key in keys} == {0}
    parsed = json.loads(authority.kubeconfig("admin", config.API_URL))
    assert parsed["clusters"][0]["cluster"]["server"] == config.API_URL
    assert (tmp_path / "log").read_text().count("openssl req") == len(config.CERTIFICATES) + 1
