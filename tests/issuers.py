"""An issuer of tokens for tests: a real HTTP server, which can hang, lie, and change its keys."""

import base64
import collections
import functools
import hashlib
import hmac
import json
import ssl
import threading
import time
from collections.abc import Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import jwt
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from jwt.algorithms import ECAlgorithm, OKPAlgorithm, RSAAlgorithm

from certificates import Issued

AUDIENCE = "tinsmith"
CONFIGURATION = "/.well-known/openid-configuration"
KEYS_PATH = "/keys"
ALGORITHMS = ("RS256", "ES256", "EdDSA")


@functools.cache
def private_key(name: str, algorithm: str = "RS256") -> Any:
    """A key by its name; the same one in every test of a process."""
    if algorithm == "RS256":
        return rsa.generate_private_key(public_exponent=65537, key_size=2048)
    if algorithm == "ES256":
        return ec.generate_private_key(ec.SECP256R1())
    return ed25519.Ed25519PrivateKey.generate()


def jwk(name: str, algorithm: str = "RS256", **more: Any) -> dict[str, Any]:
    """The public half of such a key, as an issuer publishes it."""
    kind: Any = {"RS256": RSAAlgorithm, "ES256": ECAlgorithm, "EdDSA": OKPAlgorithm}[algorithm]
    found = kind.to_jwk(private_key(name, algorithm).public_key(), as_dict=True)
    return {**found, "kid": name, "use": "sig", "alg": algorithm, **more}


def unsigned(header: Mapping[str, Any], claims: Mapping[str, Any], signature: bytes = b"") -> str:
    """A token by hand, with whatever somebody writes there."""
    parts = [json.dumps(header).encode(), json.dumps(claims).encode(), signature]
    return ".".join(base64.urlsafe_b64encode(part).decode().rstrip("=") for part in parts)


class Issuer:
    """The issuer; a context manager.

    Args:
        tls: What it shows; None speaks plain text.

    Attributes:
        url: What it calls itself.
        published: Its keys.
        pages: What it answers in place of what is right, by path: status, headers, body.
        asked: How often each path was asked for.
        answers: While it is cleared, requests hang.
        drips: While it is set, answers begin, and a byte comes now and then for as long as somebody
            reads.
    """

    def __init__(self, tls: Issued | None = None, port: int = 0) -> None:
        issuer = self

        class Handler(BaseHTTPRequestHandler):
            dripped = False

            def do_GET(self) -> None:
                issuer.asked[self.path] += 1
                issuer.answers.wait(60)
                status, headers, body = issuer.page(self.path)
                try:
                    self.send_response(status)
                    for name, value in headers.items():
                        self.send_header(name, value)
                    if not issuer.drips.is_set():  # else it ends with the connection
                        self.send_header("Content-Length", str(len(body)))
                    self.end_headers()
                    while issuer.drips.is_set() or self.dripped:
                        self.dripped = True
                        self.wfile.write(b" ")
                        time.sleep(0.02)
                    self.wfile.write(body)
                except OSError:
                    pass  # whoever asked has gone

            def log_message(self, *_: Any) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", port), Handler)
        self._server.daemon_threads = True
        self.port = self._server.server_port
        scheme = "http"
        if tls is not None:
            scheme = "https"
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(tls.certificate, tls.key)
            self._server.socket = context.wrap_socket(self._server.socket, server_side=True)
        self.url = f"{scheme}://localhost:{self.port}"
        self.published = [jwk("first")]
        self.pages: dict[str, tuple[int, dict[str, str], bytes]] = {}
        self.asked: collections.Counter[str] = collections.Counter()
        self.answers = threading.Event()
        self.answers.set()
        self.drips = threading.Event()
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,))

    def page(self, path: str) -> tuple[int, dict[str, str], bytes]:
        """What it answers."""
        if path in self.pages:
            return self.pages[path]
        if path == CONFIGURATION:
            found: dict[str, Any] = {"issuer": self.url, "jwks_uri": f"{self.url}{KEYS_PATH}"}
        elif path == KEYS_PATH:
            found = {"keys": self.published}
        else:
            return 404, {}, b""
        return 200, {"Content-Type": "application/json"}, json.dumps(found).encode()

    def settings(self, **more: Any) -> dict[str, Any]:
        """Settings of a process that takes its tokens, and soon looks for new keys."""
        quick = {"oidc_unknown_key_s": 0.05, "oidc_timeout_s": 30.0, "oidc_leeway_s": 0.0}
        return {"oidc_issuer": self.url, "oidc_audience": AUDIENCE, **quick, **more}

    def claims(self, subject: str = "alice", **more: Any) -> dict[str, Any]:
        """Good claims, or others in their place; None takes one away."""
        now_s = int(time.time())
        claims = {"iss": self.url, "aud": AUDIENCE, "sub": subject, "iat": now_s}
        claims |= {"exp": now_s + 300, **more}
        return {name: value for name, value in claims.items() if value is not None}

    def token(
        self,
        subject: str = "alice",
        *,
        key: str = "first",
        algorithm: str = "RS256",
        header: Mapping[str, Any] | None = None,
        **claims: Any,
    ) -> str:
        """A token, signed."""
        headers = {"kid": key, **(header or {})}
        said = self.claims(subject, **claims)
        return jwt.encode(said, private_key(key, algorithm), algorithm, headers)

    def confused(self) -> str:
        """A token signed by its public key, as if that were the secret of HS256."""
        secret = private_key("first").public_key()
        pem = secret.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
        header = {"alg": "HS256", "kid": "first", "typ": "JWT"}
        signed = unsigned(header, self.claims()).rstrip(".")
        signature = hmac.new(pem, signed.encode(), hashlib.sha256).digest()
        return unsigned(header, self.claims(), signature)

    def stop(self) -> None:
        """Hang up, and answer nobody any more."""
        self.answers.set()
        self.drips = threading.Event()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def __enter__(self) -> "Issuer":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._thread.is_alive():
            self.stop()
