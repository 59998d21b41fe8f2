"""What the client package offers, and what it must not load."""

import pickle
import subprocess
import sys

import numpy as np
import pytest

import tinsmith
from tinsmith import types
from tinsmith.addresses import service_address


def test_every_public_name_is_there() -> None:
    """`__all__` promises nothing that is missing and lists nothing twice."""
    for module in (tinsmith, types):
        assert len(set(module.__all__)) == len(module.__all__)
        assert [name for name in module.__all__ if not hasattr(module, name)] == []


def test_the_import_is_light() -> None:
    """Importing the client loads no torch and no transformers."""
    code = "import sys, tinsmith; print('torch' in sys.modules, 'transformers' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False"]


@pytest.mark.parametrize(
    "name",
    ["ImageChunk", "ImageAssetPointerChunk", "DmelChunk", "DimuonParams", "DimuonOptimizerConfig"],
)
def test_what_is_not_supported_says_so_by_name(name: str) -> None:
    """Never silence."""
    with pytest.raises(tinsmith.UnimplementedError, match=name) as refusal:
        getattr(types, name)(data=b"")
    assert refusal.value.field == name


def test_errors_survive_pickling() -> None:
    """They cross process pools."""
    for kind in (tinsmith.InvalidArgumentError, tinsmith.UnavailableError, tinsmith.InternalError):
        error = pickle.loads(pickle.dumps(kind("text", reason="R", field="f", request_id="i")))
        assert type(error) is kind
        assert (str(error), error.reason, error.field, error.request_id) == ("text", "R", "f", "i")


def test_tinkers_names_of_errors_catch_ours() -> None:
    """`except` clauses of a Tinker script work."""
    assert issubclass(tinsmith.ResourceExhaustedError, tinsmith.RateLimitError)
    assert issubclass(tinsmith.InvalidArgumentError, tinsmith.BadRequestError)
    assert issubclass(tinsmith.InvalidArgumentError, ValueError)
    assert issubclass(tinsmith.UnavailableError, tinsmith.TinkerError)


@pytest.mark.parametrize(
    ("given", "address"),
    [
        ("host:1234", "host:1234"),
        ("http://host:1234/", "host:1234"),
        (None, "from.env:7"),
    ],
)
def test_addresses(given: str | None, address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """host:port, http://host:port, or the environment."""
    monkeypatch.setenv("TINSMITH_ADDRESS", "from.env:7")
    service = tinsmith.ServiceClient(base_url=given)
    sampler = service.create_sampling_client(base_model="base").result(10)
    assert sampler._connection.address == address


def test_an_address_in_the_place_of_metadata_is_refused() -> None:
    """Tinker's first argument is metadata; whoever gives an address there reads where it goes."""
    with pytest.raises(tinsmith.InvalidArgumentError, match="given as base_url") as caught:
        tinsmith.ServiceClient("host:1234")  # type: ignore[arg-type]
    assert caught.value.field == "user_metadata"


@pytest.mark.parametrize(
    ("given", "here", "address"),
    [
        ("sampler:2", "", "sampler:2"),
        (":2", "", "host:2"),
        ("", "", "host:1"),
        ("sampler:2", "127.0.0.1:3", "127.0.0.1:3"),
    ],
)
def test_where_the_other_services_are(
    given: str, here: str, address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the environment says, else as the Training server does."""
    monkeypatch.setenv("TINSMITH_ADDRESS_SAMPLER", here)
    assert service_address("sampler", "host:1", given) == address
    assert service_address("checkpoint", "host:1", ":9") == "host:9"


def test_an_address_without_a_port_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TINSMITH_ADDRESS_CHECKPOINT", "somewhere")
    with pytest.raises(ValueError, match="TINSMITH_ADDRESS_CHECKPOINT: 'somewhere' is not host"):
        service_address("checkpoint", "host:1", ":9")


def test_a_sampling_client_can_be_pickled() -> None:
    """It takes its address, base model and path along."""
    service = tinsmith.ServiceClient(base_url="host:1234")
    sampler = service.create_sampling_client(base_model="base").result(10)
    copy = pickle.loads(pickle.dumps(sampler))
    assert copy._connection.address == "host:1234"
    assert (copy.get_base_model(), copy.model_path) == ("base", None)


def test_a_closed_client_says_so() -> None:
    """It does not wait for a service that it will not call."""
    with tinsmith.ServiceClient(base_url="127.0.0.1:1") as service:
        sampler = service.create_sampling_client(base_model="base").result(10)
    with pytest.raises(tinsmith.FailedPreconditionError) as refusal:
        sampler.sample(tinsmith.ModelInput.from_ints([1])).result(10)
    assert refusal.value.reason == "CLIENT_CLOSED"


# --- tensors and data -----------------------------------------------------------------------------


def test_lists_take_the_dtype_of_their_name() -> None:
    """And a list under an unknown name is refused."""
    prompt = tinsmith.ModelInput.from_ints([1, 2])
    datum = tinsmith.Datum(prompt, {"target_tokens": [2, 3], "weights": [1, 0]})
    assert datum.loss_fn_inputs["target_tokens"].dtype == "int64"
    assert datum.loss_fn_inputs["weights"].dtype == "float32"
    with pytest.raises(KeyError, match="other"):
        tinsmith.Datum(prompt, {"other": [1, 2]})


@pytest.mark.parametrize("bad", ["text", np.array([1j]), [[1], [2, 3]], [None], {"a": 1}, [2**70]])
def test_what_is_no_tensor_is_refused(bad: object) -> None:
    """Text, complex numbers, ragged lists, and what no array can hold."""
    with pytest.raises(tinsmith.InvalidArgumentError):
        tinsmith.TensorData(bad)  # type: ignore[arg-type]


def test_bfloat16_becomes_float32() -> None:
    """numpy has no bfloat16."""
    torch = pytest.importorskip("torch")
    tensor = tinsmith.TensorData.from_torch(torch.tensor([1.5, -2.0], dtype=torch.bfloat16))
    assert tensor.dtype == "float32"
    assert tensor.tolist() == [1.5, -2.0]
    assert tensor.to_torch().dtype == torch.float32
