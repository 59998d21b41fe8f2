"""A user's script outside of a cluster: it trains and samples until its standard input ends.

Arguments: a seed, the gateway to sample through (`-`: the Sampler), and, for a run that does as
much as another one did, how many steps and draws; the other one pauses after each, as a user's
program computes. A JSON object per line: the steps as they are done, what was sampled of them, then
what came of it all.
"""

import hashlib
import os
import sys
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path

import openai
from worker import batch, say

import tinsmith
from tinsmith import types
from tinsmith import v1 as pb
from tinsmith.cluster import connect

PROMPT = [1, 2, 3]
TOKENS = 8
DATA, TRAINED_TOKENS = 2, 16
SAMPLED_EVERY = 4
"""Steps after which the weights go to the Sampler."""
PAUSE_S = 0.5
RETRIES = 60
"""OpenAI's client asks again so often, up to 8 s later each time."""


class Enough:
    """How much is done of something: a given number, or until standard input ends."""

    over = threading.Event()

    def __init__(self, count: int | None) -> None:
        self._count = count

    @classmethod
    def listen(cls) -> None:
        """Wait for the end of standard input, in a thread that nobody waits for."""

        def read() -> None:
            while os.read(0, 1024):
                pass
            cls.over.set()

        threading.Thread(target=read, daemon=True).start()

    def is_done(self, done: int) -> bool:
        """Whether so much is enough; pauses where nothing was given."""
        if self._count is None:
            return self.over.wait(PAUSE_S)
        return done >= self._count or self.over.is_set()


def through_sampler(service: tinsmith.ServiceClient, name: str) -> Callable[[int], object]:
    """Draws what a seed gives of the base model; by gRPC."""
    sampler = service.create_sampling_client(base_model=name).result()
    return lambda seed: sampled(sampler, seed, 1)


def sampled(sampler: tinsmith.SamplingClient, seed: int, count: int) -> object:
    """Tokens of samples of the prompt."""
    prompt = types.ModelInput.from_ints(PROMPT)
    params = types.SamplingParams(max_tokens=TOKENS, seed=seed, temperature=1.0)
    made = sampler.sample(prompt, num_samples=count, sampling_params=params).result()
    return [sequence.tokens for sequence in made.sequences]


def through_gateway(url: str, name: str) -> Callable[[int], object]:
    """The same, by OpenAI's own client."""
    client = openai.OpenAI(
        base_url=url, api_key=os.environ["TINSMITH_API_KEY"], max_retries=RETRIES, timeout=120
    )

    def draw(seed: int) -> object:
        made = client.completions.create(
            model=name, prompt=PROMPT, max_tokens=TOKENS, seed=seed, temperature=1.0
        )
        return made.choices[0].text

    return draw


class Beside:
    """Draws with one seed after the other until it is enough, in a thread."""

    def __init__(self, draw: Callable[[int], object], enough: Enough) -> None:
        self._draw, self._enough = draw, enough
        self._drawn: list[object] = []
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        try:
            while not self._enough.is_done(len(self._drawn)):
                self._drawn.append(self._draw(len(self._drawn)))
        except BaseException as error:
            self._error = error

    def count(self) -> int:
        """How many are drawn; raises what any of the calls failed with."""
        if self._error is not None:
            raise self._error
        return len(self._drawn)

    def end(self) -> list[object]:
        """What came of each seed; raises what any of the calls failed with."""
        self._thread.join()
        self.count()
        return self._drawn


def train(client: tinsmith.TrainingClient, seed: int, enough: Enough, beside: Beside) -> None:
    """Steps with two calls under way; the weights of every few are sampled."""
    step = 0
    while not enough.is_done(step):
        data = batch(1000 * seed + step, DATA, TRAINED_TOKENS)
        computed = client.forward_backward(data, "cross_entropy")
        stepped = client.optim_step(types.AdamParams(learning_rate=1e-3))
        loss = computed.result().metrics["loss:sum"].hex()
        norm = stepped.result().metrics["grad_norm:last"].hex()
        say(step=step, loss=loss, norm=norm, draws=beside.count())
        step += 1
        if step % SAMPLED_EVERY == 0:
            sampler = client.save_weights_and_get_sampling_client()
            say(sampled=step, tokens=sampled(sampler, step, 2))


def main() -> None:
    """Train and sample, then tell what came of it."""
    seed, gateway = int(sys.argv[1]), sys.argv[2]
    steps, draws = map(int, sys.argv[3:5]) if sys.argv[3:] else (None, None)
    Enough.listen()
    service = tinsmith.ServiceClient()
    (base_model,) = service.get_server_capabilities().supported_models
    name = base_model.model_name
    client = service.create_lora_training_client(base_model=name, rank=4, seed=seed).result()
    say(model_id=client.model_id)
    draw = through_sampler(service, name) if gateway == "-" else through_gateway(gateway, name)
    beside = Beside(draw, Enough(draws))
    try:
        train(client, seed, Enough(steps), beside)
    except BaseException:
        Enough.over.set()  # for the draws, too
        raise
    drawn = beside.end()
    saved = client.save_state("end").result().path
    with tempfile.TemporaryDirectory() as folder:
        service.create_rest_client().download_checkpoint(saved, folder).result()
        weights = Path(folder, "adapter_model.safetensors").read_bytes()
    with connect(os.environ["TINSMITH_ADDRESS"]) as stubs:
        model = stubs.training.GetModel(pb.GetModelRequest(model_id=client.model_id)).model
    say(adapter=hashlib.sha256(weights).hexdigest(), step_count=model.step_count, drawn=drawn)


if __name__ == "__main__":
    main()
