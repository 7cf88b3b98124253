"""Chat: what is sent to the policy, what reaches the terminal, and what each command does."""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
import time
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest

from common.errors import UserError
from common.handoff import load_named
from common.stage import Role
from common.text import printable
from pipeline import chat
from pipeline.chat import Chat, Settings
from pipeline.config import PROJECT
from tests.forked import ENVIRONMENT
from tests.pipeline.fakes import artifact
from tests.step2_dpo.runs import make_policy
from tests.tiny import CHATML, tiny_tokenizer

PATIENCE_SECONDS = 60
REORDERING = ("LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI")


class Echo:
    """In place of a policy: a token is a character, and the answer is always the same."""

    terminators = (0,)
    context = 40

    def __init__(self, says: str = "fine") -> None:
        self.says, self.seen = says, ""

    def render(self, messages: Sequence[dict[str, str]]) -> list[int]:
        return [ord(c) for message in messages for c in f"<{message['role'][0]}>{message['content']}"]

    def answer(self, ids: Sequence[int], settings: Settings, answer: chat.Answer) -> None:
        import torch

        self.seen = "".join(map(chr, ids))
        answer.put(torch.tensor([list(ids)]))
        for token in [*map(ord, self.says), 0]:
            answer.put(torch.tensor([token]))
        answer.end()

    def decode(self, ids: Sequence[int]) -> str:
        return "".join(chr(token) for token in ids if token)


def conversation(says: str = "fine") -> tuple[Chat, Echo]:
    echo = Echo(says)
    return Chat(cast(Any, echo), Settings(max_new_tokens=8)), echo


# --- The conversation ------------------------------------------------------------------------------


def test_what_was_said_before_is_sent_again_and_reset_forgets_it(capsys: pytest.CaptureFixture[str]) -> None:
    talk, echo = conversation()
    assert talk.take("one\n") and talk.take("two\n")
    assert echo.seen == "<u>one<a>fine<u>two"
    assert talk.take("/reset") and talk.take("three")
    assert echo.seen == "<u>three"
    assert capsys.readouterr().out == "fine\n" * 3


def test_a_system_message_comes_first_until_it_is_taken_back() -> None:
    talk, echo = conversation()
    talk.take("/system be brief")
    talk.take("one")
    assert echo.seen == "<s>be brief<u>one"
    talk.take("/system")
    talk.take("two")
    assert echo.seen == "<u>one<a>fine<u>two"


def test_oldest_turns_are_forgotten_with_a_note_and_the_system_message_stays(
    capsys: pytest.CaptureFixture[str],
) -> None:
    talk, echo = conversation()
    talk.take("/system s")
    for line in ("first", "second", "third"):
        talk.take(line)
    assert echo.seen == "<s>s<u>second<a>fine<u>third"  # 28 tokens; with the first turn 43 of 40
    assert "first 1 turn(s) no longer fit into 40 tokens" in capsys.readouterr().err


def test_a_line_longer_than_the_context_is_refused_and_changes_nothing() -> None:
    talk, echo = conversation()
    talk.take("one")
    with pytest.raises(UserError, match="this has 43 tokens, and the policy's context is 40"):
        talk.take("x" * 40)
    talk.take("two")
    assert echo.seen == "<u>one<a>fine<u>two"


def test_an_empty_line_says_nothing_and_two_slashes_begin_a_line_with_one() -> None:
    talk, echo = conversation()
    assert talk.take("  \n") and talk.turns == []
    talk.take("//etc is a folder")
    assert echo.seen == "<u>/etc is a folder"


def test_an_answer_without_words_leaves_no_turn_behind() -> None:
    talk, echo = conversation(says=" ")
    talk.take("one")
    talk.take("two")
    assert echo.seen == "<u>two"


def test_an_answer_that_was_stopped_by_its_length_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    talk, echo = conversation()
    talk.take("one")
    assert "stopped after" not in capsys.readouterr().err
    echo.terminators = (7,)
    talk.take("two")
    assert "(stopped after 5 tokens; /set max_new_tokens N" in capsys.readouterr().err


