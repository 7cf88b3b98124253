"""Schema of `tracking`: where numbers go beside metrics.jsonl, and who is told what happens."""

import re
from dataclasses import dataclass, field
from enum import Enum
from typing import List, Optional

from common.addresses import Words, check_url
from common.fields import require


class WandbMode(Enum):
    auto = "auto"
    online = "online"
    offline = "offline"
    off = "off"


class MirrorName(Enum):
    wandb = "wandb"
    tensorboard = "tensorboard"


class AlertKind(Enum):
    watchdog = "watchdog"
    failure = "failure"
    end = "end"


FROM_ENVIRONMENT = "env:"
WEBHOOK = Words(
    example="https://alerts.example/hook",
    sends="alerts",
    instead="tracking.webhook=env:NAME takes it from the environment variable NAME, and it is in no file",
    if_plain="use https, or a server on this machine",
)


@dataclass
class TrackingConfig:
    """metrics.jsonl is always written; this is about its mirrors, and about alerts."""

    to: List[MirrorName] = field(default_factory=lambda: [MirrorName.wandb])
    """mirrors of metrics.jsonl; [] for none"""
    wandb: WandbMode = WandbMode.auto
    """auto: online with a key, else offline"""
    project: str = "rlhf"
    """W&B project"""
    entity: Optional[str] = None
    """W&B team or user"""
    alerts: List[AlertKind] = field(default_factory=lambda: list(AlertKind))
    """what W&B and the webhook are told: a number that looks wrong, a step that failed, one that ended"""
    webhook: Optional[str] = None
    """address that alerts are posted to as JSON, https or on this machine; env:NAME: of that variable"""

    def check(self, at: str) -> None:
        """A mirror is named once; the webhook can be asked."""
        names = [name.value for name in self.to]
        require(len(set(names)) == len(names), f"{at}to", names, "each mirror once")
        if self.webhook is None:
            return
        if self.webhook.startswith(FROM_ENVIRONMENT):
            name = self.webhook.removeprefix(FROM_ENVIRONMENT)
            require(name.isidentifier(), f"{at}webhook", self.webhook, "env: and the name of a variable")
        else:
            check_url(self.webhook, f"{at}webhook", WEBHOOK)


def artifact_name(run_name: str, step: str) -> str:
    """What a step's artifact is called in a tracker."""
    return re.sub(r"[^\w.-]+", "-", f"{run_name}-{step}")[:100]
