"""Certificates: read from files and checked, read again when they are replaced, or made here."""

from tinsmithd.tls.certificates import Certificates, names_of, of_callers, of_cluster, watch
from tinsmithd.tls.contexts import ServerContext
from tinsmithd.tls.pem import Files, Pems
from tinsmithd.tls.throwaway import ThrownAway, throw_away

__all__ = [
    "Certificates",
    "Files",
    "Pems",
    "ServerContext",
    "ThrownAway",
    "names_of",
    "of_callers",
    "of_cluster",
    "throw_away",
    "watch",
]
