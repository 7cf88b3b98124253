"""Chat templates of the field x kinds of rows: what is trained beside what the template itself renders.

    python -m benchmarks.chat_templates            about a minute; writes results/chat_templates.txt
    python -m benchmarks.chat_templates FILE ...    templates of your own; prints only

Templates are those of the installed TRL. For each trained turn transformers alone renders the turns before it
with the generation prompt, and the turns through it; what is trained must be the difference of the two behind
the former, byte for byte, and every part of the row must stand in the text. A cell where it is not, and no
reason is given, is silent: there must be none.
"""

from __future__ import annotations

import argparse
import importlib.util
import itertools
import json
import re
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from benchmarks.measure import PROJECT
from common.data import chat, formats
from common.data.outcomes import Drop, RowError
from common.data.types import IGNORE, Conversation, Place, RawExample
from common.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

BOS, EOS = "<s>", "</s>"

EXACT, SPLIT, OPENED = "=", "s", "o"
UNTRAINED, REFUSED, OVER, SILENT = "n", "r", "R", "!"

LEGEND = {
    EXACT: "trained: the bytes that the template renders for the turn behind its own prompt",
    SPLIT: "trained so, the row split into a document for each turn",
    OPENED: "trained behind its own prompt, though the template does not render the two together",
    UNTRAINED: "a turn is not trained, and counted with a reason",
    REFUSED: "the row is refused with a reason; the template has no form of it, or not every part",
    OVER: "the row is refused with a reason though the template writes all of it",
    SILENT: "something else is trained and nobody is told",
}

# rows: every word that must come up in the text is written nowhere else


def _user(content: str) -> dict[str, Any]:
    return {"role": "user", "content": content}


def _answer(content: str, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content, **more}


def _call(city: str, number: int = 1) -> dict[str, Any]:
    function = {"name": "find_weather", "arguments": {"city": city}}
    return {"id": f"abcdefgh{number}", "type": "function", "function": function}


def _result(content: str, number: int = 1) -> dict[str, Any]:
    return {
        "role": "tool",
        "tool_call_id": f"abcdefgh{number}",
        "name": "find_weather",
        "content": content,
    }


SYSTEM = {"role": "system", "content": "Answer briefly."}
ASKED, ANSWERED = _user("Name a river."), _answer("The Elbe.")
WEATHER = _user("Is it cold in the north?")
TOOL = {
    "type": "function",
    "function": {
        "name": "find_weather",
        "description": "Weather of a place",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "description": "Which place"}},
            "required": ["city"],
        },
    },
}
THOUGHT = "It flows in Europe."
CALLED = [WEATHER, _answer("", tool_calls=[_call("Oslo")]), _result("3 degrees"), _answer("Yes, very.")]

ROWS: dict[str, dict[str, Any]] = {
    "one turn": {"messages": [ASKED, ANSWERED]},
    "several turns": {"messages": [ASKED, ANSWERED, _user("Another?"), _answer("The Oder.")]},
    "system": {"messages": [SYSTEM, ASKED, ANSWERED]},
    "system, several turns": {
        "messages": [SYSTEM, ASKED, ANSWERED, _user("Another?"), _answer("The Oder.")],
    },
    "thinking off, several turns": {
        "messages": [ASKED, ANSWERED, _user("Another?"), _answer("The Oder.")],
        "chat_template_kwargs": {"enable_thinking": False},
    },
    "empty prompt": {"messages": [_user(""), ANSWERED]},
    "tools": {"messages": [ASKED, ANSWERED], "tools": [TOOL]},
    "system, tools": {"messages": [SYSTEM, ASKED, ANSWERED], "tools": [TOOL]},
    "call": {"messages": CALLED[:2], "tools": [TOOL]},
    "call with words": {
        "messages": [WEATHER, _answer("I look it up.", tool_calls=[_call("Oslo")])],
        "tools": [TOOL],
    },
    "call, result, answer": {"messages": CALLED, "tools": [TOOL]},
    "call without tools": {"messages": CALLED},
    "two calls": {
        "messages": [
            WEATHER,
            _answer("", tool_calls=[_call("Oslo"), _call("Narvik", 2)]),
            _result("3 degrees"),
            _result("1 degree", 2),
            _answer("Yes, very."),
        ],
        "tools": [TOOL],
    },
    "arguments as text": {
        "messages": [
            WEATHER,
            _answer(
                "",
                tool_calls=[
                    {
                        "id": "abcdefgh1",
                        "type": "function",
                        "function": {"name": "find_weather", "arguments": '{"city": "Oslo"}'},
                    }
                ],
            ),
        ],
        "tools": [TOOL],
    },
    "reasoning": {"messages": [ASKED, _answer("The Elbe.", reasoning_content=THOUGHT)]},
    "reasoning, several turns": {
        "messages": [
            ASKED,
            _answer("The Elbe.", reasoning_content=THOUGHT),
            _user("Another?"),
            _answer("The Oder.", reasoning_content="It is near."),
        ]
    },
    "reasoning and call": {
        "messages": [
            WEATHER,
            _answer("", reasoning_content="I need to ask.", tool_calls=[_call("Oslo")]),
            _result("3 degrees"),
            _answer("Yes, very.", reasoning_content="That is little."),
        ],
        "tools": [TOOL],
    },
    "think in content": {
        "messages": [
            ASKED,
            _answer(f"<think>\n{THOUGHT}\n</think>\n\nThe Elbe."),
            _user("Another?"),
            _answer("<think>\nIt is near.\n</think>\n\nThe Oder."),
        ]
    },
}


