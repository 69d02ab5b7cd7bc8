"""Every file and command line of the local cluster, as pure functions of where things lie.

JSON stands for YAML where the reader takes YAML. Ports are the usual ones, but bound to the bridge's
address, so that nothing that a person runs on loopback is in the way.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pki import Certificate

NODE = "vllm-fleet"
BRIDGE = "cni0"
NODE_IP = "10.244.0.1"
BRIDGE_ADDRESS = "10.244.0.1/24"
POD_SUBNET = "10.244.0.0/24"
SERVICE_SUBNET = "10.96.0.0/16"
API_IP = "10.96.0.1"
DNS_IP = "10.96.0.10"
DOMAIN = "cluster.local"
API_URL = f"https://{NODE_IP}:6443"
ETCD_URL = f"https://{NODE_IP}:2379"
PAUSE_IMAGE = "docker.io/vllm-fleet/pause:0.1.0"
DIRECT = f"{POD_SUBNET},{SERVICE_SUBNET},.{DOMAIN},.svc"  # addresses that are no business of a proxy
GPU_LABELS = {"nvidia.com/gpu.present": "true", "nvidia.com/gpu.product": "NVIDIA-FAKE"}

CERTIFICATES = (
    Certificate(
        "apiserver",
        "kube-apiserver",
        ("system:masters",),  # also the API server's own identity towards kubelet and etcd
        (
            *(f"DNS:kubernetes{x}" for x in ("", ".default", ".default.svc", f".default.svc.{DOMAIN}")),
            *(f"IP:{x}" for x in (NODE_IP, API_IP, "127.0.0.1")),
        ),
    ),
    Certificate("etcd", "etcd", addresses=(f"IP:{NODE_IP}",)),
    Certificate("kubelet", f"system:node:{NODE}", ("system:nodes",), (f"DNS:{NODE}", f"IP:{NODE_IP}")),
    Certificate("controller-manager", "system:kube-controller-manager"),
    Certificate("scheduler", "system:kube-scheduler"),
    Certificate("kube-proxy", "system:kube-proxy"),
    Certificate("coredns", "system:coredns"),
    Certificate("admin", "admin", ("system:masters",)),
)
HEALTH = {
    "kube-apiserver": f"{API_URL}/readyz",
    "kube-controller-manager": f"https://{NODE_IP}:10257/healthz",
    "kube-scheduler": f"https://{NODE_IP}:10259/healthz",
    "kube-proxy": f"http://{NODE_IP}:10256/healthz",
    "coredns": f"http://{NODE_IP}:8181/ready",
    "kubelet": f"http://{NODE_IP}:10248/healthz",
}
CLIENTS = ("kubelet", "controller-manager", "scheduler", "kube-proxy", "coredns")


@dataclass(frozen=True)
class Layout:
    """Folders that the configuration names: the clone's state, containerd's lasting root, CNI's programs."""

    state: Path
    socket: Path
    containerd_root: Path
    cni_programs: Path

    @property
    def etc(self) -> Path:
        return self.state / "etc"

    def certificate(self, name: str) -> str:
        return str(self.state / "pki" / f"{name}.crt")

    def key(self, name: str) -> str:
        return str(self.state / "pki" / f"{name}.key")

    def kubeconfig(self, name: str) -> str:
        return str(self.etc / f"{name}.kubeconfig")


def dumps(document: Any) -> str:
    return json.dumps(document, indent=2) + "\n"


