"""torch.compile on the fake device: Inductor says which operations one kernel computes; none is generated.

Dynamo, autograd's partition into a forward and a backward graph and Inductor's scheduler are torch's own.
What Inductor would fuse is counted as it says; matrix products and attention, which it leaves to other
kernels, are counted as they run.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch

from tests.gpu_fake.device import Device

FusedKernel = tuple[str, float]
"""Its name, and the bytes that it reads and writes."""


def install() -> None:
    """Replace what would generate kernels, or ask the driver, in this process and for good."""
    from torch._inductor import compile_fx, config, scheduler
    from torch._inductor.fx_passes import fuse_attention, pad_mm

    torch.cuda._exchange_device = lambda device: 0
    torch.cuda._maybe_exchange_device = lambda device: -1
    scheduler.has_triton = lambda *_: True
    # patterns are traced with tensors on the device; ours hold no attention of theirs, nothing is padded
    fuse_attention._sfdp_init = pad_mm._pad_mm_init = lambda *_: None
    config.joint_graph_constant_folding = False  # makes constants on the device
    compile_fx.compile_fx = partial(compile_fx.compile_fx, inner_compile=_compiled)


def _compiled(
    graph: torch.fx.GraphModule, inputs: Any, is_backward: bool = False, **_: Any
) -> Callable[..., Any]:
    """A graph as it is called in the place of Inductor's kernels. `inputs`: fake tensors and sizes."""
    from torch._functorch.aot_autograd import make_boxed_func

    kernels = list(_kernels_of(copy.deepcopy(graph), inputs, is_backward))

    def run(*arguments: Any) -> Any:
        device = Device.current
        if device is None or device.kernels is None:
            return graph.forward(*arguments)
        with device.kernels.fused(kernels):
            return graph.forward(*arguments)

    return make_boxed_func(run)


def _kernels_of(graph: torch.fx.GraphModule, inputs: Any, is_backward: bool) -> Iterator[FusedKernel]:
    from torch._inductor import compile_fx
    from torch._inductor.debug import DebugContext
    from torch._inductor.graph import GraphLowering
    from torch._inductor.scheduler import ExternKernelSchedulerNode
    from torch._inductor.utils import get_fused_kernel_name
    from torch._inductor.virtualized import V
    from torch.utils._python_dispatch import _disable_current_modes

    mode = torch._guards.detect_fake_mode(inputs)
    with V.set_fake_mode(mode), _disable_current_modes():
        compile_fx.record_original_output_strides(graph)
        compile_fx._recursive_post_grad_passes(graph, is_inference=False)
        lowering = GraphLowering(
            graph, example_inputs=inputs, shape_env=mode.shape_env, is_backward=is_backward
        )
        handlers = V.set_graph_handler(lowering), V.set_debug_handler(DebugContext())
        with handlers[0], handlers[1], V.set_extern_kernel_nodes([]):
            lowering.run(*inputs)
            lowering._update_scheduler()
            for node in lowering.scheduler.nodes:
                size = float(node.get_read_write_buffers_sizes())
                if size and not isinstance(node, ExternKernelSchedulerNode):
                    yield get_fused_kernel_name(node.get_nodes(), "original_aten"), size
