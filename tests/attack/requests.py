"""Requests of every method of every server: valid ones, and bytes made from their descriptors."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import grpc
import numpy as np
from google.protobuf.descriptor import Descriptor, FieldDescriptor
from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass

from clusters import RunningCluster
from tinsmith import tensors
from tinsmith import v1 as pb
from tinsmith.keys import Metadata
from tinsmith.v1 import (
    checkpoint_service_pb2,
    sampler_service_pb2,
    training_service_pb2,
    types_pb2,
)

SERVICES = {
    "training": training_service_pb2.DESCRIPTOR.services_by_name["TrainingService"],
    "sampler": sampler_service_pb2.DESCRIPTOR.services_by_name["SamplerService"],
    "checkpoint": checkpoint_service_pb2.DESCRIPTOR.services_by_name["CheckpointService"],
}
LOSS = pb.LossFn(cross_entropy=pb.CrossEntropyLoss())
DEADLINE_S = 20.0


@dataclass(frozen=True)
class Method:
    """One RPC of one server.

    Attributes:
        server: The server's name.
        path: `/package.Service/Method`.
        request: The type of its requests.
    """

    server: str
    path: str
    request: Descriptor

    @property
    def name(self) -> str:
        """Without the service."""
        return self.path.rpartition("/")[2]


ENDLESS = {"WatchCheckpoints"}
"""Names of methods whose answer has no end: its first message shows that a request is taken."""


def every_method() -> list[Method]:
    """All of all servers."""
    return [
        Method(server, f"/{service.full_name}/{method.name}", method.input_type)
        for server, service in SERVICES.items()
        for method in service.methods
    ]


def tokens_of(values: Sequence[int]) -> types_pb2.ModelInput:
    """A model input of one chunk."""
    chunk = types_pb2.ModelInputChunk(tokens=tensors.encode(np.array(values)))
    return types_pb2.ModelInput(chunks=[chunk])


def datum(length: int = 3) -> types_pb2.Datum:
    """One for cross entropy."""
    inputs = {"target_tokens": np.ones(length, np.int64), "weights": np.ones(length, np.float32)}
    packed = {name: tensors.encode(array) for name, array in inputs.items()}
    return pb.Datum(model_input=tokens_of([1] * length), loss_fn_inputs=packed)


def valid_requests(model_id: str, path: str) -> dict[str, Message]:
    """By method: a request with every part set that can be set beside the others.

    Args:
        model_id: A model whose number 1 is free.
        path: A TRAINING checkpoint.
    """
    lora = pb.LoraConfig(rank=2, seed=1)
    stop = sampler_service_pb2.StopCondition(tokens=[2], strings=["x"])
    params = pb.SamplingParams(max_tokens=2, seed=1, temperature=0.5, top_p=0.9, top_k=5, stop=stop)
    compute = {"seq_id": 1, "loss_fn": LOSS, "data": [datum(), datum(2)], "acknowledge": True}
    header = pb.WriteCheckpointHeader(checkpoint_path=path, base_model="tiny", lora_config=lora)
    header.user_metadata["a"] = "b"
    update = pb.UpdateCheckpointRequest(
        checkpoint_path=path, ttl=Duration(seconds=1000), user_metadata={"a": "b"}
    )
    update.update_mask.paths.append("user_metadata")
    requests = [
        pb.ForwardBackwardRequest(model_id=model_id, **compute),
        pb.ForwardRequest(model_id=model_id, **compute),
        pb.OptimStepRequest(
            model_id=model_id, seq_id=1, adam_params=pb.AdamParams(learning_rate=1e-3)
        ),
        pb.SaveCheckpointRequest(
            model_id=model_id, seq_id=1, kind=1, name="a", user_metadata={"a": "b"}
        ),
        pb.LoadCheckpointRequest(
            model_id=model_id, seq_id=1, checkpoint_path=path, with_optimizer=True
        ),
        pb.GetAnswerRequest(model_id=model_id, seq_id=1, call_digest=bytes(32)),
        pb.CreateModelRequest(
            lora_config=lora, user_metadata={"a": "b"}, model_id="a:train:1", request_id="r"
        ),
        pb.GetModelRequest(model_id=model_id),
        pb.ListModelsRequest(page_size=2, page_token="7"),
        pb.ListStepsRequest(model_id=model_id, page_size=2, page_token="7"),
        pb.DeleteModelRequest(model_id="absent"),
        pb.SampleRequest(
            prompt=tokens_of([1, 2, 3]),
            sampling_params=params,
            num_samples=2,
            include_prompt_logprobs=True,
            topk_prompt_logprobs=2,
            prompt_logprobs_last_n=1,
            target_prompt_logprobs=tensors.encode(np.array([[4, -1], [-1, 5]])),
            prompt_alt_tokens_k=2,
            topk_sample_logprobs=2,
        ),
        pb.ComputeLogprobsRequest(
            prompt=tokens_of([1, 2, 3]), topk_prompt_logprobs=2, prompt_logprobs_last_n=1
        ),
        pb.GetTokenizerRequest(),
        pb.GetCheckpointRequest(checkpoint_path=path),
        pb.ListCheckpointsRequest(model_id=model_id, kind=1, page_size=2, page_token="7"),
        update,
        pb.DeleteCheckpointRequest(checkpoint_path="tinsmith://absent/weights/x"),
        pb.CopyCheckpointRequest(
            source_checkpoint_path=path,
            destination_checkpoint_path=path + "-copy",
            ttl=Duration(seconds=9),
        ),
        pb.ReadCheckpointRequest(checkpoint_path=path, file_names=["model_state.json"]),
        pb.WriteCheckpointRequest(header=header),
        pb.ExportCheckpointRequest(checkpoint_path=path, format=1),
    ]
    by_type = {request.DESCRIPTOR.full_name: request for request in requests}
    return {
        method.name: by_type.get(method.request.full_name) or GetMessageClass(method.request)()
        for method in every_method()
    }


class Caller:
    """Sends bytes to any method of a cluster; a context manager."""

    def __init__(self, cluster: RunningCluster) -> None:
        options = [("grpc.max_send_message_length", -1), ("grpc.max_receive_message_length", -1)]
        self._channels = {
            name: grpc.insecure_channel(address, options=options)
            for name, address in cluster.addresses.items()
        }

    def call(
        self, method: Method, *messages: bytes, metadata: Metadata = ()
    ) -> grpc.RpcError | list[bytes]:
        """Send messages; returns what came back, or the error that ended it."""
        call = self._channels[method.server].stream_stream(method.path)
        try:
            answers = call(iter(messages), timeout=DEADLINE_S, metadata=metadata)
            if method.name in ENDLESS:
                first = next(answers)
                answers.cancel()
                return [first]
            return list(answers)
        except grpc.RpcError as error:
            return error

    def close(self) -> None:
        """Close all channels."""
        for channel in self._channels.values():
            channel.close()

    def __enter__(self) -> "Caller":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


# --- bytes ------------------------------------------------------------------------------------

FieldPath = tuple[FieldDescriptor, ...]
"""Fields from a request down, each of the one before."""


def paths(descriptor: Descriptor, before: FieldPath = ()) -> Iterator[FieldPath]:
    """Every field at every level of a message."""
    for field in descriptor.fields:
        yield (*before, field)
        if field.message_type is not None:
            yield from paths(field.message_type, (*before, field))


def varint(number: int) -> bytes:
    """A number as the wire has it."""
    out = bytearray()
    while number > 127:
        out.append(number & 127 | 128)
        number >>= 7
    return bytes([*out, number])


def length_delimited(number: int, content: bytes) -> bytes:
    """A field of a number with so much content."""
    return varint(number << 3 | 2) + varint(len(content)) + content


def wrapped(path: FieldPath, content: bytes) -> bytes:
    """Content of the message in which the last field of a path is, as bytes of the request."""
    for field in reversed(path[:-1]):
        content = length_delimited(field.number, content)  # the key of a map is the empty one
    return content


_FIXED = {
    FieldDescriptor.TYPE_DOUBLE: 8,
    FieldDescriptor.TYPE_FIXED64: 8,
    FieldDescriptor.TYPE_FLOAT: 4,
    FieldDescriptor.TYPE_FIXED32: 4,
}


def bomb(path: FieldPath, count: int) -> bytes:
    """A request in which the last field of a path is there so many times, as small as can be."""
    field = path[-1]
    if field.message_type is not None and field.message_type.GetOptions().map_entry:
        keys = (b"\x0a\x06%06x" % i for i in range(count))
        return wrapped(path, b"".join(length_delimited(field.number, key) for key in keys))
    if field.message_type is not None or field.type in (
        FieldDescriptor.TYPE_STRING,
        FieldDescriptor.TYPE_BYTES,
    ):
        return wrapped(path, length_delimited(field.number, b"") * count)
    return wrapped(path, length_delimited(field.number, bytes(count * _FIXED.get(field.type, 1))))