def containerd_toml(layout: Layout) -> str:
    """containerd's configuration, version 2: what Debian 12 (1.6) and Debian 13 (1.7) both read.

    `restrict_oom_score_adj`: without CAP_SYS_RESOURCE, as in many containers and small virtual machines, no
    sandbox starts otherwise. `netns_mounts_under_state_dir` keeps every mount in the state folder, where
    `down` looks.
    """
    run = layout.state / "containerd"
    cri = 'plugins."io.containerd.grpc.v1.cri"'
    return f"""version = 2
root = "{layout.containerd_root}"
state = "{run}"
temp = "{run}/tmp"
oom_score = 0

[grpc]
  address = "{layout.socket}"

[plugins."io.containerd.internal.v1.opt"]
  path = "{run}/opt"

[{cri}]
  sandbox_image = "{PAUSE_IMAGE}"
  restrict_oom_score_adj = true
  netns_mounts_under_state_dir = true
  stream_server_address = "{NODE_IP}"

[{cri}.cni]
  bin_dir = "{layout.cni_programs}"
  conf_dir = "{layout.etc}/cni"

[{cri}.containerd.runtimes.runc]
  runtime_type = "io.containerd.runc.v2"

[{cri}.containerd.runtimes.runc.options]
  SystemdCgroup = false
  Root = "{run}/runc"
"""


def cni_conflist(layout: Layout) -> str:
    bridge = {
        "type": "bridge",
        "bridge": BRIDGE,
        "isGateway": True,
        "hairpinMode": True,
        "ipam": {
            "type": "host-local",
            "dataDir": str(layout.state / "ipam"),
            "ranges": [[{"subnet": POD_SUBNET, "gateway": NODE_IP}]],
            "routes": [{"dst": "0.0.0.0/0"}],
        },
    }
    return dumps({"cniVersion": "0.4.0", "name": "vllm-fleet", "plugins": [bridge]})


def kubelet_config(layout: Layout) -> str:
    """The kubelet's configuration.

    Images cannot be pulled again here, so none is ever collected (`imageGCHighThresholdPercent`), and a
    nearly full disk is no reason to evict as long as a gigabyte is free.
    """
    return dumps(
        {
            "apiVersion": "kubelet.config.k8s.io/v1beta1",
            "kind": "KubeletConfiguration",
            "address": NODE_IP,
            "healthzBindAddress": NODE_IP,
            "authentication": {
                "anonymous": {"enabled": False},
                "webhook": {"enabled": True},
                "x509": {"clientCAFile": layout.certificate("ca")},
            },
            "authorization": {"mode": "Webhook"},
            "cgroupDriver": "cgroupfs",
            "clusterDNS": [DNS_IP],
            "clusterDomain": DOMAIN,
            "containerRuntimeEndpoint": f"unix://{layout.socket}",
            "evictionHard": {
                "memory.available": "200Mi",
                "nodefs.available": "1Gi",
                "imagefs.available": "1Gi",
            },
            "failCgroupV1": False,
            "failSwapOn": False,
            "imageGCHighThresholdPercent": 100,
            "imageGCLowThresholdPercent": 99,
            "makeIPTablesUtilChains": False,
            "podLogsDir": str(layout.state / "pods"),
            "resolvConf": "",
            "tlsCertFile": layout.certificate("kubelet"),
            "tlsPrivateKeyFile": layout.key("kubelet"),
            "volumePluginDir": str(layout.state / "volume-plugins"),
        }
    )


def proxy_config(layout: Layout) -> str:
    """kube-proxy's configuration; zeroes under `conntrack` keep it from setting sysctls."""
    return dumps(
        {
            "apiVersion": "kubeproxy.config.k8s.io/v1alpha1",
            "kind": "KubeProxyConfiguration",
            "clientConnection": {"kubeconfig": layout.kubeconfig("kube-proxy")},
            "clusterCIDR": POD_SUBNET,
            "conntrack": {
                "maxPerCore": 0,
                "min": 0,
                "tcpCloseWaitTimeout": "0s",
                "tcpEstablishedTimeout": "0s",
            },
            "healthzBindAddress": f"{NODE_IP}:10256",
            "hostnameOverride": NODE,
            "metricsBindAddress": f"{NODE_IP}:10249",
            "mode": "nftables",
        }
    )


def scheduler_config(layout: Layout, qps: int | None) -> str:
    connection: dict[str, Any] = {"kubeconfig": layout.kubeconfig("scheduler")}
    if qps:
        connection |= {"qps": qps, "burst": 2 * qps}
    return dumps(
        {
            "apiVersion": "kubescheduler.config.k8s.io/v1",
            "kind": "KubeSchedulerConfiguration",
            "clientConnection": connection,
            "leaderElection": {"leaderElect": False},
        }
    )


