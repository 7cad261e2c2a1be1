"""How fast servers answer, side by side: all of them are up, one runs at a time, the others are stopped by a signal.

Part of benchmarks/serve.py.  Two starts of one server differ by up to a fifth for as long as they live, since their weights lie elsewhere
in memory, and a shared machine changes from minute to minute.  So a round asks each server in turn within seconds, a set of servers takes
several rounds, and there are several sets, each started afresh.  A ratio is taken within a round, then the median of all rounds.
"""

from __future__ import annotations

import json
import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from measure import Panel, rows
from serve import DTYPE, ENGINE, cache_of, environment, family, prompt, read

FILE = "tokens.jsonl"  # in the state
BATCHES = (1, 8, 32)
TOKENS = 64
ROUNDS = 9
# how a contender is started (serve.STARTS), and whose cache of vLLM's it finds
CONTENDERS = {
    "eager, custom_ops none": ("eager none", "eager none"),
    "eager, custom_ops none, held": ("eager held", "eager held"),
    "eager": ("eager default", "eager default"),
    "inductor": ("inductor warm", "inductor cold"),
    "inductor, held": ("inductor held", "inductor cold"),
    "flagtree": ("flagtree second", "flagtree first"),
}
BASES = ("eager, custom_ops none", "inductor", "inductor, held")


# -- in the child ----------------------------------------------------------------------------------------------------
def answer(model: str, arguments: Mapping[str, Any], asked: int, told: int) -> None:
    """A server that reads batch sizes, a line each, and writes wall seconds and the worker's CPU seconds a token."""
    from vllm import LLM, SamplingParams

    llm = LLM(model=model, dtype=DTYPE, **{**ENGINE, **arguments})

    def generate(batch: int, tokens: int) -> tuple[float, float]:
        wall, cpu = time.perf_counter(), _worker_seconds(llm)
        settings = SamplingParams(temperature=0.0, max_tokens=tokens, ignore_eos=True)
        llm.generate([prompt(k) for k in range(batch)], settings, use_tqdm=False)
        return (time.perf_counter() - wall) / tokens, (_worker_seconds(llm) - cpu) / tokens

    with os.fdopen(asked) as questions, os.fdopen(told, "w") as answers:
        print("ready", file=answers, flush=True)
        for line in questions:
            generate(int(line), 8)  # what another server left in the caches is not this one's
            print(*generate(int(line), TOKENS), file=answers, flush=True)


def _worker_seconds(llm: Any) -> float:
    return float(llm.collective_rpc("flagtree_report")[0]["cpu_seconds"])


# -- in the parent ---------------------------------------------------------------------------------------------------
class Server:
    """A child that answers, stopped but while it is asked."""

    def __init__(self, state: Path, name: str, arguments: Mapping[str, Any]) -> None:
        start, first = CONTENDERS[name]
        job = state / f"{start.replace(' ', '_')}.job.json"
        job.write_text(json.dumps({"model": str(state / "model"), "arguments": {"skip_tokenizer_init": True, **arguments}}))
        (asked, question), (reply, told) = os.pipe(), os.pipe()
        command = [sys.executable, __file__, str(job), str(asked), str(told)]
        with (state / f"{start.replace(' ', '_')}.log").open("w") as log:
            self.process = subprocess.Popen(command, env=environment(state, cache_of(state, (first,)), start), stdout=log, stderr=log,
                                            pass_fds=(asked, told))  # fmt: skip
        os.close(asked)
        os.close(told)
        self.question, self.reply = os.fdopen(question, "w"), os.fdopen(reply)
        if self.reply.readline() != "ready\n":
            raise RuntimeError(f"{name} did not start: {log.name}")
        self._signal(signal.SIGSTOP)

    def ask(self, batch: int) -> tuple[float, float]:
        """Wall seconds and the worker's CPU seconds a token."""
        self._signal(signal.SIGCONT)
        print(batch, file=self.question, flush=True)
        wall, cpu = map(float, self.reply.readline().split())
        self._signal(signal.SIGSTOP)
        return wall, cpu

    def end(self) -> None:
        """It reads the end of its questions and leaves."""
        self._signal(signal.SIGCONT)
        self.question.close()
        self.process.wait()
        self.reply.close()

    def _signal(self, number: int) -> None:
        for pid in family(self.process.pid):
            os.kill(pid, number)


