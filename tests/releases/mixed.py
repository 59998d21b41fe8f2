"""A cluster of single processes, each of which may be of another release."""

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path

import programs
from clusters import free_ports, until_health
from releases.code import Release
from tinsmithd.up import SERVICES

DOCUMENTED = ("checkpoint", "sampler", "trainer", "training", "gateway")
"""The order in which docs/operations.md upgrades them: who is called before who calls."""


class Member(programs.Logged):
    """`python -m tinsmithd.<kind>` of a release, with settings."""

    def __init__(
        self, kind: str, release: Release, log: Path, settings: Mapping[str, object]
    ) -> None:
        self.kind, self.release = kind, release
        prefix = f"TINSMITH_{kind.upper()}_"
        chosen = {prefix + key.upper(): str(value) for key, value in settings.items()}
        super().__init__(
            *(log, f"tinsmithd.{kind}"), env=release.variables(**chosen), forked=release.forked
        )

    def end(self) -> int:
        """Ask it to end, as a roll-out does; returns its exit status."""
        self.signal(15)
        return self.wait()


class Mixed:
    """A cluster whose processes are replaced one by one; a context manager that kills them.

    Args:
        base_model: Folder of the base model.
        folder: Data and logs.
        kinds: What there is of `DOCUMENTED`.
        settings: Of the Training server, beside those that make it run.
    """

    def __init__(
        self,
        base_model: Path,
        folder: Path,
        kinds: tuple[str, ...] = DOCUMENTED,
        **settings: object,
    ) -> None:
        first, second = free_ports(), free_ports()
        while abs(first - second) < 3:
            second = free_ports()
        ports = (*range(first, first + 3), second, second + 1)
        names = ("training", "sampler", "checkpoint", "link", "gateway")
        self.addresses = {n: f"127.0.0.1:{p}" for n, p in zip(names, ports, strict=True)}
        self.folder, self.data = folder, folder / "data"
        self.kinds = kinds
        self._base_model = base_model
        self._settings = settings
        self._members: dict[str, Member] = {}
        self._started = 0
        (folder / "logs").mkdir(parents=True, exist_ok=True)

    def _settings_of(self, kind: str) -> Mapping[str, object]:
        at, base = self.addresses, self._base_model
        match kind:
            case "checkpoint":
                own: dict[str, object] = {"data_folder": self.data / "checkpoints"}
            case "training":
                own = {
                    "data_folder": self.data / "training",
                    "link_address": at["link"],
                    "sampler_address": at["sampler"],
                    "checkpoint_address": at["checkpoint"],
                    "checkpoint_target": at["checkpoint"],
                    "snapshot_steps": 3,
                    "stop_grace_s": 1,
                    **self._settings,
                }
            case "sampler":
                own = {"base_model": base, "threads": 1, "checkpoint_target": at["checkpoint"]}
            case "gateway":
                own = {"training_address": at["training"]}
            case _:
                secret = self.data / "training" / "link.secret"
                own = {"base_model": base, "threads": 1}
                return {**own, "training_target": at["link"], "link_secret_file": secret}
        return {"listen_address": at[kind], **own}

    def member(self, kind: str) -> Member:
        """The process of a kind that serves now."""
        return self._members[kind]

    def start(self, release: Release, ranks: Release | None = None) -> None:
        """Start all of them, and wait until all serve.

        Args:
            release: Of all of them.
            ranks: Of the ranks, where that is another one.
        """
        for kind in self.kinds:
            if kind != "trainer":
                self._members[kind] = self._begin(kind, release)
        training = self._members["training"]
        training.port_in(training.log.with_suffix(".port"))
        if "trainer" in self.kinds:
            self._members["trainer"] = self._begin("trainer", ranks or release)
        self.until_serving()

    def _begin(self, kind: str, release: Release) -> Member:
        self._started += 1
        log = self.folder / "logs" / f"{self._started:02d}-{kind}-{release.name}.log"
        settings = dict(self._settings_of(kind))
        if kind != "trainer":
            settings["port_file"] = log.with_suffix(".port")
        return Member(kind, release, log, settings)

    def until_serving(self) -> None:
        """Wait until all serve."""
        for kind in self.kinds:
            if kind in SERVICES:
                until_health(self.addresses[kind], serving=True, service=SERVICES[kind])

    def replace(self, kind: str, release: Release) -> Member:
        """Replace a process by one of another release, as a roll-out does.

        Ranks of both are there for a while: the new ones stand by until the old ones are gone.
        """
        old = self._members[kind]
        if kind == "trainer":
            training = self._members["training"]
            stood_by = training.said.count("a rank group stands by")
            new = self._begin(kind, release)
            new.until(lambda: training.said.count("a rank group stands by") > stood_by)
            old.end()
        else:
            old.end()
            new = self._begin(kind, release)
        self._members[kind] = new
        return new

    def kill(self) -> None:
        """End all with SIGKILL."""
        for member in self._members.values():
            member.kill()

    def __enter__(self) -> "Mixed":
        return self

    def __exit__(self, _: object, error: BaseException | None, __: object) -> None:
        with contextlib.suppress(OSError):
            for log in sorted((self.folder / "logs").glob("*.log")) if error is not None else ():
                error.add_note(f"--- {log.name}\n{log.read_text()[-2000:]}")  # type: ignore[union-attr]
        self.kill()


@contextlib.contextmanager
def running(mixed: Mixed, release: Release) -> Iterator[Mixed]:
    """A cluster all of one release, for the body of the `with`."""
    with mixed:
        mixed.start(release)
        yield mixed