def corefile(layout: Layout, nameservers: list[str]) -> str:
    """CoreDNS as a program of the host: it answers on the bridge and asks the host's own name servers for
    the rest.
    """
    forward = f"    forward . {' '.join(nameservers)}\n" if nameservers else ""
    return f""". {{
    bind {NODE_IP}
    errors
    ready {NODE_IP}:8181
    kubernetes {DOMAIN} in-addr.arpa ip6.arpa {{
        kubeconfig {layout.kubeconfig("coredns")}
        pods insecure
        fallthrough in-addr.arpa ip6.arpa
        ttl 5
    }}
{forward}    cache 5
    loadbalance
}}
"""


def nameservers(resolv_conf: str) -> list[str]:
    """The name servers of a resolv.conf text, at most three, which is what the resolver reads."""
    words = (line.split() for line in resolv_conf.splitlines())
    return [word[1] for word in words if len(word) > 1 and word[0] == "nameserver"][:3]


def files(layout: Layout, qps: int | None, resolv_conf: str) -> dict[str, dict[Path, str]]:
    """The configuration files of each program, by its name; a change in one is a reason to start it again."""
    etc = layout.etc
    return {
        "containerd": {
            etc / "containerd.toml": containerd_toml(layout),
            etc / "cni" / "10-vllm-fleet.conflist": cni_conflist(layout),
        },
        "kube-scheduler": {etc / "scheduler.json": scheduler_config(layout, qps)},
        "kube-proxy": {etc / "kube-proxy.json": proxy_config(layout)},
        "coredns": {etc / "Corefile": corefile(layout, nameservers(resolv_conf))},
        "kubelet": {etc / "kubelet.json": kubelet_config(layout)},
    }


def arguments(layout: Layout, qps: int | None) -> dict[str, list[str]]:
    """The arguments of each program, by its name, in the order in which they start."""
    etc = layout.etc
    return {
        "containerd": [f"--config={etc}/containerd.toml"],
        "etcd": etcd_arguments(layout),
        "kube-apiserver": apiserver_arguments(layout),
        "kube-controller-manager": controller_manager_arguments(layout, qps),
        "kube-scheduler": [f"--config={etc}/scheduler.json", f"--bind-address={NODE_IP}"],
        "kube-proxy": [f"--config={etc}/kube-proxy.json"],
        "coredns": [f"-conf={etc}/Corefile"],
        "kubelet": [
            f"--config={etc}/kubelet.json",
            f"--kubeconfig={layout.kubeconfig('kubelet')}",
            f"--root-dir={layout.state}/kubelet",
            f"--hostname-override={NODE}",
            f"--node-ip={NODE_IP}",
            f"--node-labels={','.join(f'{key}={value}' for key, value in GPU_LABELS.items())}",
        ],
    }


def etcd_arguments(layout: Layout) -> list[str]:
    """etcd on the bridge with client certificates; `--unsafe-no-fsync`: its data does not outlive the
    cluster.
    """
    peer = "http://127.0.0.1:0"
    return [
        f"--name={NODE}",
        f"--data-dir={layout.state}/etcd",
        f"--listen-client-urls={ETCD_URL}",
        f"--advertise-client-urls={ETCD_URL}",
        f"--listen-peer-urls={peer}",
        f"--initial-advertise-peer-urls={peer}",
        f"--initial-cluster={NODE}={peer}",
        "--client-cert-auth",
        f"--trusted-ca-file={layout.certificate('ca')}",
        f"--cert-file={layout.certificate('etcd')}",
        f"--key-file={layout.key('etcd')}",
        "--unsafe-no-fsync",
        "--log-level=warn",
    ]