@dataclass(frozen=True)
class Cell:
    """What became of a row under a template: a key of LEGEND, and the reason or the evidence."""

    kind: str
    detail: str = ""


# the template alone


@dataclass(frozen=True)
class Expected:
    """A turn behind its prompt as transformers renders it, in one of the forms that a template may take."""

    prompt: str
    turn: str

    def is_trained(self, prompt: str, turn: str) -> bool:
        """Whether these are what was trained: what follows the terminator at the very end is not."""
        rest = self.turn[len(turn) :]
        return (
            prompt == self.prompt
            and bool(turn)
            and self.turn.startswith(turn)
            and not rest.replace(EOS, "").strip()
        )


def variants(row: Mapping[str, Any]) -> Iterator[list[dict[str, Any]]]:
    """The row's turns in every form that templates are known to take."""
    for as_text, as_parts, bare in itertools.product((False, True), repeat=3):
        yield [_in_form(turn, as_text, as_parts, bare) for turn in row["messages"]]


def _in_form(turn: dict[str, Any], as_text: bool, as_parts: bool, bare: bool) -> dict[str, Any]:
    made = dict(turn)
    if as_parts:
        made["content"] = [{"type": "text", "text": turn["content"]}]
    if "tool_calls" in turn:
        made["tool_calls"] = [_call_in_form(call, as_text, bare) for call in turn["tool_calls"]]
    return made


def _call_in_form(call: dict[str, Any], as_text: bool, bare: bool) -> dict[str, Any]:
    arguments = call["function"]["arguments"]
    arguments = json.loads(arguments) if isinstance(arguments, str) else arguments
    function = {**call["function"], "arguments": json.dumps(arguments) if as_text else arguments}
    return {**call, **function} if bare else {**call, "function": function}


def expected(row: Mapping[str, Any], index: int, tokenizer: PreTrainedTokenizerFast) -> list[Expected]:
    """Turn `index` of the row in all forms in which the template writes every part of it."""
    found: dict[Expected, None] = {}
    for turns in variants(row):
        try:
            prompt = _rendered(turns[:index], row, tokenizer, add_generation_prompt=True)
            text = _rendered(turns[: index + 1], row, tokenizer)
        except Exception:  # noqa: S112 - a template refuses in as many ways as Python has
            continue
        if text.startswith(prompt) and not missing(row, index, text):
            found[Expected(prompt, text[len(prompt) :])] = None
    return list(found)


def _rendered(
    turns: list[dict[str, Any]], row: Mapping[str, Any], tokenizer: PreTrainedTokenizerFast, **options: Any
) -> str:
    options |= row.get("chat_template_kwargs", {})
    text = tokenizer.apply_chat_template(turns, tools=row.get("tools"), tokenize=False, **options)
    return str(text)


