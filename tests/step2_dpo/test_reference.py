"""What the starting policy says of every pair: computed once, in the training batches, and kept by hash."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from common.artifacts import MANIFEST, Artifact, Manifest, file_sha256, hash_files, write_manifest
from common.config import Dtype, LoraConfig, ModelConfig, Quantize
from common.data.batches import BatchPlan, PairBatches, evaluation_pair_batches
from common.errors import UserError
from common.model import attention
from common.runtime.distributed import World
from common.stage import Role
from step2_dpo import reference as reference_module
from step2_dpo.loss import Objective, PairSums, StepCounts, compute_loss
from step2_dpo.reference import Reference, load_or_compute, reference_key, starting_policy
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

    def put(self, weights: bytes = b"weights", others: Mapping[str, str] | None = None) -> None:
        """Overwrite the policy in place. others: content of further files by name."""
        (self.policy / "model.safetensors").write_bytes(weights)
        for name, content in {"config.json": "{}", **(others or {})}.items():
            (self.policy / name).write_text(content)
        (self.policy / MANIFEST).unlink(missing_ok=True)
        write_manifest(self.policy, Manifest("artifact", Role.policy, hash_files(self.policy)))

    def get(
        self,
        engine: PlainEngine,
        steps: int = 3,
        weights: dict[str, float] | None = None,
        model: ModelConfig | None = None,
        **changes: Any,
    ) -> Reference:
        layout = plan(**changes)
        self.said.clear()
        key = reference_key(
            Artifact.load(self.policy, Role.policy), model or ModelConfig(dtype=Dtype.fp32), layout,
            data={"train": "seven"}, weights=weights or {}, steps=steps, device=torch.device("cpu"),
        )  # fmt: skip
        batches: Any = PairBatches(SomePairs(), layout, weights)
        opened = starting_policy(engine)  # type: ignore[arg-type]
        return load_or_compute(opened, batches, SomePairs(), steps, key, self.folder, ALONE, self.said.append)  # type: ignore[arg-type]


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


def test_a_reference_that_cannot_share_prefixes_reads_one_by_one_and_says_so(tmp_path: Path) -> None:
    engine, said, asked = PlainEngine(tiny_llama()), list[str](), list[bool]()

    def ask(**arguments: Any) -> Any:
        asked.append(bool(arguments.get("shared_prefix")))
        return engine(**arguments)

    batches: Any = PairBatches(SomePairs(), plan())
    pairs: Any = SomePairs()

    def reference_of(*, shares: bool) -> Reference:
        opened = contextlib.nullcontext((ask, shares))
        return load_or_compute(opened, batches, pairs, 3, {"shares": shares}, tmp_path, ALONE, said.append)

    reference_of(shares=True)
    assert any(asked) and not any("cannot share" in line for line in said)
    asked.clear()
    reference = reference_of(shares=False)
    assert asked and not any(asked) and batches.plan.share_prefix
    assert any("cannot share prefixes" in line for line in said)
    model = tiny_llama("eager").double()
    with torch.no_grad():
        expected = [[float(side) for side in plain_logps(model, pairs[index])] for index in range(len(pairs))]
    np.testing.assert_allclose(reference.train, expected, rtol=1e-6)
    np.testing.assert_allclose(reference.held_out, expected, rtol=1e-6)


class CountingEngine(PlainEngine):
    """Says of each token that its loss is the number of the call (from 1), and keeps what it was called with.

    A number of the reference then tells in which call it was found. (A model as small as these gives the same
    bits in whatever company a pair is, so its own numbers would not tell.)
    """

    def __init__(self) -> None:
        super().__init__(tiny_llama())
        self.computed: list[list[int]] = []

    def __call__(self, **arguments: Any) -> Any:
        tokens = super().__call__(**arguments)
        self.computed.append(arguments["input_ids"][0].tolist())
        return tokens._replace(token_losses=torch.full_like(tokens.token_losses, self.calls))


def calls_behind(table: np.ndarray) -> list[int]:
    """Of each pair of `SomePairs`: the call of a CountingEngine that both its numbers come from."""
    chosen, rejected = (-table / np.array([SomePairs.chosen, SomePairs.rejected]).T).T.tolist()
    assert chosen == rejected
    return chosen


# Weight 1: the pairs of the steps are 0 4 6, 1 2 3, 5; from then on all are known.
# Weight 1.5: 0 4 6, 2 4 6, 1 2 3, 5 5. The second and third step have pairs again, and the fourth one twice.
@pytest.mark.parametrize("packing", [True, False], ids=["packed", "not packed"])
@pytest.mark.parametrize("weight", [1.0, 1.5])
def test_each_pair_is_scored_in_the_micro_batch_in_which_training_first_sees_it(
    cached: Cached, weight: float, packing: bool
) -> None:
    layout, steps, weights = plan(packing=packing), 9, {"only": weight}
    first_sight: dict[int, int] = {}  # call by pair
    batches = []
    for step in range(steps):
        micro_batches = PairBatches(SomePairs(), layout, weights).micro_batches(step)
        if all(pair in first_sight for batch in micro_batches for pair in batch.pair_ids):
            continue
        for batch in micro_batches:
            batches.append(batch)
            for pair in batch.pair_ids:
                first_sight.setdefault(pair, len(batches))
    places = sum(len(batch.pair_ids) for batch in batches)
    assert sorted(first_sight) == list(range(7)) and (places > 7) == (weight > 1)

    engine = CountingEngine()
    reference = cached.get(engine, steps=steps, weights=weights, packing=packing)
    held_out = list(evaluation_pair_batches(SomePairs(), layout))
    assert engine.computed == [batch.documents.input_ids[0].tolist() for batch in (*batches, *held_out)]
    assert calls_behind(reference.train) == [first_sight[pair] for pair in range(7)]
    last = {
        pair: number for number, batch in enumerate(held_out, len(batches) + 1) for pair in batch.pair_ids
    }
    assert calls_behind(reference.held_out) == [last[pair] for pair in range(7)]


def test_the_earliest_step_decides_whichever_rank_has_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def found(step: int, pair_ids: tuple[int, ...], logp: float) -> Any:
        return reference_module._Scored(step, pair_ids, np.full((len(pair_ids), 2), logp))

    # pair 0: only in step 0. pair 1: on rank 0 first. pair 2: on rank 1 first. pair 3: twice in step 1.
    ranks = [
        [found(0, (0, 1), -1.0), found(1, (2, 3), -2.0)],
        [found(0, (2,), -3.0), found(1, (3, 1), -4.0)],
    ]
    shares: list[Any] = []
    monkeypatch.setattr(reference_module, "all_gather_arrays", lambda own: shares.append(own) or shares)
    tables = [reference_module._table(own, 5) for own in ranks]
    table = tables[-1]  # made when both shares were there
    np.testing.assert_array_equal(table, [[-1, -1], [-1, -1], [-3, -3], [-2, -2], [np.nan, np.nan]])


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
        losses = compute_loss(engine, batch, known, Objective(), ALONE.device, with_entropy=False)
        sums.add(losses, Objective())
    assert abs(sums.metrics(Objective(), StepCounts(3, 1, 1), with_entropy=False)["rewards/margins"]) > 1e-3


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


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"dtype": Dtype.bf16}, "dtype fp32 -> bf16"),
        ({"quantize": Quantize.nf4, "lora": LoraConfig(enabled=True)}, "quantize none -> nf4"),
        ({"gradient_checkpointing": True}, "gradient_checkpointing False -> True"),
        ({"compile": True}, "compile False -> True"),
        ({"trust_remote_code": True}, "trust_remote_code False -> True"),
    ],
)
def test_a_model_loaded_another_way_is_computed_anew(
    cached: Cached, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], named: str
) -> None:
    monkeypatch.setattr(reference_module, "version", lambda package: "5.0")
    cached.get(PlainEngine(tiny_llama()))
    cached.get(PlainEngine(tiny_llama()), model=ModelConfig(**{"dtype": Dtype.fp32, **changes}))
    (said,) = cached.said
    assert said.startswith("computing the reference log-probabilities (changed since the last time: ")
    assert named in said


def test_with_and_without_adapters_the_numbers_are_shared(cached: Cached) -> None:
    cached.get(PlainEngine(tiny_llama()))
    cached.get(PlainEngine(tiny_llama()), model=ModelConfig(dtype=Dtype.fp32, lora=LoraConfig(enabled=True)))
    assert cached.said == ["reference log-probabilities: from the cache"]


def test_another_transformers_computes_anew(cached: Cached, monkeypatch: pytest.MonkeyPatch) -> None:
    versions = {"transformers": "5.0"}
    monkeypatch.setattr(reference_module, "version", versions.__getitem__)
    cached.get(PlainEngine(tiny_llama()))
    versions["transformers"] = "5.1"
    cached.get(PlainEngine(tiny_llama()))
    assert cached.said == [
        "computing the reference log-probabilities (changed since the last time: transformers 5.0 -> 5.1)"
    ]


@pytest.mark.parametrize(
    ("files", "named"),
    [
        ({"modeling.py": "new = True"}, "architecture"),
        ({"config.json": '{"rms_norm_eps": 1e-5}'}, "architecture"),
        ({"model.safetensors.index.json": "{}"}, "weights"),
    ],
    ids=["code", "config", "index"],
)
def test_other_files_that_the_network_is_loaded_from_are_computed_anew(
    cached: Cached, files: dict[str, str], named: str
) -> None:
    cached.put(others={"modeling.py": "new = False"})
    cached.get(PlainEngine(tiny_llama()))
    cached.put(others=files)
    cached.get(PlainEngine(tiny_llama()))
    assert cached.said == [
        f"computing the reference log-probabilities (changed since the last time: {named})"
    ]


def test_files_that_the_network_is_not_loaded_from_change_nothing(cached: Cached) -> None:
    cached.get(PlainEngine(tiny_llama()))
    cached.put(others={"generation_config.json": "{}"})
    cached.get(PlainEngine(tiny_llama()))
    assert cached.said == ["reference log-probabilities: from the cache"]


@pytest.mark.parametrize("module", ["last_layer", "loading", "fused_loss", "packed", "attention"])
def test_other_code_computes_anew(
    cached: Cached, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, module: str
) -> None:
    cached.get(PlainEngine(tiny_llama()))
    changed = tmp_path / "changed.py"
    changed.write_text("another version of it")
    monkeypatch.setattr(getattr(reference_module, module), "__file__", str(changed))
    cached.get(PlainEngine(tiny_llama()))
    assert cached.said == ["computing the reference log-probabilities (changed since the last time: code)"]


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


def test_numbers_that_were_written_under_another_key_are_computed_anew(cached: Cached) -> None:
    first = cached.get(PlainEngine(tiny_llama()))
    (path,) = cached.folder.glob("*.npz")
    cached.get(PlainEngine(tiny_llama()), steps=2)
    (other,) = set(cached.folder.glob("*.npz")) - {path}
    path.write_bytes(other.read_bytes())  # whole, of the same size, and of another run
    again = cached.get(PlainEngine(tiny_llama()))
    assert cached.said == ["computing the reference log-probabilities (the cached ones are damaged)"]
    np.testing.assert_array_equal(again.train, first.train)


def test_the_file_of_the_numbers_is_recorded_by_hash_whether_computed_or_found(cached: Cached) -> None:
    computed = cached.get(PlainEngine(tiny_llama()))
    found = cached.get(PlainEngine(tiny_llama()))
    (path,) = cached.folder.glob("*.npz")
    assert computed.record == found.record == {"file": path.name, "sha256": file_sha256(path)}


def test_steps_whose_pairs_are_all_known_are_skipped(cached: Cached) -> None:
    engine, once = PlainEngine(tiny_llama()), PlainEngine(tiny_llama())
    one_epoch = cached.get(once, steps=3)
    three_epochs = cached.get(engine, steps=9)
    assert engine.calls == once.calls
    np.testing.assert_array_equal(one_epoch.train, three_epochs.train)


def test_pairs_that_the_run_never_sees_have_no_number(cached: Cached) -> None:
    reference = cached.get(PlainEngine(tiny_llama()), steps=1)
    assert np.isnan(reference.train).sum() == 2 * (7 - 3) and not np.isnan(reference.held_out).any()


def test_every_module_that_decides_the_reference_s_numbers_is_hashed() -> None:
    """Of networks, all but scores, exported adapters, what balances routers that learn, bytes that go to the
    host and come back, and compiling, which DPO does not do by itself."""
    hashed = {Path(str(module.__file__)) for module in reference_module.HASHED}
    found = {path for path in Path(str(attention.__file__)).parent.glob("*.py") if path not in hashed}
    assert {path.stem for path in found} == {
        "__init__", "activation_offload", "adapter_folder", "compiled", "router_balance", "scalar_head",
    }  # fmt: skip
