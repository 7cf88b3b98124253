"""Exports of a partitioned model: whole by rank 0, and tensor by tensor, beside each other."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from common.artifacts import MANIFEST, read_manifest
from common.config import Dtype, LoraConfig, ModelConfig
from common.errors import UserError
from common.model.architecture import CAUSAL_LM, HeadSpec
from common.model.loading import load_model
from common.model.partition import share_of
from common.model.scalar_head import NEW_REWARD_MODEL
from common.runtime.distributed import World, init_world, wait_for_rank0
from common.training import export_stream
from common.training.engine import return_free_memory
from common.training.export import ask_live, export_model
from common.training.export_stream import Streamed, partial_of, stream_weights
from tests.packed import packed_lm, packed_scorer
from tests.programs import engines
from tests.programs.partitioned import WIDE
from tests.tiny import CHATML, tiny_tokenizer

NAMES = ("untied", "tied", "bias")
"""Of `partitioned.FOLDERS`."""

LORA = LoraConfig(enabled=True, r=2, alpha=4)
ADAPTED = {
    "all linear": ("untied", LORA, CAUSAL_LM),
    "a tied head": ("tied", replace(LORA, targets=["lm_head", "q_proj"]), CAUSAL_LM),
    "tied embeddings": ("tied", replace(LORA, targets=["embed_tokens", "q_proj"]), CAUSAL_LM),
    "not the tied ones": ("tied", LORA, CAUSAL_LM),
    "magnitudes": ("untied", replace(LORA, dora=True), CAUSAL_LM),
    "a trained head": ("untied", LORA, NEW_REWARD_MODEL),
}
"""Folders, adapters and heads."""


def same_files(models: str, out: str) -> int:
    """Both exports hold the same bytes, in one file and in several, and pass their check."""
    world = init_world()
    for name in NAMES:
        engine, network = _trained(ModelConfig(path=str(Path(models) / name), dtype=Dtype.bf16), world)
        for size in ("5GB", "20KB") if name == "untied" else ("5GB",):
            export_stream.SHARD_SIZE = size
            streamed, whole = (Path(out) / f"{name} {size} {kind}" for kind in ("streamed", "whole"))
            written = stream_weights(engine, network, streamed, writes=world.is_rank0)
            assert written is not None and len(written.sha256) == (
                0 if world.rank else len(_shards(streamed))
            )
            _export(engine, network, streamed, world, written)
            _export(engine, network, whole, world, None)
            if world.is_rank0 and size == "5GB":
                assert_same(streamed, whole)
            wait_for_rank0(world, f"{name} {size}")
    return 0


def assert_same(folder: Path, other: Path) -> None:
    """The same files, and of merges the same figures."""
    found, expected = (dict(read_manifest(each).files) for each in (folder, other))
    found.pop("README.md"), expected.pop("README.md")
    assert found == expected, (folder, found, expected)
    figure = "largest_merge_difference"
    assert read_manifest(folder).details.get(figure) == read_manifest(other).details.get(figure)


def adapters_are_merged(models: str, out: str, names: list[str], dtype: Dtype) -> int:
    """As in a whole export, bit for bit; nothing of the base stays on the disk."""
    world = init_world()
    for name in names:
        model, lora, head = ADAPTED[name]
        config = ModelConfig(path=str(Path(models) / model), dtype=dtype, lora=lora)
        engine, network = _trained(config, world, head)
        streamed, whole = (Path(out) / f"{name} {kind}" for kind in ("streamed", "whole"))
        written = stream_weights(engine, network, streamed, writes=world.is_rank0)
        assert written is not None
        _export(engine, network, streamed, world, written)
        _export(engine, network, whole, world, None)
        if world.is_rank0:
            assert_same(streamed, whole)
            assert read_manifest(streamed).details["largest_merge_difference"] > 0
            assert not list(Path(out).glob("*.tmp"))
        wait_for_rank0(world, name)
    return 0


LAYERS, KEPT = 8, 30e6
"""Of a model whose merges would leave more than that in the allocator, and what may be left."""


def memory_goes_back(out: str) -> int:
    """What merges left in the allocator is the system's again before the export is made."""
    world, folder = init_world(), Path(out) / "export"
    shape = {**WIDE, "hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": LAYERS}
    export_stream.KEPT = 32 << 20
    config = ModelConfig(config={"model_type": "llama", **shape}, dtype=Dtype.bf16, lora=LORA)
    engine, network = _trained(config, world)
    return_free_memory()
    before = _own_memory()
    written = stream_weights(engine, network, folder, writes=world.is_rank0)
    assert (
        written is not None and written.merged is not None and len(written.merged.differences) == 7 * LAYERS
    )
    assert _own_memory() - before < KEPT, (before, _own_memory())
    return 0


