"""Rows that lie elsewhere (https://, s3://, gs://, hf://), settled as files here before anything reads them.

Takes a configuration; returns it with the files in place of the paths, kept by content under
`<output_dir>/.cache/rows`: ranks need no network, and another content is another configuration. Rows that are
streamed are settled as what they are now: files as a listing of them, data sets of the hub as commits.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from common.config import DataConfig, SourceConfig
from common.errors import UserError
from common.hub_data import commit_of, is_name
from common.paths import is_remote
from common.redact import redact_text
from common.stage import Step
from pipeline.checks import DATA_SUFFIXES
from pipeline.config import PipelineConfig
from pipeline.state import data_of, read_state, run_folder

Say = Callable[[str], None]


def settle_rows(config: PipelineConfig, say: Say = print) -> PipelineConfig:
    """The configuration with a file here for every https://, s3://, gs:// or hf:// path of rows, fetched once
    and kept by content. UserError naming the key where that cannot be."""
    fetched: dict[tuple[str, bool], str] = {}

    def here(path: str, key: str, streaming: bool = False) -> str:
        if is_remote(path) and (path, streaming) not in fetched:
            settled = fetched_rows(path, key, rows_below(config.output_dir), say, streaming=streaming)
            fetched[path, streaming] = settled
        return fetched.get((path, streaming), path)

    for step in config.steps:
        for key, data in data_of(config, step).items():
            paths = data.all_sources()
            if data.path is not None:
                data = replace(data, path=here(data.path, f"{key}.path", data.streaming))
            else:
                keys = [f"{key}.sources[{at}].path" for at in range(len(paths))]
                named = [here(each.path, at, data.streaming) for each, at in zip(paths, keys, strict=True)]
                sources = [replace(source, path=path) for source, path in zip(paths, named, strict=True)]
                data = replace(data, sources=sources)
            if data.eval_path is not None:
                data = replace(data, eval_path=here(data.eval_path, f"{key}.eval_path"))
            if data.streaming:
                data = with_commits(data, _begun_with(config, step, key), key, say)
            part = replace(getattr(config, step.value), **{key.partition(".")[2]: data})
            config = replace(config, **{step.value: part})
    return config


def with_commits(data: DataConfig, begun: list[SourceConfig], key: str, say: Say) -> DataConfig:
    """The settings with a commit for every data set of the hub: that with which the run has begun, or else
    where its branch is now. begun: the sources as the run has recorded them."""
    if not any(map(_is_on_hub, data.all_sources())):
        return data
    pinned = []
    for at, source in enumerate(data.all_sources()):
        if _is_on_hub(source):
            same = [old for old in begun if replace(old, revision=None) == source]
            revision = same[0].revision if same else source.revision
            source = replace(source, revision=commit_of(source.path, revision, f"{key}.sources[{at}].path"))
            why = ", with which this run began" if same else ""
            say(f"{key}: {source.path} is streamed at its commit {source.revision}{why}")
        pinned.append(source)
    return replace(data, path=None, sources=pinned)


def _is_on_hub(source: SourceConfig) -> bool:
    return not source.path.endswith(DATA_SUFFIXES) and not Path(source.path).exists() and is_name(source.path)


def _begun_with(config: PipelineConfig, step: Step, key: str) -> list[SourceConfig]:
    """The sources as the step's state has them; none where it starts over or has not begun."""
    with suppress(UserError, KeyError, TypeError, AttributeError):  # said where the step is run
        state = None if config.force else read_state(run_folder(config) / step.value)
        recorded = state["config"][step.value][key.partition(".")[2]]["sources"] if state else []
        return [SourceConfig(**source) for source in recorded]
    return []


def fetched_rows(path: str, key: str, cache: Path, say: Say, *, streaming: bool = False) -> str:
    """Where the rows of a place elsewhere lie now; with `streaming` the listing of its files where it can
    be, which are fetched later."""
    from common.download import fetch, file_name  # what it takes to ask a server is loaded where one is asked
    from common.listing import list_files

    name = file_name(path)
    if "." in name and not name.endswith(DATA_SUFFIXES):
        raise UserError(
            f"{key}={redact_text(path)}: {name} is not a known kind of file",
            hint=f"expected one of {', '.join(DATA_SUFFIXES)}",
        )
    listing = list_files(path, key, cache, say) if streaming else None
    return str(listing or fetch(path, key, cache, say))


def rows_below(output_dir: str) -> Path:
    """Where fetched rows are kept."""
    return Path(output_dir) / ".cache" / "rows"
