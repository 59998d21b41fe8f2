"""Settings of the five kinds of process: what there is, and where a process takes it from.

A setting comes from, later ones winning: its default, a TOML file with one section per process
(`[training]`, `[trainer]`, `[sampler]`, `[checkpoint]`, `[gateway]`), the environment
(`TINSMITH_TRAINING_LISTEN_ADDRESS`), the command line (`--listen-address`). A key that no class
knows stops the process: a typo must not run with a default.

To add a setting, write it with its docstring into the class of its process, use it, and run
`make settings`, which writes `docs/settings.md`.
"""

from collections.abc import Mapping

from tinsmithd.config.base import CalledConfig, Config, ServerConfig
from tinsmithd.config.checkpoint import CheckpointConfig
from tinsmithd.config.errors import ConfigError
from tinsmithd.config.fields import LINK_ADDRESS
from tinsmithd.config.gateway import GatewaySettings
from tinsmithd.config.named import limits_from
from tinsmithd.config.sampler import SamplerConfig
from tinsmithd.config.trainer import TrainerConfig
from tinsmithd.config.training import TrainingConfig

SECTIONS: Mapping[str, type[Config]] = {
    cls.section: cls
    for cls in (TrainingConfig, TrainerConfig, SamplerConfig, CheckpointConfig, GatewaySettings)
}
"""The settings of each kind of process, by the name of its section."""

__all__ = [
    "LINK_ADDRESS",
    "SECTIONS",
    "CalledConfig",
    "CheckpointConfig",
    "Config",
    "ConfigError",
    "GatewaySettings",
    "SamplerConfig",
    "ServerConfig",
    "TrainerConfig",
    "TrainingConfig",
    "limits_from",
]
