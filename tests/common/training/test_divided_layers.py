"""Why layers are not divided over ranks: what DeepSpeed's own ways do with the versions that are pinned.

Where one of these fails the reason in docs/scale.md is gone, and `launch.expert_parallel` or
`launch.tensor_parallel` are worth another trial.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests import forked
from tests.programs import parallel


@pytest.mark.slow
def test_deepspeed_divides_no_mixture_and_leaves_exports_in_parts(tmp_path: Path) -> None:
    out = tmp_path / "outcomes.json"
    forked.run(parallel.main, (str(out),), 2, tmp_path / "printed.txt")
    found = json.loads(out.read_text())
    assert "_CanRecordRegistry.get() takes 2 positional arguments but 3 were given" in found["experts"]
    assert (
        "unsupported partition style(s): ['moe_tp_experts', 'packed_colwise']"
        in found["tensors of a mixture"]
    )
    assert found["tensors"] in ("[(16, 32)]", "[]")  # half of a matrix