def missing(row: Mapping[str, Any], index: int, text: str) -> list[str]:
    """Parts of the row through turn `index` that do not stand in a text as they should.

    Reasoning of earlier turns is no part of what a model is given; words beside a call may be.
    """
    wanted = ["Weather of a place", "Which place"] if row.get("tools") else []
    for number, turn in enumerate(row["messages"][: index + 1]):
        *inside, words = turn["content"].split("</think>")
        wanted += words.strip().splitlines()
        if number == index:
            wanted += [turn.get("reasoning_content", ""), *inside[-1:]]
        for call in turn.get("tool_calls", []):
            arguments = call["function"]["arguments"]
            arguments = json.loads(arguments) if isinstance(arguments, str) else arguments
            wanted += [call["function"]["name"], *arguments, *arguments.values()]
    lost = [part for part in wanted if part.replace("<think>", "").strip() not in text]
    printed = [form for form in ("{'city'", '{\\"city\\"') if form in text]
    return lost + printed


# both side by side


def judge(row: Mapping[str, Any], tokenizer: PreTrainedTokenizerFast) -> Cell:
    """What becomes of a row, and whether it is what the template alone would have trained."""
    wanted = [index for index, turn in enumerate(row["messages"]) if turn["role"] == "assistant"]
    alone = {index: expected(row, index, tokenizer) for index in wanted}
    try:
        conversation = _read(row)
        (made,) = chat.tokenize([conversation], tokenizer)
    except (UserError, RowError) as error:
        return _refused(str(error), alone)
    if isinstance(made, Drop):
        return _refused(made.reason, alone)
    opened, trained = False, []
    for record in made.records:
        for prompt, turn in trained_parts(record.input_ids, record.labels, tokenizer):
            index = next((i for i in wanted if any(each.is_trained(prompt, turn) for each in alone[i])), None)
            if index is None:
                index = next((i for i in wanted if _is_opened(row, i, prompt, turn, tokenizer)), None)
                opened = True
            if index is None:
                return Cell(SILENT, f"trained behind {prompt[-40:]!r}: {turn!r}")
            trained.append(index)
    if len(set(trained)) != len(trained) or len(trained) + len(made.untrained) != len(wanted):
        return Cell(SILENT, f"{len(wanted)} turns, trained {trained}, counted {len(made.untrained)}")
    if made.untrained:
        return Cell(UNTRAINED, made.untrained[0])
    return Cell(OPENED if opened else SPLIT if len(made.records) > 1 else EXACT, made.split)


def _read(row: Mapping[str, Any]) -> Conversation:
    raw = RawExample(row, "rows", Place("rows", 1))
    return formats.to_conversation(raw, formats.recognise(row))


def _refused(reason: str, alone: Mapping[int, list[Expected]]) -> Cell:
    return Cell(OVER if all(alone.values()) else REFUSED, reason)


def trained_parts(
    ids: np.ndarray, labels: np.ndarray, tokenizer: PreTrainedTokenizerFast
) -> Iterator[tuple[str, str]]:
    """Each run of trained tokens of a document, behind all that stands before it."""
    is_trained = np.concatenate([[False], labels[:-1] != IGNORE])
    assert np.array_equal(labels[:-1][is_trained[1:]], ids[1:][is_trained[1:]])
    edges = np.flatnonzero(np.diff(np.concatenate([[0], is_trained.astype(np.int8), [0]])))
    for start, end in zip(edges[0::2], edges[1::2], strict=True):
        yield _text(ids[:start], tokenizer), _text(ids[start:end], tokenizer)


def _text(ids: np.ndarray, tokenizer: PreTrainedTokenizerFast) -> str:
    text = tokenizer.decode(ids.tolist(), skip_special_tokens=False, clean_up_tokenization_spaces=False)
    return str(text)


def _is_opened(
    row: Mapping[str, Any], index: int, prompt: str, turn: str, tokenizer: PreTrainedTokenizerFast
) -> bool:
    """Whether a turn stands behind its own prompt, though the template does not write the two together.

    Its reasoning is opened by the prompt, and it is its own parts alone; or earlier turns lose some later.
    """
    prompts, texts = [], []
    for turns in variants(row):
        try:
            prompts.append(_rendered(turns[:index], row, tokenizer, add_generation_prompt=True))
            texts.append(_rendered(turns[: index + 1], row, tokenizer))
        except Exception:  # noqa: S112 - as in `expected`
            continue
    if prompt not in prompts or missing(row, index, prompt + turn):
        return False
    if prompt.rstrip().endswith(("<think>", "</think>")):
        return _is_its_parts(row["messages"][index], prompt[prompt.rindex("<think>") :], turn)
    return any(text.endswith(turn) for text in texts)


