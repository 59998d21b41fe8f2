"""Settings: where they come from, and that a typo stops the process."""

from pathlib import Path

import pytest

from tinsmithd.config import (
    SECTIONS,
    CheckpointConfig,
    ConfigError,
    SamplerConfig,
    TrainerConfig,
    TrainingConfig,
)


def test_later_sources_win(tmp_path: Path) -> None:
    """Default, file, environment, flag."""
    file = tmp_path / "config.toml"
    file.write_text("[training]\nmodels_max = 2\nrank_max = 3\nlane_calls_max = 4\n")
    env = {
        "TINSMITH_CONFIG": str(file),
        "TINSMITH_TRAINING_RANK_MAX": "30",
        "TINSMITH_TRAINING_LANE_CALLS_MAX": "40",
    }
    config = TrainingConfig.load(["--lane-calls-max", "400"], env)
    default = TrainingConfig().data_per_call_max
    assert (config.models_max, config.rank_max, config.lane_calls_max) == (2, 30, 400)
    assert config.data_per_call_max == default


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[training]\nmodel_max = 2\n", "unknown key training.model_max"),
        ("[traning]\nmodels_max = 2\n", r"unknown section \[traning\]"),
        ("[training]\nmodels_max = 'many'\n", "training.models_max: 'many' is not a int"),
        ("[training\n", "config.toml"),
    ],
)
def test_a_bad_file_is_refused(tmp_path: Path, text: str, message: str) -> None:
    """Naming the key."""
    file = tmp_path / "config.toml"
    file.write_text(text)
    with pytest.raises(ConfigError, match=message):
        TrainingConfig.load(["--config", str(file)], {})


def test_an_unknown_variable_is_refused() -> None:
    """A typo in the environment must not run with a default."""
    with pytest.raises(ConfigError, match="TINSMITH_SAMPLER_BASE_MODLE: unknown key"):
        SamplerConfig.load([], {"TINSMITH_SAMPLER_BASE_MODLE": "x"})


@pytest.mark.parametrize(
    ("section", "argv", "message"),
    [
        (TrainerConfig, [], "trainer.base_model"),
        (TrainerConfig, ["--base-model", "x", "--engine", "jax"], "trainer.engine"),
        (TrainerConfig, ["--base-model", "x", "--zero-stage", "4"], "trainer.zero_stage"),
        (SamplerConfig, [], "sampler.base_model"),
        (SamplerConfig, ["--base-model", "x", "--dtype", "int8"], "sampler.dtype"),
        (SamplerConfig, ["--base-model", "x", "--adapters-max", "1"], "sampler.adapters_max"),
        (TrainingConfig, ["--spawn-ranks", "1"], "training.spawn_base_model"),
        (TrainingConfig, ["--link-address", "0.0.0.0:50054"], "training.link_secret_file"),
        (TrainingConfig, ["--link-address", "50054"], "training.link_address"),
        (TrainerConfig, ["--base-model", "x", "--ranks", "0"], "trainer.ranks"),
        (TrainingConfig, ["--listen-address", "here"], "training.listen_address"),
        (TrainingConfig, ["--listen-address", "127.0.0.1:70000"], "training.listen_address"),
        (CheckpointConfig, ["--metrics-address", "9090"], "checkpoint.metrics_address"),
        (CheckpointConfig, ["--sweep-interval-s", "-1"], "checkpoint.sweep_interval_s"),
        (CheckpointConfig, ["--log-level", "LOUD"], "checkpoint.log_level"),
    ],
)
def test_impossible_values_are_refused(section: type, argv: list[str], message: str) -> None:
    """Before anything starts."""
    with pytest.raises(ConfigError, match=message):
        section.load(argv, {})


def test_every_section_has_its_class() -> None:
    """The names of sections are the names of the processes."""
    assert set(SECTIONS) == {"training", "trainer", "sampler", "checkpoint"}
