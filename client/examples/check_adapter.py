"""Load a downloaded adapter with plain transformers and PEFT and compare it with the Sampler.

    python client/examples/check_adapter.py --base FOLDER --adapter quickstart-out/adapter \\
        --checkpoint tinsmith://.../sampler_weights/pig-latin
"""

import argparse
import os
import sys
import warnings

import numpy as np
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

import tinsmith
from tinsmith import types

TOLERANCE = 1e-4
TEXT = "Translate to Pig Latin: the tin smith. Answer: ethay intay ithsmay."


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--address", default=os.environ.get("TINSMITH_ADDRESS", "127.0.0.1:50051"))
    parser.add_argument("--base", required=True, help="folder of the base model")
    parser.add_argument("--adapter", required=True, help="folder of the adapter")
    parser.add_argument("--checkpoint", required=True, help="its path on the cluster")
    args = parser.parse_args()

    logging.disable_progress_bar()
    warnings.simplefilter("ignore", FutureWarning)  # PEFT's, about a name in transformers
    tokens = AutoTokenizer.from_pretrained(args.base).encode(TEXT)
    base = AutoModelForCausalLM.from_pretrained(args.base, dtype=torch.float32)
    model = PeftModel.from_pretrained(base, args.adapter).eval()
    with torch.no_grad():
        table = model(torch.tensor([tokens])).logits[0].log_softmax(-1)
    ours = np.array([float(table[i, token]) for i, token in enumerate(tokens[1:])])

    service = tinsmith.ServiceClient(base_url=args.address)
    sampler = service.create_sampling_client(model_path=args.checkpoint).result()
    theirs = np.array(sampler.compute_logprobs(types.ModelInput.from_ints(tokens)).result()[1:])
    difference = float(np.abs(ours - theirs).max())
    print(f"plain transformers + peft and the Sampler differ by at most {difference:.1e} nats")
    if difference > TOLERANCE:
        sys.exit(f"that is more than {TOLERANCE:.0e}")


if __name__ == "__main__":
    main()
