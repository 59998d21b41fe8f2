"""What this release speaks on the link between Training server and ranks.

See `LinkVersion` of the link's proto file for what the two numbers promise.
"""

from tinsmith.internal.v1 import trainer_link_service_pb2 as pb
from tinsmithd.formats import release

MAJOR, MINOR = 1, 1


def said() -> pb.LinkVersion:
    """What this end says of itself."""
    return pb.LinkVersion(major=MAJOR, minor=MINOR)


def read(message: pb.Hello | pb.Welcome) -> tuple[int, int]:
    """What the other end speaks: major and minor version. The first release said neither."""
    if not message.HasField("link_version"):
        return 1, 0
    return message.link_version.major, message.link_version.minor


def why_not(major: int, minor: int, other_release: str) -> str:
    """Why ranks of this version cannot attach to a server of this release; empty where they can."""
    if major == MAJOR:
        return ""
    later = "the Training server" if major > MAJOR else "the ranks"
    return (
        f"is {major}.{minor} of release {other_release or 'unknown'}, and this Training server of "
        f"release {release() or 'unknown'} speaks {MAJOR}.{MINOR}: upgrade {later}, or start ranks "
        "of this server's release"
    )
