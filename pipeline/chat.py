"""`python -m pipeline chat PATH`: talk to a policy in the terminal, or to two of them side by side.

Takes a policy's artifact (or a step, a run or a published model, which is imported) and lines of text; prints
the answers, as they come, to standard output and everything else to standard error, so that a pipe gets
answers alone. The model is read by plain transformers, as anybody would, and asked in the words of its own
chat template. Keeps nothing of what is said and trains nothing; torch is imported when there is a model to
load.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

from common import chat_template
from common.artifacts import UNVERIFIED, Artifact
from common.errors import UserError
from common.handoff import load_named
from common.inference_config import Settings
from common.stage import Role
from common.text import did_you_mean, printable
from pipeline.config import PipelineConfig
from pipeline.options import Options, fields_given
from pipeline.sources import artifact_of, models_below

if TYPE_CHECKING:
    import torch

COMMANDS = """\
/reset             forget the conversation and start the random numbers over
/system TEXT       tell the policy how to behave; without TEXT, nothing
/set               show the settings
/set NAME VALUE    temperature (0: always the likeliest token), top_p, top_k, max_new_tokens or seed
/help              this
/quit              leave (also Ctrl-D); Ctrl-C stops an answer
//TEXT             say something that begins with a slash"""

Message = dict[str, str]


def chat(arguments: Sequence[str]) -> int:
    """The verb: load, say what was loaded, and answer until there is nothing more to answer."""
    options = parse(arguments)
    settings = fields_given(Settings, options)
    if options.against == options.path:
        raise UserError(f"--against {options.against} is the policy itself", hint="name another one")
    named = {"PATH": options.path, **({} if options.against is None else {"--against": options.against})}
    chats = {
        path: Chat(policy_of(key, path, options.device), settings, options.system or "")
        for key, path in named.items()
    }
    for stream in (sys.stdin, sys.stdout):
        with contextlib.suppress(AttributeError):
            stream.reconfigure(errors="replace")  # type: ignore[union-attr]
    conversation = SideBySide(chats)
    if sys.stdin.isatty() and sys.stdout.isatty():
        note("/help lists the commands")
        return talk(conversation)
    for line in sys.stdin:  # of a pipe: one line is one turn, and an error is the end
        if not conversation.take(line, keep_interrupted=False):
            break
    return 0


def policy_of(key: str, path: str, device: str | None) -> Policy:
    """The policy that was named, loaded; says which one it is, and what is to be known of it."""
    place = artifact_of(path, Role.policy, key, models_below(PipelineConfig().output_dir), note)
    artifact = load_named(place, Role.policy, key, allow_unverified=True)
    if fault := artifact.manifest.details.get(UNVERIFIED):
        note(f"warning: it failed its check when it was exported: {fault}")
    policy = Policy(artifact, device)
    note(f"policy {artifact.path}, verified ({artifact.sha256[:12]}), on {policy.device}")
    if policy.variables:
        note(f"variables of its chat template, as it was trained: {policy.variables}")
    if not policy.has_template:
        note("it has no chat template: it goes on with what you type, each line by itself")
    return policy


def talk(conversation: SideBySide) -> int:
    """At a terminal: a prompt, and errors that end nothing."""
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  (editing and history, for input)
    while True:
        try:
            if not conversation.take(input("> ")):
                return 0
        except EOFError:
            print()
            return 0
        except KeyboardInterrupt:
            print()
            note("Ctrl-D or /quit leaves")
        except UserError as error:
            note(f"error: {error}")


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """The options as text; `Settings` checks the values. UserError for an option that does not exist."""
    parser = Options("chat", "PATH", "Talk to a policy in the terminal.")
    parser.add_argument("path", metavar="PATH", help="an artifact, a run, a model's folder, a hub model")
    parser.add_fields(Settings)
    parser.add_argument("--against", metavar="PATH", help="another policy, which answers everything too")
    parser.add_argument("--system", metavar="TEXT", help="how the policy should behave")
    parser.add_argument("--device", metavar="DEVICE", help="cpu or cuda; by default a GPU where there is one")
    return parser.parse_args(list(arguments))


def note(line: str) -> None:
    """Say something that is no answer."""
    print(line, file=sys.stderr, flush=True)


# --- The conversation ------------------------------------------------------------------------------