def test_quitting_ends_the_chat_and_a_mistyped_command_names_the_nearest() -> None:
    talk, _ = conversation()
    assert not talk.take("/quit") and not talk.take("/exit")
    with pytest.raises(UserError, match="unknown command /rest") as caught:
        talk.take("/rest")
    assert caught.value.hint == "did you mean /reset?"


def test_settings_change_in_the_chat_and_bad_ones_say_what_is_allowed() -> None:
    talk, _ = conversation()
    talk.take("/set temperature 0.25")
    talk.take("/set top-k=5")
    assert (talk.settings.temperature, talk.settings.top_k) == (0.25, 5)
    cases = {
        "/set temperature": "is not understood",
        "/set temprature 1": "did you mean temperature?",
        "/set top_k 1.5": "expected a whole number",
        "/set top_p 0": "allowed: above 0, up to 1",
        "/set temperature nan": "allowed: 0 (greedy), or 0.001 to 100",
    }
    for line, said in cases.items():
        with pytest.raises(UserError) as caught:
            talk.take(line)
        assert said in str(caught.value)
    assert talk.settings == Settings(0.25, top_k=5, max_new_tokens=8)


# --- What reaches the terminal ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain é 日本 👩‍🚀\ttab\nline", "plain é 日本 👩‍🚀\ttab\nline"),
        ("\x1b[31mred\x1b[0m", "␛[31mred␛[0m"),
        ("a\x1b]0;title\x07b\x1b]52;c;aGk=\x1b\\c", "a␛]0;title␇b␛]52;c;aGk=␛\\c"),
        ("\x9b2Jcleared\x9d0;title\x9c", "\\x9b2Jcleared\\x9d0;title\\x9c"),
        ("over\rwritten\x08\x00\x7f\x07", "over␍written␈␀␡␇"),
        ("\u202ereversed\u2066", "\\u202ereversed\\u2066"),
        ("half \ud800 a pair", "half \\ud800 a pair"),
    ],
)
def test_no_control_reaches_the_terminal_however_the_text_is_cut_into_pieces(text: str, shown: str) -> None:
    assert printable(text) == "".join(map(printable, text)) == shown
    assert not [c for c in shown if unicodedata.category(c) in ("Cc", "Cs") and c not in "\n\t"]


def test_every_control_code_there_is_is_replaced_or_left_out() -> None:
    every = "".join(map(chr, range(0x11_0000)))
    left = {c for c in printable(every) if unicodedata.category(c) in ("Cc", "Cs")}
    assert left == {"\n", "\t"}
    assert not [c for c in printable(every) if unicodedata.bidirectional(c) in REORDERING]


def test_a_character_is_shown_when_all_of_its_bytes_are_there(capsys: pytest.CaptureFixture[str]) -> None:
    import torch

    whole = "né日"
    answer = chat.Answer(lambda ids: whole.encode()[: len(ids)].decode(errors="replace"))
    answer.put(torch.zeros(1, 3))
    shown = []
    for token in whole.encode():
        answer.put(torch.tensor([token]))
        shown.append(capsys.readouterr().out)
    assert shown == ["n", "", "é", "", "", "日"]


# --- Which policy is meant -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "said"),
    [
        ("reward", "PATH=reward/export: is a reward_model, where a policy is needed"),
        ("only_reward", "PATH=only_reward holds a reward_model (only_reward/reward/export), where a policy"),
        ("nowhere", "PATH=nowhere: no such folder"),
        ("empty", "PATH=empty is not a finished artifact"),
    ],
)
def test_what_is_no_policy_is_refused_in_words(
    path: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    artifact(tmp_path / "reward" / "export", Role.reward_model)
    artifact(tmp_path / "only_reward" / "reward" / "export", Role.reward_model)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError) as caught:
        chat.chat([path])
    assert said in caught.value.message and caught.value.hint


# --- Two policies ------------------------------------------------------------------------------------


def side_by_side(*says: str) -> tuple[chat.SideBySide, list[Echo]]:
    made = [conversation(each) for each in says]
    return chat.SideBySide({f"policy {n}": talk for n, (talk, _) in enumerate(made)}), [e for _, e in made]