def apiserver_arguments(layout: Layout) -> list[str]:
    certificate, key = layout.certificate("apiserver"), layout.key("apiserver")
    authority = layout.certificate("ca")
    return [
        f"--advertise-address={NODE_IP}",
        f"--bind-address={NODE_IP}",
        "--secure-port=6443",
        "--allow-privileged=true",
        "--authorization-mode=Node,RBAC",
        "--enable-admission-plugins=NodeRestriction",
        f"--service-cluster-ip-range={SERVICE_SUBNET}",
        f"--client-ca-file={authority}",
        f"--tls-cert-file={certificate}",
        f"--tls-private-key-file={key}",
        f"--etcd-servers={ETCD_URL}",
        f"--etcd-cafile={authority}",
        f"--etcd-certfile={certificate}",
        f"--etcd-keyfile={key}",
        f"--kubelet-certificate-authority={authority}",
        f"--kubelet-client-certificate={certificate}",
        f"--kubelet-client-key={key}",
        "--kubelet-preferred-address-types=InternalIP",
        f"--service-account-issuer=https://kubernetes.default.svc.{DOMAIN}",
        f"--service-account-key-file={layout.state}/pki/service-account.pub",
        f"--service-account-signing-key-file={layout.key('service-account')}",
    ]


def controller_manager_arguments(layout: Layout, qps: int | None) -> list[str]:
    rate = [f"--kube-api-qps={qps}", f"--kube-api-burst={2 * qps}"] if qps else []
    return [
        f"--bind-address={NODE_IP}",
        f"--kubeconfig={layout.kubeconfig('controller-manager')}",
        f"--root-ca-file={layout.certificate('ca')}",
        f"--service-account-private-key-file={layout.key('service-account')}",
        f"--cluster-signing-cert-file={layout.certificate('ca')}",
        f"--cluster-signing-key-file={layout.key('ca')}",
        "--use-service-account-credentials=true",
        f"--flex-volume-plugin-dir={layout.state}/volume-plugins",
        "--leader-elect=false",
        # By default 50 s: after a longer outage of the API server, or of a starved kubelet, the only node is
        # marked NotReady, and Services refuse connections until it has reported.
        "--node-monitor-grace-period=5m",
        *rate,
    ]


def objects() -> list[dict[str, Any]]:
    """What the cluster itself needs in the API: the right to read for CoreDNS, and its Service."""
    meta = {"name": "system:coredns"}
    watch = ["list", "watch"]
    service = {"name": "kube-dns", "namespace": "kube-system", "labels": {"k8s-app": "kube-dns"}}
    slice_meta = service | {"labels": {"k8s-app": "kube-dns", "kubernetes.io/service-name": "kube-dns"}}
    ports = [
        {"name": "dns", "port": 53, "protocol": "UDP"},
        {"name": "dns-tcp", "port": 53, "protocol": "TCP"},
    ]
    rbac = "rbac.authorization.k8s.io"
    return [
        {
            "apiVersion": f"{rbac}/v1",
            "kind": "ClusterRole",
            "metadata": meta,
            "rules": [
                {"apiGroups": [""], "resources": ["services", "pods", "namespaces"], "verbs": watch},
                {"apiGroups": ["discovery.k8s.io"], "resources": ["endpointslices"], "verbs": watch},
            ],
        },
        {
            "apiVersion": f"{rbac}/v1",
            "kind": "ClusterRoleBinding",
            "metadata": meta,
            "roleRef": {"apiGroup": rbac, "kind": "ClusterRole", "name": "system:coredns"},
            "subjects": [{"apiGroup": rbac, "kind": "User", "name": "system:coredns"}],
        },
        {
            "apiVersion": "v1",
            "kind": "Service",
            "metadata": service,
            "spec": {"clusterIP": DNS_IP, "ports": ports},
        },
        {
            "apiVersion": "discovery.k8s.io/v1",
            "kind": "EndpointSlice",
            "metadata": slice_meta,
            "addressType": "IPv4",
            "endpoints": [{"addresses": [NODE_IP], "conditions": {"ready": True}}],
            "ports": ports,
        },
    ]
