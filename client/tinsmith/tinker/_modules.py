"""What stands under which name of Tinker's SDK."""

import types as python_types
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import tinsmith
from tinsmith import errors, futures, types
from tinsmith.admin_client import AdminClient
from tinsmith.tinker import _auth
from tinsmith.types.unsupported import UNSUPPORTED

SDK_VERSION = "0.38.0"
"""The release of the SDK whose surface this is."""


class RetryableException(Exception):  # Tinker's name
    """Tinker's; never raised."""


@dataclass(frozen=True)
class RetryConfig:
    """How Tinker's SDK retries. Taken and ignored: this client retries by itself."""

    max_connections: int | None = 1000
    progress_timeout: float = 7200
    retry_delay_base: float = 0.5
    retry_delay_max: float = 10.0
    jitter_factor: float = 0.25
    enable_retry_logic: bool = True
    enable_stuck_detection: bool = True
    retryable_exceptions: tuple[type[Exception], ...] = (
        TimeoutError,
        errors.APIConnectionError,
        RetryableException,
    )


def _public(module: python_types.ModuleType) -> dict[str, Any]:
    return {name: getattr(module, name) for name in getattr(module, "__all__", vars(module))}


_ERRORS = {
    name: value
    for name, value in vars(errors).items()
    if isinstance(value, type) and issubclass(value, Exception)
}
_TYPES = {**UNSUPPORTED, **_public(types)}
_CLIENTS = {
    "APIFuture": futures.APIFuture,
    "AwaitableConcurrentFuture": futures.APIFuture,
    "BackcompatSamplingClientFuture": tinsmith.BackcompatSamplingClientFuture,
    "BackcompatTrainingClientFuture": tinsmith.BackcompatTrainingClientFuture,
    "AdminClient": AdminClient,
    "RestClient": tinsmith.RestClient,
    "SamplingClient": tinsmith.SamplingClient,
    "ServiceClient": tinsmith.ServiceClient,
    "TrainingClient": tinsmith.TrainingClient,
    "LossHandle": types.LossHandle,
    "PerDatumLossFn": tinsmith.PerDatumLossFn,
}
_RETRY = {"RetryConfig": RetryConfig, "RetryableException": RetryableException}

_CLIENT_MODULES = """
    admin_client api_future backcompat_client_future backcompat_sampling_client_future
    backcompat_training_client_future custom_loss rest_client sampling_client service_client
    training_client
"""

_TYPE_MODULES = """
    audit_log_entry audit_log_response billing_usage_request billing_usage_response checkpoint
    checkpoints_list_response create_model_request create_model_response cursor custom_loss_graph
    custom_loss_input datum dmel_chunk encoded_text_chunk external_weights_urls_response
    forward_backward_input forward_backward_output forward_backward_request get_info_response
    get_sampler_response get_server_capabilities_response get_session_response
    image_asset_pointer_chunk image_chunk list_sessions_response load_weights_response lora_config
    loss_fn_inputs loss_fn_output loss_fn_type model_id model_input model_input_chunk
    optim_step_request optim_step_response optimizer prompt_alt_tokens provenance_spans
    request_error_category request_failed_response request_id sample_request sample_response
    sampled_sequence sampling_client_kind sampling_params save_weights_external_response
    save_weights_for_sampler_response save_weights_response search_owner session_search_request
    session_search_response session_status session_status_query session_summary stop_reason
    tensor_data tensor_dtype topk_logprobs training_run training_runs_response
    unload_model_response weights_info_response whoami_response
"""

MODULES: Mapping[str, Mapping[str, Any]] = {
    "tinker": {**_TYPES, **_ERRORS, **_public(tinsmith), **_CLIENTS, "__version__": SDK_VERSION},
    "tinker._exceptions": _ERRORS,
    "tinker._version": {"__version__": SDK_VERSION, "__title__": "tinker"},
    "tinker.auth": _public(_auth),
    "tinker.lib": {},
    "tinker.lib.public_interfaces": _CLIENTS,
    **{f"tinker.lib.public_interfaces.{name}": _CLIENTS for name in _CLIENT_MODULES.split()},
    "tinker.lib.api_future_impl": _CLIENTS,
    "tinker.lib.retry_handler": _RETRY,
    "tinker.lib.retryable_exception": _RETRY,
    "tinker.types": _TYPES,
    **{f"tinker.types.{name}": _TYPES for name in _TYPE_MODULES.split()},
}
"""Names of each module. A module of types has all of them, whichever it is named for."""
