"""The pods' network on this machine: a bridge, address translation on the way out, and their removal."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from ipaddress import ip_network
from pathlib import Path

from config import BRIDGE, BRIDGE_ADDRESS, POD_SUBNET, SERVICE_SUBNET
from shell import find, output, succeeds

NFT_TABLES = ("ip vllm-fleet", "ip kube-proxy", "ip6 kube-proxy")
RULES = tuple(
    [chain, flag, BRIDGE, "-m", "comment", "--comment", "vllm-fleet", "-j", "ACCEPT"]
    for chain, flag in (("INPUT", "-i"), ("FORWARD", "-i"), ("FORWARD", "-o"))
)
MASQUERADE = f"""
table ip vllm-fleet
delete table ip vllm-fleet
table ip vllm-fleet {{
  chain postrouting {{
    type nat hook postrouting priority srcnat;
    ip saddr {POD_SUBNET} ip daddr != {{ {POD_SUBNET}, {SERVICE_SUBNET}, 224.0.0.0/4 }} masquerade
  }}
}}
"""


def make_bridge() -> None:
    """The bridge before everything else: its address is the node's, and the API server listens on it."""
    ip = find("ip") or "ip"
    if not bridge_exists():
        output([ip, "link", "add", BRIDGE, "address", "0a:58:0a:f4:00:01", "type", "bridge"])
    output([ip, "address", "replace", BRIDGE_ADDRESS, "dev", BRIDGE])
    output([ip, "link", "set", BRIDGE, "up"])
    output([find("nft") or "nft", "-f", "-"], text=MASQUERADE)
    pass_firewall()


def bridge_exists() -> bool:
    return Path("/sys/class/net", BRIDGE).exists()


def pass_firewall() -> None:
    """Lets pods through a firewall that drops by default, as ufw and Docker set it up; touches no other."""
    iptables = find("iptables")
    listing = output([iptables, "-S"]) if iptables else ""
    for rule in RULES:
        if f"-P {rule[0]} DROP" in listing and not succeeds([iptables or "", "-C", *rule]):
            output([iptables or "", "-I", *rule])


def remove() -> None:
    iptables, nft, ip = find("iptables"), find("nft"), find("ip") or "ip"
    if iptables and "vllm-fleet" in output([iptables, "-S"]):
        for rule in RULES:
            succeeds([iptables, "-D", *rule])
    tables = output([nft, "list", "tables"]) if nft else ""
    for table in NFT_TABLES:
        if f"table {table}\n" in tables:
            output([nft or "nft", "delete", "table", *table.split()])
    if bridge_exists():
        output([ip, "link", "delete", BRIDGE])


def overlaps(addresses: Iterable[str]) -> list[str]:
    """Which of the machine's routes (`ip -j route` destinations) the cluster's subnets would hide."""
    ours = [ip_network(subnet) for subnet in (POD_SUBNET, SERVICE_SUBNET)]
    theirs = [ip_network(x, strict=False) for x in addresses if re.match(r"[\d.]+(/\d+)?$", x)]
    return [str(network) for network in theirs if any(network.overlaps(subnet) for subnet in ours)]


def foreign_routes() -> list[str]:
    routes = json.loads(output([find("ip") or "ip", "-j", "-4", "route"]))
    return overlaps(route["dst"] for route in routes if route.get("dev") != BRIDGE)
