"""What clients call base models, and what the servers call the same ones."""

from collections.abc import Iterable, Iterator, Mapping
from pathlib import PurePath

from tinsmithd.gateway.problems import Problem
from tinsmithd.text import bounded

SHOWN_MAX = 20
"""Names that a refusal lists."""
_NAME_BYTES_MAX = 100


class BaseModelNames:
    """Knows the names of base models.

    A model has the name that the servers give it (the folder's, or that of a model hub) and any
    number of aliases. Clients load tokenizers by themselves, and many take the model's name for
    that: so the tokenizer's id is a name of the model too.

    Args:
        aliases: What clients may say, to the name that the servers have, or the folder of that
            name.
        tokenizer_ids: A name of either kind, to what a client's transformers loads its tokenizer
            from: a name of a model hub, or a folder on the client's machine.
    """

    def __init__(self, aliases: Mapping[str, str], tokenizer_ids: Mapping[str, str]) -> None:
        self._served = {alias: PurePath(value).name for alias, value in aliases.items()}
        # A hub's name is no folder: it is kept whole where the servers have it so.
        self._whole = dict(aliases)
        self._tokenizer_ids = dict(tokenizer_ids)

    def served(self, name: str, held: Iterable[str]) -> str:
        """The servers' name of a base model.

        Args:
            name: What a client said. A part after `:`, or a third one of `org/model/variant`, is
                left out where nothing has the whole name, as the Tinker SDK does.
            held: Names of the base models that the servers hold.

        Raises:
            Problem: 404: none of them is meant; the message has the names that are.
        """
        models = list(held)
        for form in _forms(name):
            found = self._find(form, models)
            if found is not None:
                return found
        known = self.all(models)
        shown = ", ".join(bounded(each, _NAME_BYTES_MAX) for each in known[:SHOWN_MAX])
        shown = shown or "none yet"
        message = f"no base model {bounded(name, _NAME_BYTES_MAX)!r}; there are: {shown}"
        raise Problem(404, message, "BASE_MODEL_NOT_FOUND", "base_model")

    def _find(self, name: str, held: Iterable[str]) -> str | None:
        for model in held:
            if name in (model, self._tokenizer_ids.get(model)):
                return model
        for alias in self._aliases(held):
            if name in (alias, self._tokenizer_ids.get(alias)):
                return self._held_as(alias, held)
        return None

    def _aliases(self, held: Iterable[str]) -> Iterator[str]:
        """Aliases of the models that are held."""
        return (alias for alias in self._whole if self._held_as(alias, held) is not None)

    def _held_as(self, alias: str, held: Iterable[str]) -> str | None:
        said = (self._whole[alias], self._served[alias])
        return next((model for model in held if model in said), None)

    def public(self, served: str) -> str:
        """The name that clients are told: the first alias, or the servers' name."""
        return next(self._aliases([served]), served)

    def all(self, held: Iterable[str]) -> list[str]:
        """Every name that clients may say but tokenizer ids, aliases of a model before its own."""
        found: list[str] = []
        for model in held:
            found += [*self._aliases([model]), model]
        return list(dict.fromkeys(found))

    def tokenizer_id(self, served: str) -> str:
        """What a client loads a model's tokenizer from: the one that is set, or a name of it.

        An SDK cuts it at the first `:`.
        """
        names = [*self._aliases([served]), served]
        given = (self._tokenizer_ids[name] for name in names if name in self._tokenizer_ids)
        of_a_hub = (name for name in names if "/" in name)
        return next(given, None) or next(of_a_hub, names[0])


def _forms(name: str) -> Iterator[str]:
    """A name, and what is left of it without its variant."""
    yield name
    base = name.partition(":")[0]
    if base != name:
        yield base
    parts = base.split("/")
    if len(parts) == 3 and all(parts):  # a path begins with an empty one
        yield "/".join(parts[:2])
