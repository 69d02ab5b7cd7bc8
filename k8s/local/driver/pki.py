"""Keys, certificates and kubeconfigs, made with the openssl command."""

from __future__ import annotations

import base64
import json
from dataclasses import dataclass
from pathlib import Path

from shell import run

DAYS = "3650"
KEY = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes")


@dataclass(frozen=True)
class Certificate:
    """What a certificate says: user name and groups for a client, addresses for a server."""

    name: str
    user: str
    groups: tuple[str, ...] = ()
    addresses: tuple[str, ...] = ()

    def subject(self) -> str:
        return "".join(f"/O={group}" for group in self.groups) + f"/CN={self.user}"

    def extensions(self) -> list[str]:
        usage = ["extendedKeyUsage=clientAuth" + (",serverAuth" if self.addresses else "")]
        alternatives = [f"subjectAltName={','.join(self.addresses)}"] if self.addresses else []
        both = [
            "basicConstraints=critical,CA:FALSE",
            "keyUsage=critical,digitalSignature",
            *usage,
            *alternatives,
        ]
        return [word for extension in both for word in ("-addext", extension)]


class Authority:
    """The cluster's certificate authority; what exists is kept."""

    def __init__(self, folder: Path, log: Path) -> None:
        self._folder = folder
        self._log = log

    @property
    def certificate(self) -> Path:
        return self._folder / "ca.crt"

    def pair(self, name: str) -> tuple[Path, Path]:
        """Paths of a certificate and its key."""
        return self._folder / f"{name}.crt", self._folder / f"{name}.key"

    def create(self) -> None:
        self._folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        extensions = (
            "-addext",
            "basicConstraints=critical,CA:TRUE",
            "-addext",
            "keyUsage=critical,keyCertSign,cRLSign",
        )
        self._make("ca", "/CN=vllm-fleet-local", *extensions)
        public, private = self._folder / "service-account.pub", self._folder / "service-account.key"
        if not public.exists():
            run(["openssl", "genpkey", "-algorithm", "EC", *KEY[2:4], "-out", private], self._log)
            run(["openssl", "pkey", "-in", private, "-pubout", "-out", public], self._log)

    def issue(self, certificate: Certificate) -> None:
        authority, key = self.pair("ca")
        self._make(
            certificate.name,
            certificate.subject(),
            "-CA",
            str(authority),
            "-CAkey",
            str(key),
            *certificate.extensions(),
        )

    def _make(self, name: str, subject: str, *options: str) -> None:
        certificate, key = self.pair(name)
        if certificate.exists():
            return
        fresh = certificate.with_suffix(".new")
        request = ["openssl", "req", "-x509", "-days", DAYS, *KEY, "-subj", subject, *options]
        run([*request, "-config", "/dev/null", "-keyout", key, "-out", fresh], self._log)
        fresh.rename(certificate)

    def kubeconfig(self, name: str, server: str) -> str:
        """A kubeconfig for a client certificate that holds all it needs (JSON, which is YAML)."""
        certificate, key = self.pair(name)
        document = {
            "apiVersion": "v1",
            "kind": "Config",
            "clusters": [
                {
                    "name": "vllm-fleet",
                    "cluster": {"server": server, "certificate-authority-data": encoded(self.certificate)},
                }
            ],
            "users": [
                {
                    "name": name,
                    "user": {
                        "client-certificate-data": encoded(certificate),
                        "client-key-data": encoded(key),
                    },
                }
            ],
            "contexts": [{"name": "vllm-fleet", "context": {"cluster": "vllm-fleet", "user": name}}],
            "current-context": "vllm-fleet",
        }
        return json.dumps(document, indent=2) + "\n"


def encoded(path: Path) -> str:
    return base64.b64encode(path.read_bytes()).decode()
