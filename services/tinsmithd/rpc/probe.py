"""`python -m tinsmithd.rpc.probe HOST:PORT [SERVICE]`: what health says, as an exit status.

For probes that run a command in the container. Without a service it asks for the process
(liveness), with one whether a real call would succeed (readiness). With `--ca` it speaks TLS.

It runs every few seconds, so it imports gRPC and nothing of this project, not even where channels
are opened (`channels`): settings and certificates that are watched would treble what it costs.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

ANSWER_S_MAX = 5.0


def main(argv: Sequence[str] | None = None) -> int:
    """Ask, and say what is wrong where the answer is not SERVING.

    Args:
        argv: Command line without the program name; None means `sys.argv[1:]`.

    Returns:
        0 if it is SERVING, 1 if not or if there is no answer, 2 for a wrong command line.
    """
    parser = argparse.ArgumentParser(prog="python -m tinsmithd.rpc.probe", description=__doc__)
    parser.add_argument("address", metavar="HOST:PORT")
    parser.add_argument("service", nargs="?", default="", metavar="SERVICE")
    parser.add_argument("--seconds", type=float, default=ANSWER_S_MAX, help="to wait for an answer")
    parser.add_argument("--ca", type=Path, help="authorities (PEM) of a server that speaks TLS")
    parser.add_argument("--certificate", type=Path, help="to show there, where it asks for one")
    parser.add_argument("--key", type=Path, help="of that certificate")
    asked = parser.parse_args(argv)
    if asked.ca is None and (asked.certificate or asked.key):
        parser.error("--certificate and --key are for TLS: give --ca too")
    try:
        why = _why_not(asked)
    except (OSError, ValueError) as error:  # a file that is not there, or what is no certificate
        why = str(error)
    if why:
        print(f"{asked.address}: {why}", file=sys.stderr)
    return 1 if why else 0


def _why_not(asked: argparse.Namespace) -> str:
    """Why it is not SERVING; empty where it is."""
    request = health_pb2.HealthCheckRequest(service=asked.service)
    with _channel(asked) as channel:
        try:
            answer = health_pb2_grpc.HealthStub(channel).Check(request, timeout=asked.seconds)
        except grpc.RpcError as error:
            return f"{error.code().name}: {error.details()}"
    if answer.status == health_pb2.HealthCheckResponse.SERVING:
        return ""
    name = health_pb2.HealthCheckResponse.ServingStatus.Name(answer.status)
    return f"{asked.service or 'the process'} is {name}"


def _channel(asked: argparse.Namespace) -> grpc.Channel:
    options = [("grpc.enable_http_proxy", 0)]  # it is in this container
    if asked.ca is None:
        return grpc.insecure_channel(asked.address, options=options)
    authorities, key, chain = (
        None if file is None else file.read_bytes()
        for file in (asked.ca, asked.key, asked.certificate)
    )
    credentials = grpc.ssl_channel_credentials(authorities, key, chain)
    return grpc.secure_channel(asked.address, credentials, options=options)


if __name__ == "__main__":
    sys.exit(main())
