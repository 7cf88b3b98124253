"""Each rank scores the responses that it sampled, and all know what one rank alone would have found."""

from __future__ import annotations

import contextlib
import json
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from common.config import ModelConfig
from common.stage import Role
from common.training.import_model import import_model
from tests import forked
from tests.programs import scored as program
from tests.programs.scored import COMPLETIONS, PROMPTS, SAMPLES
from tests.served import serving as in_thread
from tests.step3_ppo.rewards.test_reading import published_scorer

HERE = "tests.programs.scored"
FUNCTION = {"function": f"{HERE}:above_mean"}
ABOVE = [-3.5, 3.5, -0.5, 0.5, 8.5, -8.5]
SHARES = {
    1: [[0, 1, 2]],
    2: [[0, 2], [1]],
    4: [[0], [1], [2], []],
}
"""The prompts of each rank."""


def on_ranks(folder: Path, size: int, *arguments: Any) -> list[dict[str, Any]]:
    """What every rank wrote."""
    folder.mkdir()
    forked.run(program.main, (str(folder), *arguments), size, folder / "output.txt")
    return [json.loads((folder / f"rank_{rank}.json").read_text()) for rank in range(size)]


def completions_of(prompts: list[int]) -> list[str]:
    return [text for prompt in prompts for text in COMPLETIONS[prompt * SAMPLES :][:SAMPLES]]


def found_by(rank: dict[str, Any]) -> list[Any]:
    """What all ranks have to agree on."""
    assert rank["error"] is None
    return [rank[name] for name in ("scores", "rewards", "metrics", "samples")]


@pytest.mark.parametrize("size", SHARES)
def test_a_function_is_called_once_on_each_rank_with_the_groups_that_it_sampled(
    size: int, tmp_path: Path
) -> None:
    ranks = on_ranks(tmp_path / "ranks", size, FUNCTION)
    for rank, prompts in zip(ranks, SHARES[size], strict=True):
        assert rank["scores"] == {"above_mean": ABOVE} and rank["rewards"] == ABOVE
        assert found_by(rank) == found_by(ranks[0])
        names = [PROMPTS[prompt] for prompt in prompts for _ in range(SAMPLES)]
        # a column that only one row has is offered on all ranks
        columns = {
            "answer": [{"one": "x", "two": "y", "three": "z"}[name] for name in names],
            "level": [3 if name == "three" else None for name in names],
        }
        call = {"prompts": names, "completions": completions_of(prompts), "columns": columns}
        assert rank["asked"] == ([call] if prompts else [])
        assert rank["decoded"] == completions_of(prompts)
        assert rank["pickled"] == ([] if size == 1 else ["set"])  # names of columns that not all rows have


def test_what_is_measured_and_shown_is_what_one_rank_measures_and_shows(tmp_path: Path) -> None:
    alone, two = (on_ranks(tmp_path / str(size), size, FUNCTION)[0] for size in (1, 2))
    assert found_by(two) == found_by(alone)
    shown = [(row["mode"], row["prompt"], row["completion"], row["scores"]) for row in two["samples"]]
    firsts = list(zip(PROMPTS, COMPLETIONS[::SAMPLES], strict=True))
    assert [row[:3] for row in shown] == [
        (mode, *first) for mode in ("sampled", "greedy") for first in firsts
    ]
    assert [row[3]["above"] for row in shown] == [*ABOVE[::SAMPLES], 0.0, 0.0, 0.0]


