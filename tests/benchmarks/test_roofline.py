import pytest

from benchmarks import roofline


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
