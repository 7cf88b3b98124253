"""What the starting policy says of every pair: computed once, in the training batches, and kept by hash."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from common.artifacts import MANIFEST, Artifact, Manifest, hash_files, write_manifest
from common.data.batches import BatchPlan, PairBatches, evaluation_pair_batches
from common.distributed import World
from common.errors import UserError
from common.stage import Role
from step2_dpo.loss import Counts, Objective, PairSums, score
from step2_dpo.reference import Reference, load_or_compute, reference_key
from tests.step2_dpo.pairs import MAX_LENGTH, PlainEngine, SomePairs, plain_logps, tiny_llama

ALONE = World(0, 1, 0, torch.device("cpu"))


def plan(**changes: Any) -> BatchPlan:
    return BatchPlan(
        **{
            "max_length": MAX_LENGTH, "packing": True, "global_batch_size": 3, "micro_batch_size": 2,
            "seed": 0, **changes,
        }
    )  # fmt: skip


class Cached:
    """A cache folder, a policy's folder, and what was said."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.policy = folder / "reference", folder / "policy"
        self.policy.mkdir()
        self.put(b"weights")
        self.said: list[str] = []

    def put(self, weights: bytes) -> None:
        """Overwrite the policy in place."""
        (self.policy / "model.safetensors").write_bytes(weights)
        (self.policy / "config.json").write_text("{}")
        (self.policy / MANIFEST).unlink(missing_ok=True)
        write_manifest(self.policy, Manifest("artifact", Role.policy, hash_files(self.policy)))

    def get(
        self, engine: PlainEngine, steps: int = 3, weights: dict[str, float] | None = None, **changes: Any
    ) -> Reference:
        layout = plan(**changes)
        self.said.clear()
        key = reference_key(
            Artifact.load(self.policy, Role.policy), layout, data={"train": "seven"}, weights=weights or {},
            steps=steps, dtype="fp32", device=torch.device("cpu"),
        )  # fmt: skip
        batches: Any = PairBatches(SomePairs(), layout, weights)
        return load_or_compute(engine, batches, SomePairs(), steps, key, self.folder, ALONE, self.said.append)  # type: ignore[arg-type]


@pytest.fixture
def cached(tmp_path: Path) -> Cached:
    return Cached(tmp_path)


def test_the_numbers_are_the_models_own_log_probabilities(cached: Cached) -> None:
    reference = cached.get(PlainEngine(tiny_llama()))
    model, pairs = tiny_llama("eager").double(), SomePairs()
    with torch.no_grad():
        expected = [[float(side) for side in plain_logps(model, pairs[index])] for index in range(len(pairs))]
    assert reference.train.dtype == np.float64
    np.testing.assert_allclose(reference.train, expected, rtol=1e-6)
    np.testing.assert_allclose(reference.held_out, expected, rtol=1e-6)


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize("adapters", [False, True], ids=["whole model", "adapters"])
def test_before_training_policy_and_reference_are_the_same_bits(
    cached: Cached, packing: bool, adapters: bool
) -> None:
    model: Any = tiny_llama()
    if adapters:
        import peft

        settings = peft.LoraConfig(task_type="CAUSAL_LM", r=4, target_modules="all-linear")
        model = peft.get_peft_model(model, settings, autocast_adapter_dtype=False)
    engine = PlainEngine(model)
    reference = cached.get(engine, packing=packing)
    layout = plan(packing=packing)
    for step in range(3):
        for batch in PairBatches(SomePairs(), layout).micro_batches(step):
            known = reference.of_train(batch)
            result = score(engine, batch, known, Objective(), ALONE.device, with_entropy=True)  # type: ignore[arg-type]
            assert result.ratios.chosen.tolist() == [0.0] * len(batch.pair_ids)
            assert result.ratios.rejected.tolist() == [0.0] * len(batch.pair_ids)
    for batch in evaluation_pair_batches(SomePairs(), layout):
        known = reference.of_held_out(batch)
        result = score(engine, batch, known, Objective(), ALONE.device, with_entropy=True)  # type: ignore[arg-type]
        assert result.ratios.chosen.abs().sum() == 0 and result.ratios.rejected.abs().sum() == 0


def test_adapters_are_off_for_the_reference_and_on_again_after_it(cached: Cached) -> None:
    import peft

    settings = peft.LoraConfig(task_type="CAUSAL_LM", r=4, target_modules="all-linear")
    model: Any = peft.get_peft_model(tiny_llama(), settings, autocast_adapter_dtype=False)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    engine = PlainEngine(model)
    adapted = cached.get(engine)
    np.testing.assert_array_equal(adapted.train, cached_elsewhere(cached, tiny_llama()).train)
    assert all(p.requires_grad for name, p in model.named_parameters() if "lora_" in name)
    sums, layout = PairSums(), plan()
    for batch in PairBatches(SomePairs(), layout).micro_batches(0):
        known = adapted.of_train(batch)
        sums.add(score(engine, batch, known, Objective(), ALONE.device, with_entropy=False), Objective())  # type: ignore[arg-type]
    assert abs(sums.metrics(Objective(), Counts(3, 1, 1))["rewards/margins"]) > 1e-3


