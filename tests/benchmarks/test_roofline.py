from importlib import import_module
from importlib.util import find_spec
from types import SimpleNamespace

import pytest
import torch

from benchmarks import roofline
from tests.gpu_fake.device import Device
from tests.gpu_fake.kernels import Kernels
from tests.gpu_fake.liger import MOVED, Launch


def test_a_kernel_takes_the_longer_of_multiplying_and_moving() -> None:
    kernels = [
        ["step", 1, "mm", 1, 1e12, 1e15, 0.0],  # of another step
        ["step", 2, "mm", 1, 4.8e9, 989e12, 0.0],  # a second of products, a millisecond of moving
        ["backward", 2, "mm", 1, 4.8e9, 67e12, 67e12],  # a second in fp32
        ["backward", 2, "add", 3, 4.8e12, 0.0, 0.0],
    ]
    product, addition = roofline.rows_of(kernels)
    assert (product.kernel, product.calls, addition.kernel, addition.calls) == ("mm", 2, "add", 3)
    assert product.seconds == pytest.approx(2.0) and product.reached == pytest.approx(2 / 0.75)
    assert addition.seconds == pytest.approx(1.0) and addition.reached == pytest.approx(1 / 0.85)


def test_a_layer_is_what_a_deeper_pass_has_more() -> None:
    few = [roofline.Row("mm", 4, 40.0), roofline.Row("mul", 3, 9.0), roofline.Row("head: mm", 1, 5.0)]
    more = [
        roofline.Row("mm", 7, 70.0), roofline.Row("mul", 5, 15.0), roofline.Row("head: mm", 1, 5.0),
        roofline.Row("fused", 1, 2.0),
    ]  # fmt: skip
    found = roofline.more_of(few, more)
    assert found["products"] == {
        "kernels": 3,
        "bytes": 30.0,
        "by_kernel": {"mm": {"calls": 3, "bytes": 30.0}},
    }
    assert (found["small"]["kernels"], found["small"]["bytes"]) == (3, 8.0)
    assert set(found["small"]["by_kernel"]) == {"mul", "fused"}


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> Kernels:
    """The kernels that are launched on a device."""
    kernels = Kernels(lambda tensor: tensor)
    monkeypatch.setattr(Device, "current", SimpleNamespace(kernels=kernels))
    return kernels


def test_a_launch_counts_what_its_kernel_loads_and_stores(counted: Kernels) -> None:
    launch = Launch("_rope", ["q_ptr", "stride", "cos"], {"q_ptr": 2, "cos": 0.5})
    query, cosines = torch.zeros(3, 8, dtype=torch.bfloat16), torch.zeros(3, 4)
    launch[(3,)](query, 8, cosines, BLOCK_SIZE=8)
    ((_, _, name),) = counted.found
    (kernel,) = counted.found.values()
    assert (name, kernel.calls, kernel.bytes) == ("liger: rope", 1, 2 * 48 + 24)


def test_a_kernel_that_takes_other_tensors_than_were_read_in_its_source_is_refused(counted: Kernels) -> None:
    launch = Launch("_rope", ["q_ptr", "k_ptr"], {"q_ptr": 2})
    with pytest.raises(RuntimeError, match="_rope was given .*k_ptr.*, expected .'q_ptr'."):
        launch[(3,)](torch.zeros(3), torch.zeros(3))
    assert not counted.found


def test_ligers_kernels_have_the_tensors_that_are_counted() -> None:
    """Of the version that is installed; the counts themselves were read in its sources."""
    if not all(map(find_spec, roofline.LIGER)):
        pytest.skip("no liger_kernel, or no triton")
    for module, kernels in MOVED.items():
        ops = import_module(f"liger_kernel.ops.{module}")
        for name, moved in kernels.items():
            assert moved.keys() <= set(getattr(ops, name).arg_names), name
