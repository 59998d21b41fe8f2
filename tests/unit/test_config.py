"""Settings: where they come from, and that a typo stops the process."""

import re
from dataclasses import dataclass
from pathlib import Path

import pytest

import tinsmith
from tinsmithd.config import (
    SECTIONS,
    CheckpointConfig,
    ConfigError,
    GatewaySettings,
    SamplerConfig,
    TrainerConfig,
    TrainingConfig,
    limits_from,
)
from tinsmithd.config.sources import SECTION_NAMES


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
        (
            "[training]\nmodel_max = 2\n",
            r"toml:2: unknown key training\.model_max; did you mean models_max\?",
        ),
        (
            "[traning]\nmodels_max = 2\n",
            r"toml: unknown section \[traning\]; did you mean training\?",
        ),
        (
            "[training]\nmodels_max = 'many'\n",
            r"training\.models_max: must be a whole number, is 'many' \(.*toml:2\)$",
        ),
        (
            "[training]\n# models_max\nrank_max = 1\nmodels_max = true\n",
            r"training\.models_max: must be a whole number, is True \(.*toml:4\)$",
        ),
        (
            "training.quantum_tokens = 0\n",
            r"training\.quantum_tokens: must be at least 1, is 0 \(.*toml:1\)$",
        ),
        ("[training]\ndata_folder = 3\n", r"training\.data_folder: must be a text, is 3"),
        ("training = 3\n", r"training must be a section, \[training\]"),
        ("[training\n", r"config\.toml: "),
    ],
)
def test_a_bad_file_is_refused(tmp_path: Path, text: str, message: str) -> None:
    """Naming the key."""
    file = tmp_path / "config.toml"
    file.write_text(text)
    with pytest.raises(ConfigError, match=message):
        TrainingConfig.load(["--config", str(file)], {})


@pytest.mark.parametrize("name", ["absent.toml", "."])
def test_a_file_that_is_not_there_is_refused(tmp_path: Path, name: str) -> None:
    """Whoever names one means it; a folder is none."""
    with pytest.raises(ConfigError, match="is no file"):
        TrainingConfig.load([], {"TINSMITH_CONFIG": str(tmp_path / name)})


@pytest.mark.parametrize(
    ("variable", "message"),
    [
        (
            "TINSMITH_SAMPLER_BASE_MODLE",
            r"BASE_MODLE: unknown key; did you mean TINSMITH_SAMPLER_BASE_MODEL\?",
        ),
        ("TINSMITH_SAMPLER_ZZ", "ZZ: unknown key; known are TINSMITH_SAMPLER_LOG_LEVEL, "),
        (
            "TINSMITH_SAMPELR_BASE_MODEL",
            r"unknown section; did you mean TINSMITH_SAMPLER_BASE_MODEL\?",
        ),
        (
            "TINSMITH_SAMPLER_RANK_MAX",
            r"must be a whole number, is 'x' \(TINSMITH_SAMPLER_RANK_MAX",
        ),
    ],
)
def test_a_wrong_variable_is_refused(variable: str, message: str) -> None:
    """A typo in the environment must not run with a default."""
    with pytest.raises(ConfigError, match=message):
        SamplerConfig.load(["--base-model", "b"], {variable: "x"})


def test_variables_of_others_are_left_alone() -> None:
    """Those of other processes, of the client and of tests."""
    env = {
        "TINSMITH_TRAINER_NO_SUCH": "1",
        "TINSMITH_ADDRESS_SAMPLER": "a:1",
        "TINSMITH_TEST_THREADS": "2",
        "TINSMITH_STORE_FD": "3",
        "tinsmith_sampler_threads": "4",
        "THREADS": "5",
    }
    assert SamplerConfig.load(["--base-model", "b"], env) == SamplerConfig(base_model="b")


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (
            ["--lane-calls-mx", "3"],
            r"--lane-calls-mx: unknown flag; did you mean --lane-calls-max\?",
        ),
        (["--lane-calls=3"], r"--lane-calls: unknown flag"),
        (["3"], "3: unknown flag; known are --config, "),
        (["--lane-calls-max"], "--lane-calls-max: expected one argument"),
        (["--lane-calls-max", "1.5"], r"must be a whole number, is '1.5' \(--lane-calls-max\)"),
        (["--peer-share-max", "nan"], "peer_share_max: must be a number, is 'nan'"),
        (["--peer-share-max", "2"], "peer_share_max: must be above 0 and at most 1, is '2'"),
        (["--rank-lease-s", "0.5"], "rank_lease_s: must be at least 1, is '0.5'"),
        (["--durability", "all"], "durability: must be one of fsync, async, none, is 'all'"),
        (["--spawn-engine", "jax"], "spawn_engine: must be one of deepspeed, reference, is 'jax'"),
    ],
)
def test_a_wrong_flag_is_refused(argv: list[str], message: str) -> None:
    """With what was meant, or what is allowed."""
    with pytest.raises(ConfigError, match=message):
        TrainingConfig.load(argv, {})


