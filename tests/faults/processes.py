"""Single processes of a cluster, for tests that let one die, stop or find something changed."""

import contextlib
import os
import signal
from collections.abc import Iterator, Mapping
from pathlib import Path

import programs
from clusters import free_ports


@contextlib.contextmanager
def hung(*pids: int) -> Iterator[None]:
    """Processes do nothing for the body of the `with`."""
    with contextlib.ExitStack() as stopped:
        for pid in pids:
            os.kill(pid, signal.SIGSTOP)
            stopped.callback(os.kill, pid, signal.SIGCONT)
        yield


class Process(programs.Logged):
    """`python -m tinsmithd.<kind>` with settings; a context manager that kills it at the end.

    Attributes:
        port: What it listens on; 0 for a rank.
        link_port: Where ranks attach, of a Training server.
    """

    def __init__(self, kind: str, folder: Path, settings: Mapping[str, object], **env: str) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        number = len(list(folder.glob(f"{kind}-*.log")))
        port_file = folder / f"{kind}-{number}.port"
        every = dict(settings)
        if kind != "trainer":
            every = {"listen_address": "127.0.0.1:0", **every, "port_file": port_file}
        link_port_file = folder / f"{kind}-{number}.link"
        if kind == "training":
            link = {"link_address": "127.0.0.1:0", "link_port_file": link_port_file}
            every = {**link, **every}
        prefix = f"TINSMITH_{kind.upper()}_"
        environment = {prefix + key.upper(): str(value) for key, value in every.items()}
        super().__init__(
            folder / f"{kind}-{number}.log",
            f"tinsmithd.{kind}",
            env=programs.variables(**environment, **env),
        )
        self.port = 0 if kind == "trainer" else self.port_in(port_file)
        self.link_port = self.port_in(link_port_file) if kind == "training" else 0


class Training:
    """A Training server and one rank, without the other servers.

    Args:
        base_model: Folder of the base model.
        folder: Data and logs.
        settings: Of the Training server, beside those that make it run.
    """

    def __init__(self, base_model: Path, folder: Path, **settings: object) -> None:
        self._base_model = base_model
        self.folder = folder
        self._settings = {"data_folder": folder / "data", "snapshot_steps": 3, **settings}
        self.data = Path(str(self._settings["data_folder"]))
        port = free_ports()
        at = {"listen_address": f"127.0.0.1:{port}", "link_address": f"127.0.0.1:{port + 1}"}
        self.server = self.start_server(**at)
        self.ranks: list[Process] = []

    @property
    def address(self) -> str:
        """The server's."""
        return f"127.0.0.1:{self.server.port}"

    def start_server(self, *, env: Mapping[str, str] | None = None, **settings: object) -> Process:
        """Start a Training server on the same data."""
        return Process("training", self.folder, {**self._settings, **settings}, **(env or {}))

    def start_rank(self, *, env: Mapping[str, str] | None = None, **settings: object) -> Process:
        """Start a rank group of one that attaches."""
        every = {
            "training_target": f"127.0.0.1:{self.server.link_port}",
            "link_secret_file": self.data / "link.secret",
            "base_model": self._base_model,
            "threads": 1,
            **settings,
        }
        rank = Process("trainer", self.folder, every, **(env or {}))
        self.ranks.append(rank)
        return rank

    def restart_server(self, *, env: Mapping[str, str] | None = None, **settings: object) -> None:
        """Kill the server and start it again on the same port."""
        same = {
            "listen_address": f"127.0.0.1:{self.server.port}",
            "link_address": f"127.0.0.1:{self.server.link_port}",
        }
        self.server.kill()
        self.server = self.start_server(env=env, **{**same, **settings})

    def kill(self) -> None:
        """End all with SIGKILL."""
        self.server.kill()
        for rank in self.ranks:
            rank.kill()

    def __enter__(self) -> "Training":
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()