def cached_elsewhere(cached: Cached, model: torch.nn.Module) -> Reference:
    other = Cached.__new__(Cached)
    other.folder, other.policy, other.said = cached.folder / "elsewhere", cached.policy, []
    return other.get(PlainEngine(model))


def test_the_second_time_nothing_is_computed(cached: Cached) -> None:
    first = cached.get(PlainEngine(tiny_llama()))
    assert cached.said == ["computing the reference log-probabilities (none are cached yet)"]
    engine = PlainEngine(tiny_llama())
    second = cached.get(engine)
    assert cached.said == ["reference log-probabilities: from the cache"] and engine.calls == 0
    np.testing.assert_array_equal(second.train, first.train)
    np.testing.assert_array_equal(second.held_out, first.held_out)


def test_weights_overwritten_in_place_are_computed_anew(cached: Cached) -> None:
    before = cached.get(PlainEngine(tiny_llama()))
    stamp = (cached.policy / "model.safetensors").stat()
    cached.put(b"Weights")  # as many bytes
    os.utime(cached.policy / "model.safetensors", ns=(stamp.st_atime_ns, stamp.st_mtime_ns))
    after = cached.get(PlainEngine(tiny_llama(seed=1)))
    assert cached.said == ["computing the reference log-probabilities (changed since the last time: weights)"]
    assert not np.isclose(before.train, after.train).any()


def test_weights_overwritten_beside_their_old_manifest_are_refused(cached: Cached) -> None:
    cached.get(PlainEngine(tiny_llama()))
    (cached.policy / "model.safetensors").write_bytes(b"Weights")
    with pytest.raises(UserError, match="model.safetensors"):
        cached.get(PlainEngine(tiny_llama(seed=1)))


def test_the_same_weights_elsewhere_are_found_again(cached: Cached) -> None:
    cached.get(PlainEngine(tiny_llama()))
    cached.policy = cached.policy.rename(cached.policy.with_name("moved"))
    cached.get(PlainEngine(tiny_llama()))
    assert cached.said == ["reference log-probabilities: from the cache"]


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"packing": False}, "packing True -> False"),
        ({"micro_batch_size": 1}, "micro_batch_size 2 -> 1"),
        ({"steps": 2}, "steps 3 -> 2"),
    ],
)
def test_other_batches_are_other_bits_and_are_computed_anew(
    cached: Cached, changes: dict[str, Any], named: str
) -> None:
    cached.get(PlainEngine(tiny_llama()))
    cached.get(PlainEngine(tiny_llama()), **changes)
    assert cached.said == [
        f"computing the reference log-probabilities (changed since the last time: {named})"
    ]


@pytest.mark.parametrize("damage", ["cut", "changed", "empty"])
def test_damaged_numbers_are_computed_anew(cached: Cached, damage: str) -> None:
    first = cached.get(PlainEngine(tiny_llama()))
    (path,) = cached.folder.glob("*.npz")
    content = path.read_bytes()
    if damage == "changed":  # a number that is whole to numpy: only the checksum of all of them knows
        with np.load(path) as stored:
            parts = dict(stored)
        parts["train"][0, 0] += 1e-9
        np.savez(path, **parts)
    else:
        path.write_bytes(content[: len(content) // 2] if damage == "cut" else b"")
    again = cached.get(PlainEngine(tiny_llama()))
    assert cached.said == ["computing the reference log-probabilities (the cached ones are damaged)"]
    np.testing.assert_array_equal(again.train, first.train)
    assert path.read_bytes() == content


def test_steps_whose_pairs_are_all_known_are_skipped(cached: Cached) -> None:
    engine, once = PlainEngine(tiny_llama()), PlainEngine(tiny_llama())
    one_epoch = cached.get(once, steps=3)
    three_epochs = cached.get(engine, steps=9)
    assert engine.calls == once.calls
    np.testing.assert_array_equal(one_epoch.train, three_epochs.train)


def test_pairs_that_the_run_never_sees_have_no_number(cached: Cached) -> None:
    reference = cached.get(PlainEngine(tiny_llama()), steps=1)
    assert np.isnan(reference.train).sum() == 2 * (7 - 3) and not np.isnan(reference.held_out).any()
