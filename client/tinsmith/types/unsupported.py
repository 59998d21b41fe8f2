"""Parts of Tinker's API that Tinsmith does not have: using one says so at once, by its name.

Each of these names is there to be imported and to stand in annotations.
"""

from collections.abc import Mapping
from typing import Any

from tinsmith.errors import unsupported


class Unsupported:
    """Cannot be made."""

    _why = ""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        raise unsupported(type(self).__name__, self._why)


class Absent:
    """Stands where Tinker has an object of its own: to use it raises UnimplementedError.

    To read the attribute that it is the value of does not: whoever lists attributes would trip.
    """

    def __init__(self, name: str, why: str) -> None:
        self._name, self._why = name, why

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        raise unsupported(f"{self._name}.{name}", self._why)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Raise, as `holder()` does."""
        raise unsupported(self._name, self._why)


class Holder(Absent):
    """What `ServiceClient.holder` is: other clients are made with it, and it has nothing else.

    Attributes:
        connection: The cluster's, for this package alone.
    """

    def __init__(self, connection: Any) -> None:
        super().__init__("holder", "what a client holds is its own; tinsmith.v1 has the stubs")
        self.connection = connection


class ImageChunk(Unsupported):
    """Tinker's image in a prompt; raises UnimplementedError."""

    _why = "images are not supported, text is"


class ImageAssetPointerChunk(Unsupported):
    """Tinker's stored image in a prompt; raises UnimplementedError."""

    _why = "images are not supported, text is"


class DmelChunk(Unsupported):
    """Tinker's audio in a prompt; raises UnimplementedError."""

    _why = "audio is not supported, text is"


CHUNKS: Mapping[str, type[Unsupported]] = {
    "image": ImageChunk,
    "image_asset_pointer": ImageAssetPointerChunk,
    "dmel": DmelChunk,
}
"""By the `type` of a chunk."""


class DimuonOptimizerConfig(Unsupported):
    """Tinker's choice of the Dimuon optimizer; raises UnimplementedError."""

    _why = "the optimizer is not supported, AdamW is"


class DimuonParams(Unsupported):
    """Settings of a Dimuon step; raises UnimplementedError."""

    _why = "the optimizer is not supported, AdamW is"


_NAMES: Mapping[str, str] = {
    "there is no billing": """
        BillingEventInfo BillingUsageEvent BillingUsageResponse BillingUsageSession
        CheckpointBillingEvent
        GetBillingUsageRequest GetCurrentCheckpointStorageUsageRequest SamplingPrefillBillingEvent
        SamplingSampleBillingEvent StorageBillingEvent TrainingBillingEvent""",
    "there is no audit log; the servers log who asked for what": """
        AuditLogEntry AuditLogResponse AuditLogEventType""",
    "sessions have no status here": """
        ActiveSessionStatusQuery CancelledSessionStatusQuery
        ClientFinishedSessionStatusQuery ClientSessionFinishErrored ClientSessionFinishInterrupted
        ClientSessionFinishReason
        ClientSessionFinishReasonType ClientSessionFinishSuccess ClientSessionFinished
        FailedSessionStatusQuery SessionActive SessionCancelled
        SessionFailed SessionFailedReason SessionFailedRequestReason
        SessionFailedSamplingSessionReason SessionFailedTrainingRunReason
        SessionStatus SessionStatusQuery""",
    "a search finds what the caller sees": """
        UserSearchOwner""",
    "losses are not uploaded; forward_backward_custom takes the function itself": """
        CreateCustomLossRequest CreateCustomLossResponse CustomLossGraph
        CustomLossInputRank CustomLossJson CustomLossNode""",
    "there is no telemetry": """
        EventType GenericEvent SessionEndEvent SessionStartEvent Severity TelemetryBatch
        TelemetryEvent TelemetryResponse TelemetrySendRequest UnhandledExceptionEvent""",
    "this client speaks gRPC, in the messages of tinsmith.v1": """
        AuthTokenResponse ClientConfigRequest ClientConfigResponse ClientDynamicConfigResponse
        CopyWeightsRequest CopyWeightsResponse CreateModelRequest CreateModelResponse
        CreateSamplingSessionRequest CreateSamplingSessionResponse CreateSessionRequest
        CreateSessionResponse ForwardRequest FutureCompletion FutureFailed FutureFinished
        FutureRetrieveRequest FutureRetrieveResponse FuturesRetrieveRequest FuturesRetrieveResponse
        GetInfoRequest HealthResponse JoinSamplingSessionRequest JoinSamplingSessionResponse
        LoadWeightsRequest RequestFailedResponse RequestOptions
        SamplingSessionFuturesTarget SaveWeightsExternalRequest SaveWeightsExternalResponseInternal
        SaveWeightsForSamplerRequest SaveWeightsForSamplerResponseInternal SaveWeightsRequest
        SessionHeartbeatRequest SessionHeartbeatResponse Timeout TryAgainResponse
        UnloadModelRequest UntypedAPIFuture""",
}

UNSUPPORTED: Mapping[str, type[Unsupported]] = {
    name: type(name, (Unsupported,), {"__doc__": f"Tinker's; {why}.", "_why": why})
    for why, names in _NAMES.items()
    for name in names.split()
}
"""Types that only programs which speak Tinker's HTTP themselves make, by name."""
