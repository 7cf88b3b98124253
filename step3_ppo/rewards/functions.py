"""Python functions that score responses: rewards, verifiable rewards, scores that are only measured.

Takes `package.module:function`, imports it and checks its signature before anything is trained. A call gives
a finite float64 score for each completion, or a UserError with what the function did. The function gets the
keywords prompts, completions and the rows' other columns, as lists of the same length; keywords that its
signature does not take are left out. Does not decide which responses a call has, and on which rank.
"""

from __future__ import annotations

import importlib
import inspect
import math
import pkgutil
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from pathlib import Path
from typing import Any

import numpy as np

from common.errors import UserError
from common.text import did_you_mean, nearest
from step3_ppo.rewards.config import FORM, check_reference

Prompts = Sequence[str | list[dict[str, Any]]]
Columns = Mapping[str, Sequence[Any]]


@dataclass(frozen=True)
class ScoreFunction:
    """A user's function, its name `package.module:function`, and the key that names it."""

    reference: str
    key: str
    function: Callable[..., Any]

    def check(self, columns: Iterable[str]) -> None:
        """UserError when the function needs a column that is not among these."""
        self._arguments(dict.fromkeys(["prompts", "completions", *columns]))

    def __call__(self, prompts: Prompts, completions: Sequence[str], columns: Columns) -> np.ndarray:
        """float64 [B], all finite. UserError for whatever goes wrong inside the function."""
        offered = {**columns, "prompts": prompts, "completions": completions}
        arguments = {name: list(values) for name, values in self._arguments(offered).items()}
        try:
            result = self.function(**arguments)
        except (Exception, SystemExit) as error:  # a function may call exit(); the run is not its to end
            raise UserError(
                f"{self.key}: {self.reference} failed: {failure(error)}",
                hint="it must return a finite number for every completion, whatever the policy wrote",
            ) from error
        return finite_scores(result, completions, f"{self.key}: {self.reference}", admits_bools=True)

    def _arguments(self, offered: Mapping[str, Any]) -> dict[str, Any]:
        """The part of `offered` that the signature takes. UserError when it needs more."""
        try:
            parameters = inspect.signature(self.function).parameters.values()
        except ValueError:  # some functions written in C do not say
            return dict(offered)
        takes_all = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters)
        named = {parameter.name for parameter in parameters}
        for parameter in parameters:
            optional = parameter.default is not parameter.empty or parameter.kind in _VARIADIC
            by_position = parameter.kind is parameter.POSITIONAL_ONLY
            if not optional and (by_position or parameter.name not in offered):
                raise _missing(self, parameter.name, by_position, offered)
        return {name: value for name, value in offered.items() if takes_all or name in named}


_VARIADIC = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)


def load_functions(references: Mapping[str, str], key: str) -> dict[str, ScoreFunction]:
    """Functions by name, as in ppo.evaluation.functions; `key` is their setting."""
    return {name: load_function(reference, f"{key}.{name}") for name, reference in references.items()}


def load_function(reference: str, key: str) -> ScoreFunction:
    """Import `package.module:function`. UserError naming `key` when it is not there or cannot be called."""
    check_reference(reference, key)
    module_name, _, path = reference.partition(":")
    named = f"{key}={reference}"
    module = _import(module_name, named)
    try:
        function = reduce(getattr, path.split("."), module)
    except AttributeError:
        found = nearest(path, _callables(module)) or _callables(module)[:5]
        ways = f"did you mean {module_name}:{found[0]}?" if len(found) == 1 else f"it has {', '.join(found)}"
        raise UserError(
            f"{named}: {module_name} has no {path}", hint=ways if found else f"expected: {FORM}"
        ) from None
    if not callable(function):
        raise UserError(f"{named} is a {type(function).__name__}, not a function", hint=f"expected: {FORM}")
    return ScoreFunction(reference, key, function)


def finite_scores(
    result: Any, completions: Sequence[str], who: str, *, admits_bools: bool = False
) -> np.ndarray:
    """float64 [B] of a list of B numbers. UserError naming `who` and the completion without one."""
    if isinstance(result, str | bytes | Mapping) or not hasattr(result, "__iter__"):
        raise UserError(
            f"{who} returned {_shown(result)} where a list of numbers is needed", hint=f"expected: {FORM}"
        )
    values = list(result)
    if len(values) != len(completions):
        raise UserError(
            f"{who} returned {len(values)} scores for {len(completions)} completions",
            hint="one finite number for every completion, in their order",
        )
    scores = np.empty(len(values), np.float64)
    for index, value in enumerate(values):
        score = _number(value, admits_bools)
        if score is None:
            raise UserError(
                f"{who} returned {_shown(value)} as score {index}, "
                f"for the completion {_shown(completions[index])}",
                hint="every completion has a finite number as its score, also an empty or a broken one",
            )
        scores[index] = score
    return scores


def failure(error: BaseException) -> str:
    """An exception in one line, with the place where it was raised."""
    text = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
    frames = traceback.extract_tb(error.__traceback__)
    if not frames:
        return text
    last = frames[-1]
    return f"{text}\n    {last.filename}:{last.lineno}, in {last.name}: {last.line}"


def _number(value: Any, admits_bools: bool) -> float | None:
    """A finite float, or None. Numbers of numpy and torch count."""
    if isinstance(value, str | bytes) or (isinstance(value, bool) and not admits_bools):
        return None
    try:
        number = float(value)
    except Exception:  # whatever a foreign type raises, it is no number
        return None
    return number if math.isfinite(number) else None


def _import(name: str, named: str) -> Any:
    """The module. UserError when there is none, or when its own code fails."""
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        missing = error.name or ""
        if name == missing or name.startswith(f"{missing}."):
            raise UserError(f"{named}: there is no module {missing}", hint=_similar(missing)) from None
        raise UserError(
            f"{named}: {name} needs the module {missing}, which is not installed", hint=f"install {missing}"
        ) from error
    except (Exception, SystemExit) as error:
        raise UserError(
            f"{named}: {name} cannot be imported: {failure(error)}",
            hint=f"python -c 'import {name}' shows the same",
        ) from error


def _similar(name: str) -> str:
    """The hint for a module that does not exist."""
    package, _, last = name.rpartition(".")
    places = importlib.import_module(package).__path__ if package else None
    beside = [module.name for module in pkgutil.iter_modules(places)]
    otherwise = f"modules are looked for in the working directory ({Path.cwd()}) and in PYTHONPATH"
    return did_you_mean(last, beside, otherwise, prefix=f"{package}." if package else "")


def _callables(module: Any) -> list[str]:
    """Public callables of a module, its own and imported ones."""
    return [name for name, value in vars(module).items() if callable(value) and not name.startswith("_")]


def _missing(function: ScoreFunction, name: str, by_position: bool, offered: Iterable[str]) -> UserError:
    """The error for a parameter without a value."""
    what = f"{function.key}: {function.reference} takes {name}"
    if by_position:
        return UserError(
            f"{what} by position only; it is called with keywords", hint="take the / out of its signature"
        )
    there = [column for column in offered if column not in ("prompts", "completions")]
    close = nearest(name, ["prompts", "completions", *there])
    columns = f"the rows have the columns {', '.join(there)}" if there else "the rows have no other columns"
    hint = f"did you mean {close[0]}? {columns}" if close else columns
    return UserError(f"{what}, which is neither prompts nor completions nor a column of the rows", hint=hint)


def _shown(value: Any) -> str:
    """A value in short, on one line."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}…"
