"""The tokenizer of a step: loaded or trained, with pad, eos and chat template settled.

Takes a `ModelConfig`; returns a fast tokenizer of transformers. Does not tokenize rows, and needs no torch.
`loading.py` makes the embeddings of the tokens that are added here.
"""

from __future__ import annotations

import logging
import os
import platform
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from common.artifacts import MANIFEST, Damaged, Manifest, hash_files, verify, write_manifest
from common.config import ModelConfig
from common.data.chat import find_terminators
from common.errors import UserError
from common.files import disk_errors
from common.model.hub import loading_errors, locate
from common.notices import notice
from common.text import nearest, one_line
from common.tokenizer_files import check_tokenizer_files

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

log = logging.getLogger("rlhf.models")

TEMPLATE_FOLDER = Path(__file__).resolve().parents[2] / "conf" / "chat_template"
TRAINED_SPECIAL_TOKENS = ("<pad>", "<s>", "</s>", "<|im_start|>", "<|im_end|>")
CHATML_TOKENS = ("<|im_start|>", "<|im_end|>")
MOST_UNUSED_IDS = 2**17
"""Ids that a vocabulary may leave out."""

# Tokens that tokenizers ship for padding, or for nothing yet, or to end a text that is not a turn; in
# the order in which they are taken for padding.
SPARE_TOKENS = (
    r"<pad>|\[PAD\]|<\|pad\|>|<\|padding\|>|<\|finetune_right_pad_id\|>",
    r"<\|?reserved_special_token_\d+\|?>|<unused\d+>|<\|extra_\d+\|>|<SPECIAL_\d+>|<\|dummy_\d+\|>",
    r"<\|end_?of_?text\|>",
)


def load_tokenizer(
    model: ModelConfig,
    training_texts: Callable[[], Iterator[str]] | None = None,
    save_to: Path | None = None,
) -> PreTrainedTokenizerFast:
    """The tokenizer that `model` names, with a pad distinct from eos, an eos, and a chat template if named.

    From `model.tokenizer.path`, else trained on `training_texts()` to `model.tokenizer.train_vocab_size`,
    else from `model.path`. A trained one is kept in `save_to` and taken from there the next time, so that
    ranks and resumed runs agree. UserError: damaged, not found, not a fast tokenizer, no eos, no network.
    """
    size = model.tokenizer.train_vocab_size
    if model.tokenizer.path is not None:
        tokenizer = _read_tokenizer(model.tokenizer.path, None, "model.tokenizer.path", model)
    elif size is not None:
        tokenizer = _trained_tokenizer(size, training_texts, save_to)
    elif model.path is not None:
        tokenizer = _read_tokenizer(model.path, model.revision, "model.path", model)
    else:
        raise UserError(
            "model.config needs a tokenizer",
            hint="set model.tokenizer.path=FOLDER_OR_HUB_NAME or model.tokenizer.train_vocab_size=4096",
        )
    _set_template(tokenizer, model)
    _settle_eos(tokenizer)
    _settle_pad(tokenizer)
    return tokenizer