def test_both_answer_each_line_under_their_names_and_remember_their_own_answers(
    capsys: pytest.CaptureFixture[str],
) -> None:
    both, (left, right) = side_by_side("yes", "no")
    assert both.take("one") and both.take("two")
    printed = capsys.readouterr()
    assert printed.out == "yes\nno\n" * 2
    assert printed.err.splitlines() == ["policy 0:", "policy 1:"] * 2
    assert (left.seen, right.seen) == ("<u>one<a>yes<u>two", "<u>one<a>no<u>two")


def test_a_command_is_obeyed_by_both_and_said_once(capsys: pytest.CaptureFixture[str]) -> None:
    both, (left, right) = side_by_side("yes", "no")
    both.take("/system be brief")
    both.take("one")
    assert left.seen == right.seen == "<s>be brief<u>one"
    capsys.readouterr()
    both.take("/set temperature 0.5")
    assert capsys.readouterr().err.count("temperature=0.5") == 1
    assert {talk.settings.temperature for talk in both.chats.values()} == {0.5}
    both.take("/help")
    both.take("two")
    assert right.seen == "<s>be brief<u>one<a>no<u>two"  # nothing is forgotten by a command
    both.take("/reset")
    both.take("three")
    assert left.seen == right.seen == "<s>be brief<u>three"
    assert not both.take("/quit")


def test_an_answer_has_the_random_numbers_that_it_has_alone() -> None:
    import torch

    drawn: list[float] = []
    alone, _ = conversation()
    both, _ = side_by_side("yes", "no")
    for talk in (alone, *both.chats.values()):
        answer = talk.policy.answer
        talk.policy.answer = lambda *given, answer=answer: (  # type: ignore[method-assign]
            drawn.append(float(torch.rand(()))) or answer(*given)
        )
    for line in ("one", "two"):
        alone.take(line)
    for line in ("one", "two"):
        both.take(line)
    first, second = drawn[:2]
    assert first != second and drawn[2:] == [first, first, second, second]


def test_a_policy_is_not_compared_with_itself() -> None:
    with pytest.raises(UserError, match="is the policy itself"):
        chat.chat(["runs/first", "--against", "runs/first"])


# --- For real --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("chat")
    tiny_tokenizer(CHATML).save_pretrained(folder / "tokenizer")
    return make_policy(folder / "run" / "sft" / "export", folder / "tokenizer", max_position_embeddings=8192)


def command(*arguments: str | Path) -> list[str]:
    return [sys.executable, "-m", "pipeline", "chat", *map(str, arguments)]


ENVIRON = {**os.environ, **ENVIRONMENT, "PYTHONPATH": str(PROJECT)}


def piped(lines: str, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command(*arguments), input=lines, env=ENVIRON, capture_output=True, text=True)


def test_a_pipe_gets_the_greedy_answers_of_plain_transformers_and_nothing_else(policy: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model: Any = AutoModelForCausalLM.from_pretrained(policy)
    tokenizer: Any = AutoTokenizer.from_pretrained(policy)
    said, messages = "", []
    for line in ("hello", "and again"):
        messages.append({"role": "user", "content": line})
        inputs = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_dict=True, return_tensors="pt"
        )
        new = model.generate(**inputs, do_sample=False, max_new_tokens=12)[0, inputs["input_ids"].shape[1] :]
        text = tokenizer.decode(new, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        messages.append({"role": "assistant", "content": text})
        said += printable(text) + "\n"
    done = piped("hello\n\nand again\n", policy.parents[1], "--temperature", "0", "--max-new-tokens", "12")
    assert done.returncode == 0, done.stderr
    assert done.stdout == said and len(said) > 4
    assert f"policy {policy}, verified (" in done.stderr


@pytest.mark.slow
def test_the_same_seed_gives_the_same_answers_and_an_error_ends_a_pipe(policy: Path) -> None:
    answers = []
    sessions = (
        (3, "hello\n/reset\nhello\n/set seed 4\n/reset\nhello\n"),
        (4, "/set seed 3\nhello\n/set top_p 2\nhello\n"),
    )
    for seed, lines in sessions:
        done = piped(lines, policy, "--temperature", "1.5", "--max-new-tokens", "20", "--seed", str(seed))
        answers.append(done.stdout)
    assert len(answers[1]) > 10 and answers[0].startswith(2 * answers[1])
    assert answers[0].removeprefix(2 * answers[1]) not in ("", answers[1])
    assert done.returncode == 2  # in a pipe an error is the end
    assert "error: top_p=2.0 is not allowed" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--top-p", "2"], "top_p=2.0 is not allowed"),
        (["--tempo", "2"], "chat: unrecognized arguments: --tempo 2"),
        (["--device", "nonsense"], "cannot be loaded onto nonsense"),
    ],
)
def test_an_option_that_cannot_be_is_the_users_to_fix(policy: Path, options: list[str], said: str) -> None:
    with pytest.raises(UserError, match=said):
        chat.chat([str(policy), *options])


