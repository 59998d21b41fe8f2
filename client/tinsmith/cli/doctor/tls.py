"""A check of what a cluster's certificate is, and whether it is trusted here."""

import socket
import ssl
import time
from typing import Any

from tinsmith.addresses import SECURE, is_local
from tinsmith.channels import CA_VARIABLE, TlsFiles
from tinsmith.cli.doctor.findings import OK, WARNING, WRONG, Finding
from tinsmith.cli.text import span

CHECK = "TLS"
TIMEOUT_S = 5.0
LEFT_S_FEW = 14 * 86_400.0


def finding(address: str) -> Finding:
    """What is so with an address that takes connections, whether it speaks TLS or not."""
    if not address.startswith(SECURE):
        if is_local(address):
            return Finding(CHECK, OK, "plain text, which does not leave this machine")
        hint = f"let it speak TLS (docs/operations.md), and call it {SECURE}{address}"
        return Finding(CHECK, WARNING, "plain text: others can read data and keys on the way", hint)
    files = TlsFiles.of_environment()
    trusted = f"{CA_VARIABLE}={files.ca}" if files.ca else "the usual authorities"
    try:
        left_s = _left_s(address, files)
    except ssl.SSLCertVerificationError as error:
        hint = f"{CA_VARIABLE} names the file of the authority that vouches for it"
        return Finding(CHECK, WRONG, f"{trusted}: {error.verify_message}", hint)
    except (OSError, ValueError) as error:
        hint = "is it a port that speaks TLS, and are the files PEM?"
        return Finding(CHECK, WRONG, f"{trusted}: {error}", hint)
    if left_s < LEFT_S_FEW:
        return Finding(CHECK, WARNING, f"its certificate expires in {span(left_s)}", "renew it")
    return Finding(CHECK, OK, f"{trusted} vouch for its certificate, good for {span(left_s)}")


def _left_s(address: str, files: TlsFiles) -> float:
    """Seconds until a server's certificate expires, after a handshake that verifies it."""
    context = ssl.create_default_context(cafile=files.ca or None)
    context.set_alpn_protocols(["h2"])
    if files.certificate:
        context.load_cert_chain(files.certificate, files.key or None)
    host, _, port = address.removeprefix(SECURE).rpartition(":")
    name = host.strip("[]")
    with (
        socket.create_connection((name, int(port)), TIMEOUT_S) as plain,
        context.wrap_socket(plain, server_hostname=name) as secure,
    ):
        shown: dict[str, Any] = secure.getpeercert() or {}
    return ssl.cert_time_to_seconds(str(shown["notAfter"])) - time.time()
