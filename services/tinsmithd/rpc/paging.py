"""Pages of lists: what a caller asks for, and where the next one begins.

Things are listed newest first, by a number that rises with each; a page token is the number that
those of the next page are below. So what is added meanwhile moves nothing.
"""

from dataclasses import dataclass

from tinsmithd.errors import InvalidArgument

PAGE_SIZE_DEFAULT = 100
PAGE_SIZE_MAX = 1000
PAGE_TOKEN_DIGITS_MAX = 18


@dataclass(frozen=True)
class Page:
    """Which page is asked for.

    Attributes:
        size: Number of things on it, at most.
        below: Their numbers are below this one; None for the first page.
    """

    size: int
    below: int | None


def page_of(page_size: int, page_token: str) -> Page:
    """Read which page a request asks for.

    A size of 0 means the default, and one above `PAGE_SIZE_MAX` means that (AIP-158).

    Raises:
        InvalidArgument: The size is below 0, or the token is none that `token_after` made.
    """
    if page_size < 0:
        raise InvalidArgument("page_size", f"{page_size} is below 0")
    size = min(page_size or PAGE_SIZE_DEFAULT, PAGE_SIZE_MAX)
    if not page_token:
        return Page(size, None)
    digits = page_token.isascii() and page_token.isdigit()
    if not digits or len(page_token) > PAGE_TOKEN_DIGITS_MAX:
        raise InvalidArgument("page_token", "is not one that this server gave")
    return Page(size, int(page_token))


def token_after(number: int) -> str:
    """The token of the page that follows the thing with this number."""
    return str(number)
