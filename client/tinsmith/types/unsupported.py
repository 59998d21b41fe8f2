"""Parts of Tinker's API that Tinsmith does not have: using one says so at once, by its name."""

from typing import Any

from tinsmith.errors import unsupported


class _Unsupported:
    """Cannot be made."""

    _why = ""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        raise unsupported(type(self).__name__, self._why)


class ImageChunk(_Unsupported):
    """Tinker's image in a prompt; raises UnimplementedError."""

    _why = "images are not supported, text is"


class ImageAssetPointerChunk(_Unsupported):
    """Tinker's stored image in a prompt; raises UnimplementedError."""

    _why = "images are not supported, text is"


class DmelChunk(_Unsupported):
    """Tinker's audio in a prompt; raises UnimplementedError."""

    _why = "audio is not supported, text is"


class DimuonOptimizerConfig(_Unsupported):
    """Tinker's choice of the Dimuon optimizer; raises UnimplementedError."""

    _why = "the optimizer is not supported, AdamW is"


class DimuonParams(_Unsupported):
    """Settings of a Dimuon step; raises UnimplementedError."""

    _why = "the optimizer is not supported, AdamW is"
