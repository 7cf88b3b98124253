"""Compile the loss head's kernel for an H100, without a GPU, in every form that the head calls.

`python -m tests.programs.kernel_for_h100` prints JSON: for each form [dtype, with bias, weighed, entropy],
then the registers of a thread, the bytes of stack that it spills to, and the shared memory of a program.
"""

from __future__ import annotations

import itertools
import json
import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any

Form = tuple[str, bool, bool, bool]
OFF = "constexpr"
H100 = ("cuda", 90, 32)
FORMS: list[Form] = list(itertools.product(("bf16", "fp16", "fp32"), *[(False, True)] * 3))


def types_of(form: Form) -> dict[str, str]:
    """Of the arguments: in forward passes all is written, weighed in backward passes the gradient alone."""
    dtype, with_bias, is_weighed, has_entropy = form
    numbers, entropies = "*fp32", has_entropy and not is_weighed
    return {
        "logits": numbers,
        "bias": f"*{dtype}" if with_bias else OFF,
        "targets": "*i64",
        "losses": OFF if is_weighed else numbers,
        "entropies": numbers if entropies else OFF,
        "correct": OFF if is_weighed else "*i32",
        "gradient": f"*{dtype}",
        "by_loss": numbers if is_weighed else OFF,
        "by_entropy": numbers if is_weighed and has_entropy else OFF,
        "columns": "i32",
        "temperature": "fp32",
        "IS_WEIGHED": OFF,
        "HAS_ENTROPY": OFF,
        "BLOCK": OFF,
    }


def compiled(form: Form) -> bytes:
    """The machine code."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from common.model import loss_kernel

    kernel, types = loss_kernel.kernel(), types_of(form)
    place = {name: (number,) for number, name in enumerate(kernel.arg_names)}
    flags = {"IS_WEIGHED": form[2], "HAS_ENTROPY": form[3], "BLOCK": loss_kernel.BLOCK}
    constants = {place[name]: flags.get(name) for name, kind in types.items() if kind == OFF}
    aligned = {place[name]: [["tt.divisibility", 16]] for name, kind in types.items() if kind[0] == "*"}
    source = ASTSource(kernel, types, constants, aligned)
    options = {"num_warps": loss_kernel.WARPS}
    return triton.compile(source, target=GPUTarget(*H100), options=options).asm["cubin"]


def used(code: bytes) -> tuple[int, ...]:
    """Registers, stack and shared memory, as NVIDIA's tool reads them from the machine code."""
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(code)
        file.flush()
        command: list[Any] = [tool, "-res-usage", file.name]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = (re.search(rf"{name}:(\d+)", said) for name in ("REG", "STACK", "SHARED"))
    return tuple(int(each.group(1)) for each in found if each is not None)


if __name__ == "__main__":
    print(json.dumps([[form, used(compiled(form))] for form in FORMS]))
