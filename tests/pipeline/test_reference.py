"""The reference of all keys is the schema's, complete, and what docs/keys.md holds."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from common.errors import UserError
from pipeline import schema
from pipeline.reference import explain, keys, markdown

ROOT = Path(__file__).resolve().parents[2]


def test_every_key_of_the_schema_has_a_line_and_a_type() -> None:
    found = {key.name: key for key in keys()}
    assert set(schema.known_keys()) <= set(found) and len(found) > len(schema.known_keys())
    assert [name for name, key in found.items() if not key.line or not key.type_name or not key.default] == []


def test_the_document_is_what_the_program_prints() -> None:
    hint = "python -m pipeline.reference > docs/keys.md"
    assert (ROOT / "docs" / "keys.md").read_text(encoding="utf-8") == markdown(), hint


def test_a_key_is_explained_with_type_default_and_line() -> None:
    lr = explain("sft.optim.lr").splitlines()[1]
    assert lr == "  number or null, above 0, up to 10 (Muon takes larger ones than AdamW); default: null"
    estimator = explain("ppo.estimator").splitlines()[1]
    assert estimator == "  one of gae, grpo, rloo, reinforce_pp; default: gae"
    assert "default: [{model: true}]" in explain("ppo.rewards")
    path = explain("sft.data.sources.path")
    assert path == explain("sft.data.sources[].path") == explain("sft.data.sources[1].path")


def test_a_group_lists_its_own_keys_and_not_those_below_them() -> None:
    names = [line.split()[0] for line in explain("ppo.kl").splitlines()[2:]]
    assert names == [f"ppo.kl.{name}" for name in ("placement", "coef", "controller", "target", "horizon")]
    assert "model.lora.r" not in explain("model")


def test_an_unknown_key_is_refused_with_the_nearest() -> None:
    with pytest.raises(UserError, match=r"there is no key sft\.lr") as refused:
        explain("sft.lr")
    assert refused.value.hint == "did you mean sft.optim.lr?"


def test_the_verb_needs_no_torch() -> None:
    program = (
        "import sys; from pipeline.__main__ import dispatch; dispatch(['explain', 'seed']); "
        "sys.exit('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.startswith("seed: of everything that is random\n")