def test_everything_that_is_wrong_is_said_at_once() -> None:
    """Nobody mends settings one start at a time."""
    with pytest.raises(ConfigError) as refused:
        TrainingConfig.load(["--rank-max", "-1"], {"TINSMITH_TRAINING_LOG_LEVEL": "x"})
    assert [part.partition(":")[0] for part in str(refused.value).split("; ")] == [
        "training.log_level",
        "training.rank_max",
    ]


@pytest.mark.parametrize("text", ["null", "None", "[1,2]", "a,b", "{}", "", " x ", "-"])
def test_a_text_is_taken_as_it_is(text: str) -> None:
    """From the command line and the environment."""
    by_flag = TrainingConfig.load([f"--data-folder={text}"], {})
    by_variable = TrainingConfig.load([], {"TINSMITH_TRAINING_DATA_FOLDER": text})
    assert by_flag.data_folder == by_variable.data_folder == text


def test_settings_built_in_code_are_checked_and_take_nothing_from_outside(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """They are frozen, as loaded ones are."""
    monkeypatch.setenv("TINSMITH_TRAINING_RANK_MAX", "3")
    config = TrainingConfig()
    assert config.rank_max == 256
    with pytest.raises(ValueError, match="frozen"):
        config.rank_max = 4
    with pytest.raises(
        ConfigError, match=r"training\.rank_mux: unknown key; did you mean rank_max"
    ):
        TrainingConfig(rank_mux=4)
    with pytest.raises(ConfigError, match=r"checkpoint\.lease_s: must be at least 0\.5, is 0\.1"):
        CheckpointConfig(lease_s=0.1)


def test_a_secret_is_in_no_message() -> None:
    """Not in what is printed of the settings either."""
    env = {"TINSMITH_TRAINER_LAUNCH_TOKEN": "hush", "TINSMITH_TRAINER_BASE_MODEL": "b"}
    assert "hush" not in repr(TrainerConfig.load([], env))
    with pytest.raises(ConfigError, match=r"launch_token: must be a text$") as refused:
        TrainerConfig(base_model="b", launch_token=b"hush\xff")
    assert "hush" not in str(refused.value)


def test_addresses_that_others_reach_are_warned_of() -> None:
    """Not loopback's, and not what a port alone cannot say."""
    argv = ["--listen-address", "0.0.0.0:1", "--metrics-address", "[::1]:2", "--insecure"]
    (warning,) = CheckpointConfig.load(argv, {}).warnings()
    assert warning.startswith("listening on 0.0.0.0:1 without keys")


@pytest.mark.parametrize(
    ("section", "argv"),
    [
        (TrainingConfig, []),
        (CheckpointConfig, []),
        (SamplerConfig, ["--base-model", "b"]),
        (GatewaySettings, []),
    ],
)
def test_an_address_that_others_reach_needs_keys_or_a_word(section: type, argv: list[str]) -> None:
    """`insecure`, or a file of keys, and for who calls others a key of its own."""
    open_address = [*argv, "--listen-address", "0.0.0.0:1"]
    with pytest.raises(ConfigError, match="keys_file: must be set where other machines reach"):
        section.load(open_address, {})  # type: ignore[attr-defined]
    section.load([*open_address, "--insecure"], {})  # type: ignore[attr-defined]
    keyed = [*open_address, "--keys-file", "keys.json"]
    if section is not CheckpointConfig:
        with pytest.raises(ConfigError, match="cluster_key_file: must be set with keys_file"):
            section.load(keyed, {})  # type: ignore[attr-defined]
        keyed += ["--cluster-key-file", "cluster.key"]
    (warning,) = section.load(keyed, {}).warnings()  # type: ignore[attr-defined]
    assert warning.startswith("listening on 0.0.0.0:1 without TLS")


@pytest.mark.parametrize(
    ("section", "argv", "message"),
    [
        (TrainerConfig, [], "trainer.base_model"),
        (TrainerConfig, ["--base-model", "x", "--engine", "jax"], "trainer.engine"),
        (TrainerConfig, ["--base-model", "x", "--zero-stage", "4"], "trainer.zero_stage"),
        (SamplerConfig, [], "sampler.base_model"),
        (SamplerConfig, ["--base-model", "x", "--dtype", "int8"], "sampler.dtype"),
        (
            SamplerConfig,
            ["--base-model", "x", "--adapters-bytes-max", "1"],
            "sampler.adapters_bytes_max",
        ),
        (TrainingConfig, ["--spawn-ranks", "1"], "training.spawn_base_model"),
        (TrainingConfig, ["--link-address", "0.0.0.0:50054"], "training.link_secret_file"),
        (TrainingConfig, ["--link-address", "50054"], "training.link_address"),
        (TrainerConfig, ["--base-model", "x", "--ranks", "-1"], "trainer.ranks"),
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


@dataclass(frozen=True)
class SomeLimits:
    models_max: int
    gap_wait_s_max: float
    exact: bool = False


def test_a_table_is_read_from_each_source(tmp_path: Path) -> None:
    """A section of a section in a file, JSON in a variable, pairs or JSON on the command line."""
    file = tmp_path / "c.toml"
    file.write_text('[gateway]\n[gateway.base_models]\n"a/b" = "c"\n')
    variable, pairs = "TINSMITH_GATEWAY_BASE_MODELS", ["--base-models", "a/b=c"]
    for argv, env in [
        ([], {"TINSMITH_CONFIG": str(file)}),
        ([], {variable: '{"a/b": "c"}'}),
        (pairs, {}),
        (["--base-models", '{"a/b": "c"}'], {variable: '{"x": "y"}'}),
    ]:
        assert GatewaySettings.load(argv, env).base_models == {"a/b": "c"}
    assert GatewaySettings.load([*pairs, "--base-models", "d=e"], {}).base_models == {
        "a/b": "c",
        "d": "e",
    }
    for argv, env in [
        ([], {variable: '{"a'}),
        ([], {variable: '{"a": 1}'}),
        (["--base-models", "a"], {}),
        (["--base-models", '{"a'], {}),
    ]:
        with pytest.raises(ConfigError, match="base_models"):
            GatewaySettings.load(argv, env)


def test_limits_are_filled_in_from_settings_of_their_names() -> None:
    """A field that is no setting has to be given, so that no typo takes a default."""
    config = TrainingConfig(models_max=3)
    assert limits_from(SomeLimits, config, exact=True) == SomeLimits(3, 60.0, True)
    with pytest.raises(AttributeError, match="exact"):
        limits_from(SomeLimits, config)


def test_no_variable_of_the_client_is_a_servers() -> None:
    """`tinsmith up` sets them for the command that it runs, which may start servers itself."""
    texts = [path.read_text() for path in Path(tinsmith.__file__).parent.rglob("*.py")]
    variables = {name for text in texts for name in re.findall(r'"(TINSMITH_[A-Z_]+)"', text)}
    assert {"TINSMITH_ADDRESS", "TINSMITH_HTTP_URL", "TINSMITH_API_KEY"} <= variables
    sections = tuple(f"TINSMITH_{section.upper()}_" for section in SECTION_NAMES)
    assert [name for name in sorted(variables) if name.startswith(sections)] == []


def test_every_section_has_its_class() -> None:
    """The names of sections are the names of the processes."""
    assert tuple(SECTIONS) == SECTION_NAMES
    assert SECTION_NAMES == ("training", "trainer", "sampler", "checkpoint", "gateway")


@pytest.mark.parametrize("section", SECTIONS)
def test_every_setting_says_what_it_means(section: str) -> None:
    """In a sentence, by its own name."""
    for key, field in SECTIONS[section].model_fields.items():
        assert (field.description or "").endswith("."), f"{section}.{key}"