def _own_memory() -> int:
    """Bytes of this process that no file is behind."""
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if "RssAnon" in line]
    return 1024 * int(line.split()[1])


def _shards(folder: Path) -> list[Path]:
    return list(partial_of(folder).glob("*.safetensors"))


def _trained(model: ModelConfig, world: World, head: HeadSpec = CAUSAL_LM) -> tuple[Any, Any]:
    """An engine after two steps, as adapters begin with half of them zero, and the model in it."""
    network = load_model(
        model, tiny_tokenizer(CHATML), seed=0, device=world.device, share=share_of(3), head=head
    )
    is_lm = head is CAUSAL_LM
    engine = engines.engine_of((packed_lm if is_lm else packed_scorer)(network), 3, world, model.dtype)
    for step in range(2):
        for loss in (engines.actor_losses if is_lm else engines.critic_losses)(engine, world.rank, step):
            engine.backward(loss, 10.0)
        engine.step()
    engine.eval()
    return engine, network


def _export(engine: Any, network: Any, folder: Path, world: World, streamed: Streamed | None) -> None:
    probe = ask_live(engine.module, [engines.document(0)["input_ids"][0]])
    weights = engine.full_state_dict() if streamed is None else None
    if world.is_rank0:
        export_model(network, weights, tiny_tokenizer(CHATML), folder, probe, details={}, streamed=streamed)


def exported_whole(models: str, out: str) -> int:
    """Where files have other tensors than the memory, nothing is written."""
    world = init_world()
    for lora in (LoraConfig(), LORA):
        model = ModelConfig(path=str(Path(models) / "experts"), dtype=Dtype.bf16, lora=lora)
        engine, network = _trained(model, world)
        assert stream_weights(engine, network, Path(out) / "export", writes=world.is_rank0) is None
    assert not list(Path(out).iterdir())
    return 0


def a_full_disk_and_a_flipped_bit(models: str, out: str) -> int:
    """No rank hangs; the first is an error of rank 0, the second an artifact that no step takes."""
    world = init_world()
    engine, network = _trained(ModelConfig(path=str(Path(models) / "tied"), dtype=Dtype.bf16), world)
    full, damaged = Path(out) / "full", Path(out) / "damaged"
    take, export_stream._Writer.take = export_stream._Writer.take, _refuse  # type: ignore[method-assign]
    written = stream_weights(engine, network, full, writes=world.is_rank0)
    export_stream._Writer.take = take  # type: ignore[method-assign]
    assert "the disk is full" in _error(engine, network, full, world, written)
    written = stream_weights(engine, network, damaged, writes=world.is_rank0)
    if world.is_rank0:
        path = partial_of(damaged) / "model.safetensors"
        content = bytearray(path.read_bytes())
        content[-1] ^= 1
        path.write_bytes(content)
    assert "not the same after reading it back" in _error(engine, network, damaged, world, written)
    assert not (damaged / MANIFEST).exists()
    return 0


def _refuse(writer: Any, name: str, tensor: Any) -> None:
    writer.error = OSError(28, "No space left on device")


def _error(engine: Any, network: Any, folder: Path, world: World, written: Streamed | None) -> str:
    """What rank 0 is told; on other ranks whatever is looked for."""
    found = "the disk is full, not the same after reading it back"
    try:
        _export(engine, network, folder, world, written)
    except UserError as error:
        found = str(error)
    else:
        assert not world.is_rank0
    wait_for_rank0(world, folder.name)
    return found