def test_a_template_that_refuses_a_system_message_is_the_users_to_work_around(policy: Path) -> None:
    model = chat.Policy(load_named(str(policy), Role.policy, "PATH"), "cpu")
    model.tokenizer.chat_template = "{{ raise_exception('no system message') }}"
    with pytest.raises(UserError, match="refuses it: no system message"):
        model.render([{"role": "system", "content": "s"}])


def test_without_a_chat_template_a_line_is_gone_on_with_by_itself(policy: Path) -> None:
    model = chat.Policy(load_named(str(policy), Role.policy, "PATH"), "cpu")
    model.tokenizer.chat_template = None
    messages = [{"role": "user", "content": text} for text in ("forgotten", "hello")]
    assert not model.has_template and model.decode(model.render(messages)) == "hello"


def test_a_policy_is_asked_with_the_variables_that_its_rows_were_rendered_with(policy: Path) -> None:
    artifact = load_named(str(policy), Role.policy, "PATH")
    recorded = {**artifact.manifest.details, "data": {"chat_template_kwargs": {"quiet": True}}}
    trained = replace(artifact, manifest=replace(artifact.manifest, details=recorded))
    for made, answer in ((trained, "ok"), (artifact, "hello")):
        model = chat.Policy(made, "cpu")
        model.tokenizer.chat_template = "{{ 'ok' if quiet else 'hello' }}"
        assert model.decode(model.render([{"role": "user", "content": "u"}])) == answer


@pytest.mark.slow
def test_ctrl_c_stops_the_answer_and_not_the_chat(policy: Path) -> None:
    ours, theirs = os.openpty()
    arguments = command(policy, "--temperature", "0", "--max-new-tokens", "100000")
    process = subprocess.Popen(arguments, stdin=theirs, stdout=theirs, stderr=theirs, env=ENVIRON)
    os.close(theirs)
    try:
        wait_for(ours, "> ")
        os.write(ours, b"hello\n")
        wait_for(ours, "hello\r\n", then=10)
        process.send_signal(signal.SIGINT)
        wait_for(ours, "(stopped)")
        wait_for(ours, "> ")
        # sent again: readline sees one that comes between its prompt and its wait only with the next key
        wait_for(ours, "Ctrl-D or /quit leaves", meanwhile=lambda: process.send_signal(signal.SIGINT))
        os.write(ours, b"/quit\n")
        assert process.wait(PATIENCE_SECONDS) == 0
    finally:
        process.kill()
        os.close(ours)


def wait_for(terminal: int, text: str, then: int = 0, meanwhile: Callable[[], None] = lambda: None) -> None:
    """Read what a terminal shows until it holds `text` and so many characters more. meanwhile: in silence."""
    shown, end = "", time.monotonic() + PATIENCE_SECONDS
    while text not in shown or len(shown.partition(text)[2]) < then:
        assert time.monotonic() < end, shown
        if select.select([terminal], [], [], 0.5)[0]:
            shown += os.read(terminal, 1).decode(errors="replace")
        else:
            meanwhile()
    assert "Traceback" not in shown
