"""What `tinsmith up` takes is what the settings of its processes take."""

import pytest

from tinsmithd.config import TrainerConfig, TrainingConfig
from tinsmithd.config.fields import choices_of
from tinsmithd.up import main


@pytest.mark.parametrize(
    ("kind", "key"),
    [
        (TrainerConfig, "dtype"),
        (TrainerConfig, "engine"),
        (TrainerConfig, "zero_stage"),
        (TrainingConfig, "durability"),
    ],
)
def test_a_choice_is_that_of_the_setting(
    kind: type[TrainerConfig], key: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Another one is refused with all that there are."""
    flag = f"--{key.replace('_', '-')}"
    with pytest.raises(SystemExit) as end:
        main(["up", "--base-model", "x", flag, "99"])
    said = capsys.readouterr().err
    choices = choices_of(kind.model_fields[key])
    assert end.value.code == 2
    assert choices
    assert all(str(choice) in said for choice in choices)


@pytest.mark.parametrize(
    ("option", "named"),
    [
        (["--ranks", "0"], "trainer.ranks: must be at least 1, is 0"),
        (["--threads", "-1"], "trainer.threads: must be at least 0"),
        (["--spare-groups", "-1"], "training.spawn_spare_groups: must be at least 0"),
        (["--base-model", ""], "trainer.base_model: must be set"),
    ],
)
def test_a_value_is_bounded_as_the_setting_is(
    option: list[str], named: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """The message names the setting, before anything starts."""
    with pytest.raises(SystemExit) as end:
        main(["up", "--base-model", "x", *option])
    assert end.value.code == 2
    assert named in capsys.readouterr().err
