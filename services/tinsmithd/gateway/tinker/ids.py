"""Names that the gateway gives. Each says what it is of, so that any gateway can read it.

    session             s-<32 hex digits>
    model               <session>:train:<number>
    sampling session    <session>:sample:<number>:<what it samples from, base64url>

No name has a slash: they stand in paths of URLs.
"""

import base64
import binascii
import re
import secrets

from tinsmithd.gateway.problems import Problem

_SESSION = re.compile(r"s-[0-9a-f]{32}")
_MODEL = re.compile(r"(s-[0-9a-f]{32}):train:(0|[1-9][0-9]{0,17})")
_SAMPLER = re.compile(r"(s-[0-9a-f]{32}):sample:(0|[1-9][0-9]{0,17}):([A-Za-z0-9_-]{1,1024})")


def new_session_id() -> str:
    """A session's id; nobody can guess it."""
    return f"s-{secrets.token_hex(16)}"


def is_session_id(text: str) -> bool:
    """Whether a text has the form of a session's id."""
    return _SESSION.fullmatch(text) is not None


def check_session_id(text: str) -> str:
    """A session's id, if it is one.

    Raises:
        Problem: 404.
    """
    if not is_session_id(text):
        raise Problem(404, "session_id: there is no such session", field="session_id")
    return text


def model_id_of(session_id: str, model_seq_id: int) -> str:
    """The id of a session's model; SDKs make the same by themselves."""
    return f"{session_id}:train:{model_seq_id}"


def session_of_model(model_id: str) -> str:
    """The session that a model belongs to; empty for one that no SDK made."""
    found = _MODEL.fullmatch(model_id)
    return found[1] if found else ""


def sampling_session_id_of(session_id: str, number: int, weights: str) -> str:
    """The id of a session's sampler.

    Args:
        session_id: The session.
        number: `sampling_session_seq_id`.
        weights: What it samples from: a checkpoint's path, or the name of a base model.
    """
    packed = base64.urlsafe_b64encode(weights.encode()).rstrip(b"=").decode()
    return f"{session_id}:sample:{number}:{packed}"


def read_sampling_session_id(text: str) -> tuple[str, int, str]:
    """Session, number and weights of a sampler.

    Raises:
        Problem: 404.
    """
    found = _SAMPLER.fullmatch(text)
    try:
        if found is None:
            raise ValueError
        packed = found[3]
        weights = base64.b64decode(packed + "=" * (-len(packed) % 4), b"-_", validate=True)
        return found[1], int(found[2]), weights.decode()
    except (ValueError, binascii.Error):
        message = "sampling_session_id: there is no such sampling session"
        raise Problem(404, message, field="sampling_session_id") from None