@dataclass
class Chat:
    """What was said so far, and how it goes on."""

    policy: Policy
    settings: Settings
    system: str = ""
    turns: list[Message] = field(default_factory=list)
    answered: int = 0  # since the random numbers were started over

    def take(self, line: str, *, keep_interrupted: bool = True) -> bool:
        """Answer a line or obey a command; false when that is to leave.

        keep_interrupted: Ctrl-C stops the answer, of which what was said stays said.
        """
        text = line.strip()
        if not text:
            return True
        if is_command(text):
            return self.obey(text)
        self.turns.append({"role": "user", "content": text.removeprefix("/") if text[0] == "/" else text})
        try:
            ids = self.fitting()
        except UserError:
            self.turns.pop()
            raise
        self.say(ids, keep_interrupted)
        return True

    def say(self, ids: list[int], keep_interrupted: bool) -> None:
        """Print the answer as it comes, and remember it."""
        answer = Answer(self.policy.decode)
        self.seed()
        try:
            self.policy.answer(ids, self.settings, answer)
        except KeyboardInterrupt:
            if not keep_interrupted:
                raise
            answer.end()
            note("(stopped)")
        else:
            if not answer.ids or answer.ids[-1] not in self.policy.terminators:
                note(f"(stopped after {len(answer.ids)} tokens; /set max_new_tokens N, within the context)")
        if answer.text.strip():
            self.turns.append({"role": "assistant", "content": answer.text})
        else:
            self.turns.pop()

    def fitting(self) -> list[int]:
        """The conversation as token ids [T]; turns that no longer fit beside an answer are forgotten.

        An answer has room for max_new_tokens or a quarter of the context, whichever is less.
        """
        context, turns = self.policy.context, list(self.turns)
        room = min(self.settings.max_new_tokens, context // 4)
        system = [{"role": "system", "content": self.system}] if self.system else []
        while len(ids := self.policy.render([*system, *turns])) + room > context and len(turns) > 1:
            del turns[:2]
        if len(ids) >= context:
            raise UserError(
                f"this has {len(ids)} tokens, and the policy's context is {context}", hint="say it shorter"
            )
        if dropped := (len(self.turns) - len(turns)) // 2:
            note(f"(the first {dropped} turn(s) no longer fit into {context} tokens and are forgotten)")
        self.turns = turns
        return ids

    def obey(self, text: str) -> bool:
        """Do what a command says; false when that is to leave. UserError when there is no such command."""
        name, _, rest = text[1:].partition(" ")
        rest = rest.strip()
        if name in ("quit", "exit"):
            return False
        if name == "help":
            note(COMMANDS)
        elif name == "reset":
            self.turns.clear()
            self.answered = 0
            note("(all is forgotten)")
        elif name == "system":
            self.system = rest
            note("(from the next answer on)" if rest else "(no system message)")
        elif name == "set":
            self.set(rest)
        else:
            known = ("reset", "system", "set", "help", "quit")
            raise UserError(f"unknown command /{name}", hint=did_you_mean(name, known, "/help", prefix="/"))
        return True

    def follow(self, other: Chat) -> None:
        """Be told what another conversation was told: settings, system message, a new beginning."""
        self.settings, self.system = other.settings, other.system
        if other.answered == 0:
            self.answered = 0
            if not other.turns:
                self.turns.clear()

    def set(self, rest: str) -> None:
        """`/set`, `/set NAME VALUE` or `/set NAME=VALUE`."""
        words = rest.replace("=", " ", 1).split()
        if words and len(words) != 2:
            raise UserError(f"/set {rest} is not understood", hint="e.g. /set temperature 0.7")
        if words:
            self.settings = self.settings.changed(*words)
        if words and words[0] == "seed":
            self.answered = 0
        note(str(self.settings))

    def seed(self) -> None:
        """The random numbers of an answer follow from the seed and its number, whoever else is asked."""
        import torch

        torch.manual_seed(self.settings.seed + self.answered)
        self.answered += 1


@dataclass
class SideBySide:
    """Conversations by the name of their policy, usually one: each is told the same, and remembers its own
    answers. Where there are several, a name stands before each answer."""

    chats: Mapping[str, Chat]

    def take(self, line: str, *, keep_interrupted: bool = True) -> bool:
        """As `Chat.take`. A command is obeyed once, and followed by the others."""
        first, *others = self.chats.values()
        if not others or not line.strip():
            return first.take(line, keep_interrupted=keep_interrupted)
        if is_command(line.strip()):
            goes_on = first.take(line)
            for chat in others:
                chat.follow(first)
            return goes_on
        for name, chat in self.chats.items():
            note(f"{name}:")
            chat.take(line, keep_interrupted=keep_interrupted)
        return True


def is_command(text: str) -> bool:
    """Whether a line, without white space around it, is none that the policy is told."""
    return text.startswith("/") and not text.startswith("//")


# --- The policy ------------------------------------------------------------------------------------


class Policy:
    """A policy as plain transformers loads it, on one device."""

    def __init__(self, artifact: Artifact, device: str | None) -> None:
        """UserError when the device is not there, or the model cannot be loaded onto it."""
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer
        from transformers.utils import logging

        logging.set_verbosity_error()
        logging.disable_progress_bar()
        self.device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        try:
            target = torch.device(self.device)
            self.tokenizer: Any = AutoTokenizer.from_pretrained(artifact.path)
            model: Any = AutoModelForCausalLM.from_pretrained(artifact.path, dtype="auto")
            self.model: Any = model.to(target).eval()
        except (OSError, ValueError, KeyError, ImportError, RuntimeError, AssertionError) as error:
            first = (str(error).splitlines() or [type(error).__name__])[0]
            raise UserError(
                f"{artifact.path} cannot be loaded onto {self.device}: {first}",
                hint="--device cpu runs anywhere",
            ) from error
        ends = self.model.generation_config.eos_token_id
        self.variables = artifact.template_variables
        self.terminators = tuple(ends) if isinstance(ends, list) else (ends,)
        text_config = self.model.config.get_text_config()
        self.context = int(getattr(text_config, "max_position_embeddings", None) or 2**31)

    @property
    def has_template(self) -> bool:
        return bool(self.tokenizer.chat_template)

    def render(self, messages: Sequence[Message]) -> list[int]:
        """The conversation up to where the answer begins, as token ids [T], in the words of the template."""
        if not self.has_template:
            return list(self.tokenizer(messages[-1]["content"])["input_ids"])
        name, hint = "the policy's chat template", "without a system message it may work: /system"
        options = {**self.tokenizer.special_tokens_map, **self.variables, "add_generation_prompt": True}
        fill_in = partial(chat_template.fill_in, name, self.tokenizer.get_chat_template(), options=options)
        try:
            ((text, _),) = chat_template.limit(fill_in, [list(messages)], name, hint=hint)
        except chat_template.RenderError as error:
            raise UserError(str(error), hint=hint) from None
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def answer(self, ids: Sequence[int], settings: Settings, answer: Answer) -> None:
        """Sample an answer to `ids` [T], token by token into `answer`."""
        import torch

        sampled = {"do_sample": False}
        if settings.temperature > 0:
            chosen = {name: getattr(settings, name) for name in ("temperature", "top_p", "top_k")}
            sampled = {"do_sample": True, **chosen}
        prompt = torch.tensor([list(ids)], device=self.model.device)
        with torch.inference_mode():
            self.model.generate(
                prompt,
                attention_mask=torch.ones_like(prompt),
                max_new_tokens=min(settings.max_new_tokens, self.context - len(ids)),
                streamer=answer,
                **sampled,
            )

    def decode(self, ids: Sequence[int]) -> str:
        """The text of an answer, without its terminator."""
        return str(self.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))


class Answer:
    """What `generate` streams its tokens into: prints them as text."""

    def __init__(self, decode: Callable[[Sequence[int]], str]) -> None:
        self.ids: list[int] = []
        self.text = ""
        self._decode, self._prompt_seen = decode, False

    def put(self, value: torch.Tensor) -> None:
        """Called with the prompt first, then with each token."""
        if not self._prompt_seen:
            self._prompt_seen = True
            return
        self.ids += value.reshape(-1).tolist()
        text = self._decode(self.ids)
        if not text.endswith("\ufffd"):  # a character of which some bytes are still to come
            self._show(text)

    def end(self) -> None:
        """Called after the last token."""
        self._show(self._decode(self.ids), end="\n")

    def _show(self, text: str, end: str = "") -> None:
        print(printable(text[len(self.text) :]), end=end, flush=True)
        self.text = text
