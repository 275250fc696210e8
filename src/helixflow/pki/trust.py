"""How to make programs believe our certificate authority."""

from pathlib import Path
from shlex import quote


def trust_instructions(ca_path: Path) -> list[str]:
    """Lines for people: how to trust the authority in `ca_path` (PEM), by kind of client."""
    path = quote(str(ca_path))
    return [
        f"curl:                   curl --cacert {path} https://…",
        f"Python (OpenAI SDK …):  export SSL_CERT_FILE={path}",
        f"Node.js:                export NODE_EXTRA_CA_CERTS={path}",
        f"Debian, Ubuntu:         sudo cp {path} /usr/local/share/ca-certificates/helixflow.crt"
        " && sudo update-ca-certificates",
        f"Fedora, RHEL:           sudo cp {path} /etc/pki/ca-trust/source/anchors/helixflow.crt"
        " && sudo update-ca-trust",
        "macOS:                  sudo security add-trusted-cert -d -r trustRoot"
        f" -k /Library/Keychains/System.keychain {path}",
    ]
