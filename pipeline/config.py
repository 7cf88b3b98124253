"""The whole configuration as one typed schema, and its registration with Hydra.

Takes nothing and returns nothing but types: values come from `conf/` and the command line (see
`pipeline/compose.py`). A new step adds one key here and one line in `pipeline/plan.py`.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import List, Optional

from common.config import DeepSpeedConfig, ModelConfig, to_plain
from common.errors import UserError
from common.fields import number, require
from common.launch_config import LaunchConfig
from common.stage import Step
from common.tracking_config import TrackingConfig
from step1_sft.config import SFTConfig
from step2_dpo.config import DPOConfig
from step2_reward.config import RewardConfig
from step3_ppo.config import KLPlacement, PPOConfig

PROJECT = Path(__file__).resolve().parent.parent
"""Folder that holds the packages, `conf/` and `demo/`."""
CONF = PROJECT / "conf"


@dataclass
class PipelineConfig:
    """What `python -m pipeline run` can be told."""

    steps: List[Step] = field(default_factory=lambda: [Step.sft])
    """the steps of the run, e.g. [sft,reward]; they run in their own order"""
    run_name: Optional[str] = None
    """folder under output_dir; by default the steps and a hash of the configuration"""
    output_dir: str = "runs"
    """where runs are kept"""
    seed: int = number(0, 0, 2**63 - 1)
    """of everything that is random"""
    objective: Optional[str] = None
    """STEP:METRIC that a run of a sweep returns (sft:eval/loss); by default the last step's loss or reward"""
    force: bool = False
    """start a step over whose configuration or inputs changed; its old folder is kept as <step>.old-1"""
    model: ModelConfig = field(default_factory=ModelConfig)
    """the base model"""
    sft: SFTConfig = field(default_factory=SFTConfig)
    """supervised fine-tuning"""
    reward: RewardConfig = field(default_factory=RewardConfig)
    """a reward model from preference pairs"""
    dpo: DPOConfig = field(default_factory=DPOConfig)
    """preference pairs without a reward model"""
    ppo: PPOConfig = field(default_factory=PPOConfig)
    """a policy against a reward"""
    deepspeed: DeepSpeedConfig = field(default_factory=DeepSpeedConfig)
    """how state is sharded"""
    launch: LaunchConfig = field(default_factory=LaunchConfig)
    """where the ranks run"""
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    """where numbers go beside metrics.jsonl (W&B, TensorBoard), and alerts"""

    def check(self, at: str) -> None:
        """The run has steps, and a name that a folder can have."""
        if not self.steps:
            raise UserError("steps=[] is not allowed", hint="name at least one step: 'steps=[sft]'")
        if len(set(self.steps)) != len(self.steps):
            names = ",".join(step.value for step in self.steps)
            raise UserError(f"steps=[{names}] names a step twice", hint="name each step once")
        if self.run_name is not None:
            _check_run_name(self.run_name)
        if self.objective is not None:
            named, _, metric = self.objective.partition(":")
            known = [step.value for step in self.steps]
            allowed = f"{' or '.join(known)}, then :METRIC"
            require(named in known and bool(metric), "objective", self.objective, allowed)


def _check_run_name(name: str) -> None:
    """A run's name is the name of its folder: one visible path component."""
    bad = not name or name != name.strip() or name.startswith((".", "-")) or len(name.encode()) > 200
    if bad or "/" in name or "\\" in name or not name.isprintable():
        raise UserError(
            f"run_name={name!r} cannot name a folder",
            hint="allowed: letters, digits, spaces and signs, without slashes, not beginning with . or -",
        )


def register() -> None:
    """Make the schema's defaults known to Hydra, and `${project:PATH}`, relative to the project's folder.

    Hydra composes without types: what comes of it is read into the schema in one place (`common/fields.py`).
    """
    from hydra.core.config_store import ConfigStore
    from omegaconf import OmegaConf

    defaults = to_plain(PipelineConfig())
    defaults["ppo"]["kl"]["placement"] = KLPlacement.auto.value  # settled only once the estimator is known
    ConfigStore.instance().store(name="pipeline_schema", node=defaults)
    OmegaConf.register_new_resolver("project", _project_path, replace=True)


def _project_path(relative: str) -> str:
    # Made plain textually, without resolve(): a link inside the project is kept as the user sees it.
    import os.path

    return os.path.normpath(PROJECT / relative)
