"""A certificate that is in use: read again when its files are replaced, warned of as it ages.

Files are replaced while processes run, by cert-manager or by hand. Whoever needs the certificate
asks for it each time, with each handshake and each call, and gets what the files hold. What cannot
be used is never taken: the one before stays in use, and the log says why. A program that writes
certificate and key one after the other is met half-way in this manner, too.
"""

import asyncio
import datetime
import ipaddress
import logging
import threading
import time
from collections.abc import Sequence
from pathlib import Path

from tinsmithd.config import CalledConfig, Config, ConfigError
from tinsmithd.tls.pem import Files, Pems, read

LOOK_INTERVAL_S = 1.0
"""How old a look at the files may be when somebody asks."""
WATCH_INTERVAL_S = 30.0
NEAR_DAYS = 14
"""From so many days before the end on, the log says so every day."""
DAY_S = 86_400.0
_READABLE_BY_OTHERS = 0o004
_ANY_HOST = ("", "0.0.0.0", "::", "*")

_log = logging.getLogger(__name__)


class Certificates:
    """The certificate of some files, as they are now. Any thread may ask.

    Args:
        files: Where it is.

    Attributes:
        files: The same.

    Raises:
        ConfigError: The files cannot be used; the message names the setting.
    """

    def __init__(self, files: Files) -> None:
        self.files = files
        self._lock = threading.Lock()
        self._state = files.state()
        self._looked_s = time.monotonic()
        self._said_s: float | None = None
        self._pems = read(files)
        if files.key and _readable_by_others(files.key):
            _log.warning("%s: every user of this machine can read %s", files.key_setting, files.key)
        if files.prefix == "cluster_tls" and not self._pems.for_clients:
            text = "is for servers alone (extended key usage): others refuse this process's calls"
            _log.warning("%s: %s %s", files.certificate_setting, files.certificate, text)
        self._say_age()

    def current(self) -> Pems:
        """What the files hold, or last held that can be used; the same object until it changes."""
        with self._lock:
            now_s = time.monotonic()
            if now_s - self._looked_s >= LOOK_INTERVAL_S:
                self._looked_s = now_s
                self._look()
                self._say_age()
            return self._pems

    def _look(self) -> None:
        state = self.files.state()
        if state == self._state:
            return
        self._state = state
        try:
            self._pems = read(self.files)
        except ConfigError as error:
            _log.error("%s; what was there before stays in use", error)
            return
        self._said_s = None
        expires = self._pems.expires
        _log.info(
            "read %s again%s",
            self.files.certificate or self.files.authorities,
            f": good until {expires}" if expires else "",
        )

    @property
    def left_s(self) -> float | None:
        """Seconds until it expires, below 0 since; None where there is no certificate."""
        expires = self._pems.expires
        if expires is None:
            return None
        return (expires - datetime.datetime.now(datetime.UTC)).total_seconds()

    def _say_age(self) -> None:
        left_s, now_s = self.left_s, time.monotonic()
        if left_s is None or left_s >= NEAR_DAYS * DAY_S:
            return
        if self._said_s is not None and now_s - self._said_s < DAY_S:
            return
        self._said_s = now_s
        what = self.files.certificate
        if left_s < 0:
            _log.error("%s expired on %s: whoever connects refuses it", what, self._pems.expires)
        else:
            _log.warning("%s expires in %.1f days, on %s", what, left_s / DAY_S, self._pems.expires)

    def warn_of_names(self, address: str) -> None:
        """Say where a certificate is not for the host that this process listens on."""
        host = address.rpartition(":")[0].strip("[]")
        names = self._pems.names
        if host in _ANY_HOST or any(_is_for(host, name) for name in names):
            return
        _log.warning(
            "%s is for %s: callers that know this server as %s will refuse it",
            *(self.files.certificate, ", ".join(names) or "no name at all", host),
        )


async def watch(certificates: Sequence[Certificates]) -> None:
    """Look at files now and then even if nobody asks, until cancelled."""
    while True:
        for each in certificates:
            each.current()
        await asyncio.sleep(WATCH_INTERVAL_S)


def of_callers(config: CalledConfig) -> Certificates | None:
    """What a process shows to its callers; None where it speaks plain text.

    Raises:
        ConfigError: It cannot be used.
    """
    if not config.tls_certificate_file:
        return None
    return Certificates(
        Files(
            config.section,
            "tls",
            config.tls_certificate_file,
            config.tls_key_file,
            config.tls_client_ca_file,
            "tls_client_ca_file",
        )
    )


def of_cluster(config: Config) -> Certificates | None:
    """By what a process knows the others of its cluster, and they know it; None without TLS.

    Raises:
        ConfigError: It cannot be used.
    """
    if not config.cluster_tls_ca_file:
        return None
    return Certificates(
        Files(
            config.section,
            "cluster_tls",
            config.cluster_tls_certificate_file,
            config.cluster_tls_key_file,
            config.cluster_tls_ca_file,
            "cluster_tls_ca_file",
        )
    )


def names_of(text: str) -> Sequence[str]:
    """The names of a setting that has them with commas."""
    return [name for part in text.split(",") if (name := part.strip())]


def _is_for(host: str, name: str) -> bool:
    """Whether a name of a certificate covers a host."""
    try:
        return ipaddress.ip_address(host) == ipaddress.ip_address(name)
    except ValueError:
        pass
    if name.startswith("*."):
        return host.partition(".")[2].lower() == name[2:].lower()
    return host.lower() == name.lower()


def _readable_by_others(name: str) -> bool:
    try:
        return bool(Path(name).stat().st_mode & _READABLE_BY_OTHERS)
    except OSError:
        return False
