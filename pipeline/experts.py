"""Checks of what mixtures of experts are asked for. `checks.py` calls them."""

from __future__ import annotations

from pathlib import Path

from common.artifacts import read_json
from common.config import ModelConfig
from common.errors import UserError

COEFFICIENT = "model.router_aux_loss_coef"


def check_balanced(model: ModelConfig) -> None:
    """A loss of routers is asked of a network that has some, where its folder tells; ranks ask the others."""
    if not model.router_aux_loss_coef or model.path is None:
        return
    try:
        fields = read_json(Path(model.path) / "config.json")
    except (OSError, ValueError, RecursionError):  # of the hub; or named where the model is checked
        return
    if isinstance(fields, dict) and not any("expert" in name for name in fields):
        raise UserError(
            f"{COEFFICIENT}={model.router_aux_loss_coef:g} balances experts, and {model.path} has none "
            f"(model_type={fields.get('model_type')})",
            hint=f"{COEFFICIENT}=0, or a mixture of experts",
        )


def check_not_balanced(model: ModelConfig) -> None:
    """PPO adds no loss of routers to its updates."""
    if model.router_aux_loss_coef:
        raise UserError(
            f"{COEFFICIENT}={model.router_aux_loss_coef:g} is for sft, reward and dpo, not for ppo, whose "
            "updates do not count experts",
            hint=f"{COEFFICIENT}=0, or a run of its own for the other steps",
        )
