"""Why a connection that should speak TLS does not come about, or one that should not.

gRPC's own texts name OpenSSL's errors, and where a server of the other kind hangs up they name
nothing. Before the first answer of a cluster such a failure is a mistake in an address or a file,
which no repeat mends; a person should read which, at once.
"""

import os
import socket
import ssl
from collections.abc import Sequence

from tinsmith.addresses import SECURE, proxy_note
from tinsmith.channels import CA_VARIABLE, CERTIFICATE_VARIABLE, KEY_VARIABLE, TlsFiles

PROBE_S_MAX = 2.0
_HUNG_UP = ("Socket closed", "Connection reset", "End of TCP stream", "Handshake read failed")
_HELLO = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes([0, 0, 0, 4, 0, 0, 0, 0, 0])
"""How a client of HTTP/2 begins."""
_NOT_TRUSTED = "CERTIFICATE_VERIFY_FAILED"


def trouble(message: str, address: str, files: TlsFiles) -> str:
    """What is wrong between a server that never answered and this client, as a sentence.

    Empty where gRPC's text shows nothing that has to do with TLS. Where it says no more than that
    the connection ended, the server is asked what it speaks.

    Args:
        message: The text.
        address: Who was called.
        files: What is trusted and shown.
    """
    host = address.removeprefix(SECURE)
    if not any(text in message for text in _HUNG_UP):
        return _said_by(message, address, files)
    if "/" in host or proxy_note(address):
        return ""
    return _found_at(address, files)


def _said_by(message: str, address: str, files: TlsFiles) -> str:
    if not address.startswith(SECURE):
        return ""
    host = address.removeprefix(SECURE)
    if "WRONG_VERSION_NUMBER" in message:
        return f"{host} does not speak TLS: leave out https://"
    if "selected ALPN property" in message:
        return (
            f"{host} speaks TLS but not HTTP/2, such as a gateway for stock Tinker SDKs does; "
            "this client needs the address of the Training server"
        )
    if "Hostname Verification" in message:
        return f"the certificate of {host} is for another name; use one that it has"
    if _NOT_TRUSTED in message:
        why = message.partition(_NOT_TRUSTED)[2].strip(" :").removesuffix(": OK")
        if "expired" in why or "not yet valid" in why:
            return f"{_NOT_TRUSTED}: the certificate of {host}: {why}"
        trusted = files.ca or os.environ.get("GRPC_DEFAULT_SSL_ROOTS_FILE_PATH")
        trusted = trusted or "the usual authorities"
        mend = f"{CA_VARIABLE} names the file of the one that does"
        return f"{_NOT_TRUSTED}: {trusted} do not vouch for {host} ({why}); {mend}"
    if "security handshaker" in message and files.ca:
        return f"{files.ca} or what else is trusted and shown cannot be used: is it PEM?"
    return ""


def _found_at(address: str, files: TlsFiles) -> str:
    host = address.removeprefix(SECURE)
    spoken = _handshake(host, files)
    if spoken is None:
        return ""
    protocol, answers = spoken
    if not address.startswith(SECURE):
        also = "" if protocol == "h2" else "; it may be a gateway, though, as it speaks no HTTP/2"
        return f"{host} speaks TLS: the address is {SECURE}{host}{also}"
    if protocol == "h2" and not answers:
        shown = files.certificate or "none"
        return (
            f"{host} hangs up on whoever shows no certificate that it knows; shown is {shown} "
            f"({CERTIFICATE_VARIABLE}, {KEY_VARIABLE})"
        )
    return ""


def _handshake(host: str, files: TlsFiles) -> Sequence[object] | None:
    """Speak TLS with a server; returns its protocol and whether it goes on after the handshake.

    None where it does not speak TLS. Nothing is sent that anybody could want to hide.
    """
    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    context.set_alpn_protocols(["h2"])
    name, _, port = host.rpartition(":")
    name = name.strip("[]")
    try:
        if files.certificate:
            context.load_cert_chain(files.certificate, files.key)
        with (
            socket.create_connection((name, int(port)), PROBE_S_MAX) as plain,
            context.wrap_socket(plain, server_hostname=name) as secure,
        ):
            protocol, answers = secure.selected_alpn_protocol(), False
            try:
                secure.sendall(_HELLO)
                answers = bool(secure.recv(1))
            except TimeoutError:
                answers = True
            except OSError:
                pass
            return protocol, answers
    except (OSError, ValueError):
        return None