def _is_its_parts(said: Mapping[str, Any], opened: str, turn: str) -> bool:
    """Whether reasoning and words follow each other through what the prompt opened and the turn, once."""
    *inside, words = said["content"].split("</think>")
    thought = said.get("reasoning_content", "".join(inside)).replace("<think>", "")
    written = re.sub(r"\s+", "", _MARKERS.sub("", opened + turn).replace(EOS, ""))
    return written == re.sub(r"\s+", "", f"<think>{thought}</think>{words}")


def tokenizer_of(template: str) -> PreTrainedTokenizerFast:
    """A tokenizer of bytes that knows the template's own tokens, so that every text comes back as it was."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={byte: number for number, byte in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = dict.fromkeys([BOS, EOS, *_MARKERS.findall(template)])
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    plain = [token for token in ("<think>", "</think>") if token in template]
    tokenizer.add_tokens([AddedToken(token, special=False, normalized=False) for token in plain])
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=BOS, eos_token=EOS)
    wrapped.chat_template = template
    return wrapped


_MARKERS = re.compile(
    r"<[|｜][^|｜<>\s'\"]+[|｜]?>|<[^|｜<>\s'\"]+[|｜]>|<(?:start|end)_of_(?:turn|utterance)>|\[/?INST\]"
)


# the table


def trl_templates() -> dict[str, str]:
    """The templates of the installed TRL by name; empty when it is not installed."""
    found = importlib.util.find_spec("trl")
    if found is None or not found.submodule_search_locations:
        return {}
    folder = Path(next(iter(found.submodule_search_locations))) / "chat_templates"
    return {path.stem: path.read_text() for path in sorted(folder.glob("*.jinja"))}


def sweep(templates: Mapping[str, str]) -> dict[str, dict[str, Cell]]:
    """Every row under every template."""
    table = {}
    for name, text in templates.items():
        tokenizer = tokenizer_of(text)
        table[name] = {row: judge(columns, tokenizer) for row, columns in ROWS.items()}
    return table


def lines_of(table: Mapping[str, Mapping[str, Cell]]) -> list[str]:
    """The table, what its letters mean, how many cells there are of each, and the reasons."""
    letters = "abcdefghijklmnopqrstuvwxyz"
    width = max(map(len, table))
    lines = [f"{letter}  {row}" for letter, row in zip(letters, ROWS, strict=False)]
    lines += ["", f"{'':{width}}  {' '.join(letters[: len(ROWS)])}"]
    for name, cells in table.items():
        lines.append(f"{name:{width}}  {' '.join(cells[row].kind for row in ROWS)}")
    kinds = Counter(cell.kind for cells in table.values() for cell in cells.values())
    lines += ["", *(f"{kinds[kind]:5}  {kind}  {meaning}" for kind, meaning in LEGEND.items()), "", "reasons"]
    reasons = Counter(
        (cell.kind, _shortened(cell.detail))
        for cells in table.values()
        for cell in cells.values()
        if cell.detail
    )
    return lines + [f"{count:5}  {kind}  {reason}" for (kind, reason), count in reasons.most_common()]


def _shortened(reason: str) -> str:
    first = reason.split("\n")[0]
    return first if len(first) <= 150 else first[:147] + "..."


def main(arguments: Sequence[str] | None = None) -> int:
    """Judge, print, write; 1 when a cell is silent."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.chat_templates", description=__doc__)
    parser.add_argument("files", nargs="*", type=Path, help="templates; by default those of TRL")
    parser.add_argument("--results", type=Path, default=PROJECT / "benchmarks" / "results")
    args = parser.parse_args(arguments)
    templates = {path.stem: path.read_text() for path in args.files} or trl_templates()
    if not templates:
        print("TRL is not installed (pip install -e '.[bench]'), and no template is named", file=sys.stderr)
        return 2
    table = sweep(templates)
    lines = lines_of(table)
    print("\n".join(lines))
    if not args.files:
        head = [f"python -m benchmarks.chat_templates   ({len(table)} templates, {len(ROWS)} rows)", ""]
        args.results.mkdir(parents=True, exist_ok=True)
        (args.results / "chat_templates.txt").write_text("\n".join([*head, *lines, ""]))
    return int(any(cell.kind == SILENT for cells in table.values() for cell in cells.values()))


if __name__ == "__main__":
    sys.exit(main())
