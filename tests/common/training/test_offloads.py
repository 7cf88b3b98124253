"""Why optimizer states are kept nowhere but on the device and in host memory: what DeepSpeed's other ways do
with the versions that are pinned.

Where one of these fails a reason in docs/performance.md is gone, and that way is worth another trial.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests import forked
from tests.programs import offloads

pytestmark = pytest.mark.slow


def found_by(program: Callable[[str], int], folder: Path) -> dict[str, Any]:
    forked.run(program, (str(folder),), 2, folder / "printed.txt")
    return json.loads((folder / "found.json").read_text())


def test_nvme_trains_as_host_memory_does_and_resumes_without_moments_and_small_tensors(
    tmp_path: Path,
) -> None:
    written = found_by(offloads.nvme_writes, tmp_path)
    assert max(written["numbers of each group"]) >= 2**18 > min(written["numbers of each group"])
    assert written["differing from host memory"] == []
    assert len(written["not hashed"]) == 6  # of two ranks the weights and both moments
    read = found_by(offloads.nvme_reads, tmp_path)
    assert read["optimizer states"] == []
    assert read["weights not loaded"] and all("norm" in name for name in read["weights not loaded"])
    assert read["apart"] > 0.1


def test_zenflow_wants_its_own_adamw_and_begins_with_other_weights(tmp_path: Path) -> None:
    found = found_by(offloads.zenflow, tmp_path)
    assert "unexpected keyword argument 'step_id'" in found["torch's AdamW"]
    assert "lerp_() received an invalid combination of arguments" in found["with the step's number"]
    assert found["before any step"]["others"] > 0.99
    assert found["before any step"]["wrongly turned"]
    held, loaded = found["states of the tenth"]
    assert held and not loaded


def test_superoffload_steps_nothing_after_several_passes_and_saves_no_moments(tmp_path: Path) -> None:
    found = found_by(offloads.superoffload, tmp_path)
    assert "SuperOffload only supports NVIDIA CUDA GPUs" in found["on the CPU"]
    assert found["norms"] == [0.0] * offloads.BEFORE and found["moved"] == 0
    assert found["apart by pass"] < 1e-6
    assert found["states held"] and not found["states saved"]


def test_bf16_states_leave_most_weights_where_they_are(tmp_path: Path) -> None:
    found = found_by(offloads.bf16_states, tmp_path)
    assert found["fp32"] > 0.99 and found["bf16"] < 0.5