def train_tokenizer(texts: Iterator[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE of at most `vocab_size` tokens; the same texts give the same tokenizer.

    Digits are tokens of their own, which makes arithmetic learnable for small models. Nothing is added
    around a text: templates write what is needed.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    smallest = 256 + len(TRAINED_SPECIAL_TOKENS)
    if vocab_size < smallest:
        raise UserError(
            f"model.tokenizer.train_vocab_size={vocab_size} is not allowed",
            hint=f"allowed: {smallest} or more (256 bytes and {len(TRAINED_SPECIAL_TOKENS)} special tokens)",
        )
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(TRAINED_SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokens = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>"}
    trained = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **tokens)
    trained.chat_template = read_template("chatml")
    return trained


def read_template(name: str) -> str:
    """The Jinja text of a named chat template, or of a file."""
    path = TEMPLATE_FOLDER / f"{name}.jinja"
    if not path.is_file():
        path = Path(name).expanduser()
    if not path.is_file():
        known = sorted(p.stem for p in TEMPLATE_FOLDER.glob("*.jinja"))
        near = nearest(name, known)
        raise UserError(
            f"model.chat_template={name} is neither a template nor a file",
            hint=(f"did you mean {near[0]}? " if near else "") + f"known: {', '.join(known)}",
        )
    try:
        return path.read_text(encoding="utf-8")
    except (UnicodeDecodeError, OSError) as error:
        raise UserError(f"model.chat_template={name} cannot be read: {one_line(error)}") from error


def terminators_of(tokenizer: PreTrainedTokenizerFast) -> tuple[int, ...]:
    """Ids that end a turn, ascending: what the chat template ends turns with, or eos without one."""
    if tokenizer.chat_template:
        return find_terminators(tokenizer)
    return (cast(int, tokenizer.eos_token_id),)


def ending_tokens(tokenizer: PreTrainedTokenizerFast) -> set[int]:
    """Ids that end a turn or a text. Those of a chat template that cannot be used are left out."""
    try:
        terminators = terminators_of(tokenizer)
    except UserError:  # reported where the template is checked
        terminators = ()
    return {cast(int, tokenizer.eos_token_id), *terminators}


def _read_tokenizer(path: str, revision: str | None, key: str, model: ModelConfig) -> PreTrainedTokenizerFast:
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    where, commit = locate(path, revision, key)
    if commit is None:
        check_tokenizer_files(Path(where), key)
    with loading_errors(path, key):
        tokenizer = AutoTokenizer.from_pretrained(
            where, revision=commit, trust_remote_code=model.trust_remote_code
        )
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise UserError(
            f"{key}={path} has a slow tokenizer ({type(tokenizer).__name__})",
            hint="character offsets are needed to place masks: name a tokenizer with a tokenizer.json",
        )
    last, id = max(tokenizer.get_vocab().items(), key=lambda item: item[1], default=("", 0))
    if id >= len(tokenizer) + MOST_UNUSED_IDS:
        raise UserError(
            f"{key}={path} gives {last[:60]!r} the id {id}, and has {len(tokenizer)} tokens",
            hint="a model has an embedding for every id up to the last: name one whose ids are in use",
        )
    return tokenizer


def _trained_tokenizer(
    size: int, texts: Callable[[], Iterator[str]] | None, save_to: Path | None
) -> PreTrainedTokenizerFast:
    from transformers import AutoTokenizer

    if save_to is not None and save_to.exists():
        _check_kept(save_to)
        return cast("PreTrainedTokenizerFast", AutoTokenizer.from_pretrained(save_to))
    if texts is None:
        raise ValueError("training a tokenizer needs texts")
    tokenizer = train_tokenizer(texts(), size)
    if len(tokenizer) < size:
        notice(
            f"the tokenizer has {len(tokenizer)} tokens, not the {size} of model.tokenizer.train_vocab_size",
            "the texts give no more",
        )
    if save_to is None:
        return tokenizer
    _keep(tokenizer, save_to)
    return cast("PreTrainedTokenizerFast", AutoTokenizer.from_pretrained(save_to))


def _keep(tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Save into `folder` by a rename: it is there whole or not at all. The first of several nodes wins."""
    partial = folder.with_name(f".{folder.name}.{platform.node()}.{os.getpid()}.tmp")
    with disk_errors(folder):
        partial.mkdir(parents=True)
        tokenizer.save_pretrained(partial)
        write_manifest(partial, Manifest("tokenizer", None, hash_files(partial)))
        try:
            os.replace(partial, folder)
        except OSError:
            shutil.rmtree(partial)
            if not (folder / "tokenizer.json").is_file():
                raise


def _check_kept(folder: Path) -> None:
    """UserError for a kept tokenizer that is damaged: all rows would be read with it."""
    if not (folder / MANIFEST).exists() and (folder / "tokenizer.json").is_file():
        notice(f"{folder} is not checked for damage", "it was kept by a version that recorded no hashes")
        return
    try:
        verify(folder)
    except Damaged as error:
        way_out = f"restore it from a copy, or rm -r {folder}: it is trained again on the same rows"
        raise UserError(error.message, hint=way_out) from None


def _set_template(tokenizer: PreTrainedTokenizerFast, model: ModelConfig) -> None:
    """The template that was named, whatever the tokenizer had; ChatML's two tokens are added if missing."""
    name = model.chat_template
    if name is None:
        return
    if tokenizer.chat_template:
        notice("the tokenizer's own chat template is not used", f"model.chat_template={name} is set")
    text = read_template(name)
    tokenizer.chat_template = text
    tokenizer.chat_template_file = name  # for errors
    known = tokenizer.get_vocab()
    missing = [token for token in CHATML_TOKENS if token in text and token not in known]
    if missing:
        tokenizer.add_special_tokens(
            {"additional_special_tokens": missing}, replace_extra_special_tokens=False
        )
        notice(f"{', '.join(missing)} are added to the vocabulary", "the chat template writes them")


def _settle_eos(tokenizer: PreTrainedTokenizerFast) -> None:
    if tokenizer.eos_token is not None:
        return
    ends = find_terminators(tokenizer) if tokenizer.chat_template else ()
    if not ends:
        raise UserError(
            f"the tokenizer {tokenizer.name_or_path} has no eos token and no chat template that ends turns",
            hint="set model.chat_template=chatml, or name a tokenizer with an eos token",
        )
    tokenizer.eos_token = cast(str, tokenizer.convert_ids_to_tokens(ends[0]))
    log.info("eos is %s, with which the chat template ends turns", tokenizer.eos_token)


def _settle_pad(tokenizer: PreTrainedTokenizerFast) -> None:
    """A pad that is neither eos nor a terminator: where they are one, a model never learns to stop."""
    taken = {tokenizer.bos_token_id, *ending_tokens(tokenizer)}
    if tokenizer.pad_token_id is not None and tokenizer.pad_token_id not in taken:
        return
    spare = _spare_token(tokenizer, taken)
    if spare is None:
        tokenizer.add_special_tokens({"pad_token": "<pad>"})
        notice("<pad> is added to the vocabulary", "the tokenizer has no pad distinct from its terminators")
    else:
        tokenizer.pad_token = spare
        log.info("pad is %s: the tokenizer had none distinct from its terminators", spare)


def _spare_token(tokenizer: PreTrainedTokenizerFast, taken: set[Any]) -> str | None:
    template = tokenizer.chat_template if isinstance(tokenizer.chat_template, str) else ""
    tokens = {str(token): id for id, token in sorted(tokenizer.added_tokens_decoder.items())}
    free = [name for name, id in tokens.items() if id not in taken and name not in template]
    for pattern in SPARE_TOKENS:
        found = [name for name in free if re.fullmatch(pattern, name)]
        if found:
            return found[0]
    return None
