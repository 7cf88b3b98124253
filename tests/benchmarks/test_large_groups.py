from benchmarks import large_groups


def test_only_what_lies_on_a_line_is_extended() -> None:
    assert large_groups.extended([7, 10, 13], 1, 32) == 7 + 31 * 3
    assert large_groups.extended([10, 13, 16], 2, 32) == 7 + 31 * 3
    assert large_groups.extended([7, 7, 7], 1, 80) == 7
    assert large_groups.extended([7, 10, 14], 1, 32) is None


def test_calls_and_bytes_are_those_of_the_second_step() -> None:
    collectives = [
        ["step", 1, "all_gather_", 9, 900],
        ["step", 2, "all_gather_", 2, 20],
        ["update", 2, "all_gather_", 1, 5],
    ]
    assert large_groups.sent({"collectives": collectives}) == {"all_gather calls": 3, "all_gather bytes": 25}
