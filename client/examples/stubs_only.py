"""The whole loop on the generated stubs and numpy: what any gRPC client in any language does.

tinsmith up --base-model FOLDER            # in one terminal
python client/examples/stubs_only.py       # in another
"""

import argparse
import os

import grpc
import numpy as np

from tinsmith.v1 import (
    checkpoint_service_pb2,
    checkpoint_service_pb2_grpc,
    sampler_service_pb2,
    sampler_service_pb2_grpc,
    training_service_pb2,
    training_service_pb2_grpc,
    types_pb2,
)

TOKENS = np.array([11, 22, 33, 44, 55, 66, 77, 88])


def ints(values) -> types_pb2.Tensor:
    array = np.asarray(values, "<i8")
    return types_pb2.Tensor(dtype=types_pb2.DTYPE_INT64, shape=array.shape, data=array.tobytes())


def floats(values) -> types_pb2.Tensor:
    array = np.asarray(values, "<f4")
    return types_pb2.Tensor(dtype=types_pb2.DTYPE_FLOAT32, shape=array.shape, data=array.tobytes())


def model_input(tokens) -> types_pb2.ModelInput:
    return types_pb2.ModelInput(chunks=[types_pb2.ModelInputChunk(tokens=ints(tokens))])


def sample(sampler, checkpoint_path) -> list[int]:
    request = sampler_service_pb2.SampleRequest(
        checkpoint_path=checkpoint_path,
        prompt=model_input(TOKENS[:1]),
        sampling_params=sampler_service_pb2.SamplingParams(
            max_tokens=len(TOKENS) - 1,
            temperature=0,
            stop=sampler_service_pb2.StopCondition(),
        ),
    )
    sampled = []
    for response in sampler.Sample(request):
        for delta in response.deltas:
            sampled.extend(np.frombuffer(delta.tokens.data, "<i8").tolist())
    return sampled


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--address", default=os.environ.get("TINSMITH_ADDRESS", "127.0.0.1:50051"))
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    args = parser.parse_args()

    training = training_service_pb2_grpc.TrainingServiceStub(grpc.insecure_channel(args.address))
    cluster = training.GetCapabilities(training_service_pb2.GetCapabilitiesRequest())
    host = args.address.rpartition(":")[0]
    sampler = sampler_service_pb2_grpc.SamplerServiceStub(
        grpc.insecure_channel(host + cluster.sampler_address)
    )
    checkpoints = checkpoint_service_pb2_grpc.CheckpointServiceStub(
        grpc.insecure_channel(host + cluster.checkpoint_address)
    )

    request = training_service_pb2.CreateModelRequest(
        lora_config=types_pb2.LoraConfig(rank=8, seed=0)  # on the one base model that there is
    )
    model_id = training.CreateModel(request).model.model_id
    datum = types_pb2.Datum(
        model_input=model_input(TOKENS[:-1]),
        loss_fn_inputs={
            "target_tokens": ints(TOKENS[1:]),
            "weights": floats(np.ones(len(TOKENS) - 1)),
        },
    )
    loss_fn = types_pb2.LossFn(cross_entropy=types_pb2.CrossEntropyLoss())
    seq_id = 0
    for step in range(args.steps):
        seq_id += 1  # every call that changes the model carries the next number
        call = training_service_pb2.ForwardBackwardRequest(
            model_id=model_id, seq_id=seq_id, loss_fn=loss_fn, data=[datum]
        )
        for response in training.ForwardBackward(iter([call])):
            for output in response.outputs:
                logprobs = np.frombuffer(output.loss_fn_outputs["logprobs"].data, "<f4")
        seq_id += 1
        training.OptimStep(
            training_service_pb2.OptimStepRequest(
                model_id=model_id,
                seq_id=seq_id,
                adam_params=types_pb2.AdamParams(learning_rate=args.learning_rate),
            )
        )
        loss = response.metrics["loss:sum"]
        print(f"step {step + 1}  loss {loss:.3f}  first logprob {logprobs[0]:.3f}")

    saved = training.SaveCheckpoint(
        training_service_pb2.SaveCheckpointRequest(
            model_id=model_id,
            seq_id=seq_id + 1,
            kind=types_pb2.CHECKPOINT_KIND_SAMPLER,
            name="stubs-only",
        )
    )
    sampled = sample(sampler, saved.checkpoint_path)
    print(f"after {TOKENS[0]} comes {sampled}")
    checkpoints.DeleteCheckpoint(
        checkpoint_service_pb2.DeleteCheckpointRequest(checkpoint_path=saved.checkpoint_path)
    )
    training.DeleteModel(training_service_pb2.DeleteModelRequest(model_id=model_id))


if __name__ == "__main__":
    main()
