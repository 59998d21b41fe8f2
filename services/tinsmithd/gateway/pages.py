"""Which web pages may call the gateway from a browser.

A browser says which page makes a request: `Origin`. It lets any page send simple ones to any
address that the person in front of it can reach, such as a gateway without keys on their machine.
So none may that nobody has named.

It says nothing of a page that reads its own host, and a page's host is whatever its name stands for
at the moment: whoever owns a name can let it stand for this machine (DNS rebinding). Such a request
names that host. So a gateway that takes whoever reaches it, since only this machine does, answers
under no name that anybody could own.
"""

import ipaddress
from collections.abc import Callable

from starlette.middleware.cors import CORSMiddleware
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from tinsmithd.config import GatewaySettings
from tinsmithd.config.fields import is_loopback
from tinsmithd.gateway.problems import Problem
from tinsmithd.text import bounded

ANY = "*"
_SHOWN_BYTES_MAX = 100
_READ = ("retry-after", "retry-after-ms", "x-should-retry")
"""Headers of answers that a page may read, beside those that it always may."""


class Pages:
    """Refuses requests of web pages that are not allowed, and tells browsers of those that are.

    Args:
        app: What answers.
        settings: Say which pages may, and who needs no key.
        refused: Writes a refusal in the form of the API that a path is of.
    """

    def __init__(
        self,
        app: ASGIApp,
        settings: GatewaySettings,
        refused: Callable[[Problem, str], Response],
    ) -> None:
        self._app = app
        self._refused = refused
        self._allowed = _parts(settings.allowed_origins)
        self._hosts = _parts(settings.allowed_hosts.lower())
        for url in (*self._allowed, settings.public_url):
            self._hosts |= {_name_of(url.partition("://")[2].partition("/")[0].lower())}
        takes_all = not settings.keys_file and is_loopback(settings.listen_address)
        self._checks_hosts = takes_all and ANY not in self._hosts | self._allowed
        self._told = CORSMiddleware(
            app,
            allow_origins=sorted(self._allowed),
            allow_methods=(ANY,),
            allow_headers=(ANY,),
            expose_headers=_READ,
        )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        origins = _said(scope, b"origin")
        if why := self._why_not(origins, _said(scope, b"host")):
            problem = Problem(403, why, "PERMISSION_DENIED")
            await self._refused(problem, scope["path"])(scope, receive, send)
        elif origins:
            await self._told(scope, receive, send)
        else:
            await self._app(scope, receive, send)

    def _why_not(self, origins: set[str], hosts: set[str]) -> str:
        """Why a request is refused; empty where it is not."""
        if ANY not in self._allowed and (others := origins - self._allowed):
            shown = bounded(next(iter(others)), _SHOWN_BYTES_MAX)
            return f"pages of {shown!r} may not call this gateway; allowed_origins names who may"
        names = {_name_of(host.lower()) for host in hosts} if self._checks_hosts else set()
        for name in names - self._hosts:
            if _may_be_anybodys(name):
                shown = bounded(name, _SHOWN_BYTES_MAX)
                return f"this gateway is not called {shown!r}: allowed_hosts says what it is called"
        return ""


def _parts(text: str) -> frozenset[str]:
    return frozenset(part.strip() for part in text.split(",") if part.strip())


def _said(scope: Scope, header: bytes) -> set[str]:
    return {value.decode("latin-1") for name, value in scope["headers"] if name == header}


def _name_of(host: str) -> str:
    """The name of a host that may have a port, and brackets."""
    name, _, port = host.rpartition(":")
    return (name if name and port.isdigit() else host).strip("[]").removesuffix(".")


def _may_be_anybodys(name: str) -> bool:
    """Whether somebody may own a name: it is no address, not this machine's own, and has a dot."""
    try:
        ipaddress.ip_address(name)
        return False
    except ValueError:
        return "." in name and not name.endswith(".localhost")