@contextmanager
def _up(state: Path, asked: Mapping[str, Any]) -> Iterator[dict[str, Server]]:
    servers: dict[str, Server] = {}
    try:
        for name, (start, _) in CONTENDERS.items():
            servers[name] = Server(state, name, asked[start])
        yield servers
    finally:
        for server in servers.values():
            server.end()


def campaign(state: Path, asked: Mapping[str, Any], sets: int) -> None:
    """So many sets of servers; those that stand in the state already are left out.  Caches must be there (serve.campaign)."""
    place = state / FILE
    done = max((r["set"] for r in read(place)), default=-1) + 1
    for number in range(done, sets):
        found = []
        with _up(state, asked) as servers:
            names = list(servers)
            for turn in range(ROUNDS):
                for batch in BATCHES:
                    for name in (*names[turn % len(names) :], *names[: turn % len(names)]):
                        wall, cpu = servers[name].ask(batch)
                        found.append({"set": number, "round": turn, "batch": batch, "name": name, "wall": wall, "cpu": cpu,
                                      "load": os.getloadavg()[0]})  # fmt: skip
        with place.open("a") as file:
            file.writelines(json.dumps(record) + "\n" for record in found)
        print(f"set {number + 1} of {sets} servers, {ROUNDS} rounds\n{table(found, 'wall')}", flush=True)


# -- tables ----------------------------------------------------------------------------------------------------------
def _ratios(found: Sequence[Mapping[str, Any]], name: str, base: str, batch: int, clock: str) -> dict[int, list[float]]:
    """By set: how many times as many tokens a second as `base` in the same round."""
    of = {(r["set"], r["round"], r["name"]): float(r[clock]) for r in found if r["batch"] == batch}
    out: dict[int, list[float]] = {}
    for (number, turn, who), seconds in of.items():
        if who == name:
            out.setdefault(number, []).append(of[number, turn, base] / seconds)
    return out


def speed(found: Sequence[Mapping[str, Any]], name: str, batch: int, clock: str) -> float:
    """Tokens a second: the median."""
    return batch / statistics.median(float(r[clock]) for r in found if (r["name"], r["batch"]) == (name, batch))


def table(found: Sequence[Mapping[str, Any]], clock: str) -> str:
    """Tokens a second and ratios, a line a contender and batch."""
    lines = []
    for batch in BATCHES:
        for name in CONTENDERS:
            cells = []
            for base in BASES:
                by_set = _ratios(found, name, base, batch, clock)
                middles = sorted(statistics.median(values) for values in by_set.values())
                middle = statistics.median(v for values in by_set.values() for v in values)
                cells.append("1" if name == base else f"{middle:.2f} ({middles[0]:.2f} to {middles[-1]:.2f})")
            lines.append([str(batch), name, f"{speed(found, name, batch, clock):.0f}", *cells])
    return rows(["batch", "server", "tokens a second", *(f"by {base}" for base in BASES)], lines)


def told(state: Path) -> list[str]:
    """Paragraphs of the page; none where nothing was measured."""
    found = read(state / FILE)
    if not found:
        return []
    sets, load = len({r["set"] for r in found}), statistics.median(float(r["load"]) for r in found)
    return [
        f"Tokens a second of wall time, {TOKENS} tokens a request.  {sets} sets of servers, all up at once; in each of {ROUNDS} rounds "
        "one after the other answers while the others are stopped.  Ratios are of one round, medians of all rounds, in brackets the "
        "least and greatest median of a set: two starts of one server differ, because their weights lie elsewhere.  Load average, "
        f"median {load:.1f}.",
        table(found, "wall"),
        "The same by CPU seconds of the worker.",
        table(found, "cpu"),
    ]


def panel(state: Path, layers: int) -> list[Panel]:
    """The plot's part."""
    if not (found := read(state / FILE)):
        return []
    speeds = {name: [speed(found, name, batch, "wall") for batch in BATCHES] for name in CONTENDERS}
    return [Panel(f"{layers} layers: tokens a second", [f"batch {b}" for b in BATCHES], speeds, [0.0] * len(BATCHES))]


if __name__ == "__main__":
    answer(**json.loads(Path(sys.argv[1]).read_text()), asked=int(sys.argv[2]), told=int(sys.argv[3]))
