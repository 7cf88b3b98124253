"""What an architecture makes a step do in another way than one would expect, said before the step starts.

Takes a `ModelConfig`; makes a small network of its architecture from the config alone and takes it the way
that a step's network goes: what falls back on it says so in a notice, as it does in the step. Reads no
weights. Where no small network can be made, a notice says that nothing was asked.
"""

from __future__ import annotations

import dataclasses

from common.config import Dtype, ModelConfig
from common.decoding.decoder import Decoder
from common.launch_config import LaunchConfig
from common.model import attention
from common.model.architecture import HeadSpec, attention_for, read_config, say_what_differs
from common.model.loading import make_network
from common.model.miniature import reduced, small_network
from common.model.packed import refuse_unsliced
from common.model.probes import find_shortcuts, isolate_documents
from common.model.router_balance import routers_of, say_what_it_costs
from common.notices import notice


def notice_fallbacks(
    model: ModelConfig, head: HeadSpec, launch: LaunchConfig, *, samples: bool = False
) -> None:
    """Notices of a network with this head, sampled from if `samples`. UserError for one that the step would
    refuse, also where ranks share rows (launch)."""
    config = read_config(model)
    attention.register()
    attention_for(config, head)
    say_what_differs(config, model)
    config.update(dict(head.fields))
    in_fp32 = dataclasses.replace(model, dtype=Dtype.fp32)
    network = small_network(config, lambda small: make_network(small, in_fp32, head))
    if network is None:
        make_network(reduced(config), in_fp32, head)  # refused, as it is when a step rehearses its export
        notice(
            "what the architecture falls back to is not known before the run",
            f"a small network of model_type={config.model_type} does not run",
        )
        return
    head.settle(network, in_fp32, 0)
    isolate_documents(network)
    refuse_unsliced(network, launch)
    shortcuts = find_shortcuts(network)
    if model.router_aux_loss_coef:
        routers_of(network)
        say_what_it_costs(model.router_aux_loss_coef, shortcuts)
    if samples:
        Decoder(network, slots=1)
