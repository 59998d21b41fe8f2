"""Calls every public method of a stock Tinker SDK; runs where only that SDK is installed.

python method_program.py

It prints one line of JSON: for each method of the clients, the deprecated `_async` twins too, what
came of calling it with real arguments. Current folder: one that has the base model's own, by its
name, so that tokenizers are found.
"""

import asyncio
import inspect
import json
import time
from typing import Any

# It finds torch for the SDK, which looks for it as it is imported.
from method_cases import CASES, OWNERS, World, now, tinker

TWIN = "_async"
CALL_S_MAX = 60.0
"""Longest time that a call may take, its answer included."""


def public(world: World) -> list[str]:
    """The public methods of the clients, those of their bases in the SDK too."""
    found = []
    # Older SDKs have no name for what `create_rest_client` gives.
    classes = {**vars(tinker), "RestClient": type(world.rest)}
    for name in CASES:
        for base in reversed(classes.get(name, object).__mro__):
            if base.__module__.partition(".")[0] == "tinker":
                methods = [key for key, value in vars(base).items() if _is_method(key, value)]
                found += [f"{name}.{method}" for method in methods]
    return sorted(set(found))


def _is_method(name: str, value: Any) -> bool:
    return not name.startswith("_") and (callable(value) or isinstance(value, staticmethod))


async def whole(value: Any) -> Any:
    """What is awaited in the end: twins of training methods give a future of the answer."""
    async with asyncio.timeout(CALL_S_MAX):
        while inspect.isawaitable(value):
            value = await value
    return value


def settled(value: Any) -> Any:
    """The answer of a call."""
    if inspect.iscoroutine(value):
        return asyncio.run(whole(value))
    return value.result(CALL_S_MAX) if hasattr(value, "result") else value


def outcome(name: str, world: World) -> tuple[str, str]:
    """What comes of a method: `works`, `refused`, `FAILED` or `NOT TRIED`, and what was said."""
    cls, _, method = name.partition(".")
    case = CASES[cls].get(method.removesuffix(TWIN))
    if case is None:
        return "NOT TRIED", ""
    try:
        owner = OWNERS[cls](world) if case.of is None else case.of(world)
        gave = case.arguments(world)
        value = settled(getattr(owner, method)(*gave.args, **gave.named))
        if case.refused:
            return "FAILED", f"it was to be refused: {value!r}"
        return ("works", "") if case.holds(value, world, gave) else ("FAILED", repr(value))
    except Exception as error:
        text = f"{type(error).__name__}: {error}"
        return ("refused" if any(part in text for part in case.refused) else "FAILED"), text


def main() -> None:
    """Call them all."""
    world = World()
    found = {}
    for name in public(world):
        begun_s = time.monotonic()
        what, said = outcome(name, world)
        found[name] = {"outcome": what, "said": said[:600], "s": time.monotonic() - begun_s}
    if hasattr(world.service, "close"):
        now(world.service.close("success"))
    print(json.dumps({"version": tinker.__version__, "methods": found}))


if __name__ == "__main__":
    main()