@pytest.fixture(scope="module")
def scorer(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("scorer")
    settings = ModelConfig(path=str(published_scorer(folder / "model")))
    return str(import_model(settings, Role.reward_model, folder / "imported"))


@pytest.mark.parametrize("size", [2, 4])
def test_text_is_tokenized_for_a_reward_model_by_the_rank_that_sampled_it(
    size: int, scorer: str, tmp_path: Path
) -> None:
    (alone,) = on_ranks(tmp_path / "alone", 1, {"model": True}, scorer)
    assert alone["read"] == list(COMPLETIONS) and len(set(alone["rewards"])) == len(COMPLETIONS)
    for rank, prompts in zip(
        on_ranks(tmp_path / "ranks", size, {"model": True}, scorer), SHARES[size], strict=True
    ):
        assert found_by(rank) == found_by(alone)
        assert rank["read"] == rank["decoded"] == completions_of(prompts)
        assert rank["pickled"] == ["set"]


@dataclass
class Served:
    """A server that scores as `above_mean` does; what it was sent, and how many requests met there."""

    url: str = ""
    bodies: list[dict[str, Any]] = field(default_factory=list)
    now: int = 0
    most: int = 0
    lock: Any = field(default_factory=threading.Lock)
    together: Any = None
    """a barrier that every request waits at"""
    late_for: str = ""
    """a prompt whose responses are scored too late"""

    @contextlib.contextmanager
    def counted(self) -> Iterator[None]:
        with self.lock:
            self.now += 1
            self.most = max(self.most, self.now)
        yield
        with self.lock:
            self.now -= 1


@contextlib.contextmanager
def serving(**settings: Any) -> Iterator[Served]:
    served = Served(**settings)

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with served.counted():
                served.bodies.append(body)
                if served.together is not None:
                    served.together.wait(20)
                if served.late_for in body["prompts"]:
                    time.sleep(1.0)
                rewards = program.above_mean(body["prompts"], body["completions"], **body["columns"])
                content = json.dumps({"rewards": rewards}).encode()
            with contextlib.suppress(OSError):  # the client has gone
                self.send_response(200)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

        def log_message(self, *arguments: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    with in_thread(server) as url:
        served.url = f"{url}/score"
        yield served


@pytest.mark.parametrize("size", SHARES)
def test_a_server_is_sent_whole_groups_in_several_requests_at_once_from_each_rank(
    size: int, tmp_path: Path
) -> None:
    # a request is answered only when so many are there: they are in flight together or time out
    calls = sum(min(2, len(prompts)) for prompts in SHARES[size])
    with serving(together=threading.Barrier(calls)) as served:
        source = {"url": served.url, "name": "judge", "concurrency": 2, "retries": 0}
        ranks = on_ranks(tmp_path / "ranks", size, source)
    for rank in ranks:
        assert rank["scores"] == {"judge": ABOVE} and found_by(rank) == found_by(ranks[0])
        assert not rank["asked"]
    first, sampled, greedy = (served.bodies[number * calls :][:calls] for number in range(3))
    assert len(served.bodies) == 3 * calls and served.most == calls
    for bodies, samples in ((first, SAMPLES), (sampled, SAMPLES), (greedy, 1)):
        sent = [prompt for body in bodies for prompt in body["prompts"]]
        assert sorted(sent) == sorted(PROMPTS * samples)
        assert all(body["prompts"].count(prompt) == samples for body in bodies for prompt in body["prompts"])


@pytest.mark.parametrize(
    ("function", "said"),
    [
        (
            "broken_for_two",
            "ppo.rewards[0].function: tests.programs.scored:broken_for_two failed: ValueError",
        ),
        ("few_for_two", "tests.programs.scored:few_for_two returned 1 scores for 2 completions"),
        ("words_for_two", "returned 'good' as score 0, for the completion 'bc'"),
    ],
)
def test_what_goes_wrong_in_a_function_of_one_rank_is_the_error_of_all(
    function: str, said: str, tmp_path: Path
) -> None:
    ranks = on_ranks(tmp_path / "ranks", 2, {"function": f"{HERE}:{function}"})
    assert said in ranks[0]["error"] and ranks[1]["error"] == ranks[0]["error"]


def test_a_server_that_one_rank_waits_for_in_vain_is_the_error_of_all(tmp_path: Path) -> None:
    with serving(late_for="two") as served:
        source = {"url": served.url, "retries": 0, "timeout": 0.3}
        ranks = on_ranks(tmp_path / "ranks", 2, source)
    assert "gave no rewards in one attempt" in ranks[0]["error"]
    assert "no whole answer within 0.3 s" in ranks[0]["error"]
    assert ranks[1]["error"] == ranks[0]["error"]


def test_a_function_may_want_a_column_that_only_another_ranks_rows_have(tmp_path: Path) -> None:
    ranks = on_ranks(tmp_path / "ranks", 4, {"function": f"{HERE}:missing_without_level"})
    assert [rank["rewards"] for rank in ranks] == [[0.0] * 4 + [3.0] * 2] * 4
