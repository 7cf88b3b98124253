from common.errors import UserError


def test_keys_that_exist_once_per_step_get_its_name_and_files_do_not() -> None:
    error = UserError(
        "data.jsonl:3: no completion; runs/data.path and data.max_length=8, optim.lr=0",
        hint="see data.on_bad_row=skip, sft.data.path, train.max_steps or model.path",
    ).in_step("sft")
    assert error.message == (
        "data.jsonl:3: no completion; runs/data.path and sft.data.max_length=8, sft.optim.lr=0"
    )
    assert error.hint == "see sft.data.on_bad_row=skip, sft.data.path, sft.train.max_steps or model.path"


def test_an_error_without_a_way_out_stays_without() -> None:
    assert UserError("nothing here").in_step("sft").hint is None
