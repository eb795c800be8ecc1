"""What every experiment shares: the JSON line it appends, the commit and device it names, progress.

A line is {"experiment", "config", "metrics", "commit", "jax", "device", "time", "seconds"}; numbers
and figures outside this folder come from such lines only.
"""

import dataclasses
import datetime
import json
import os
import pathlib
import platform
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from typing import Any

import jax

ROOT = pathlib.Path(__file__).resolve().parent.parent
RESULTS = ROOT / "experiments" / "results"
FIGURES = ROOT / "experiments" / "figures"


def commit() -> str:
    """The commit of this checkout, with `-dirty` where the code differs from it.

    The results and figures themselves are no code: appending a line does not make the next run
    dirty. Where the variable EXPERIMENT_COMMIT is set (on a GPU machine that got the files of a
    commit, but not its history) it is what that says, and "unknown" outside a git checkout.
    """
    named = os.environ.get("EXPERIMENT_COMMIT")
    if named:
        return named
    code = ("--", ".", ":(exclude)experiments/results", ":(exclude)experiments/figures")
    try:
        head = _git("rev-parse", "--short=12", "HEAD")
        changed = _git("status", "--porcelain", *code)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return f"{head}-dirty" if changed else head


def _git(*arguments: str) -> str:
    done = subprocess.run(("git", *arguments), cwd=ROOT, check=True, capture_output=True, text=True)
    return done.stdout.strip()


def device() -> str:
    """The device JAX computes on, with the processor's name and core count where it is a CPU."""
    first = jax.devices()[0]
    if first.platform != "cpu":
        return f"{jax.device_count()} x {first.device_kind}"
    name = platform.processor() or platform.machine()
    try:
        text = pathlib.Path("/proc/cpuinfo").read_text()
        name = next(
            line.partition(":")[2].strip()
            for line in text.splitlines()
            if line.startswith("model name")
        )
    except (OSError, StopIteration):
        pass
    return f"cpu, {len(os.sched_getaffinity(0))} cores, {name}"


@dataclasses.dataclass
class Stopwatch:
    """Wall-clock seconds since it was made."""

    start: float = dataclasses.field(default_factory=time.perf_counter)

    def seconds(self) -> float:
        return time.perf_counter() - self.start


def append_line(
    folder: pathlib.Path,
    experiment: str,
    config: Any,
    metrics: Sequence[dict[str, Any]],
    seconds: float,
) -> pathlib.Path:
    """Appends one run to `folder/experiment.jsonl` and returns that file.

    Args:
      folder: `RESULTS`, or a temporary folder in tests.
      experiment: the file's stem.
      config: the frozen dataclass of settings.
      metrics: one plain dictionary per measured number; NaN and infinities are refused.
      seconds: wall-clock seconds of the run.
    """
    line = {
        "experiment": experiment,
        "config": dataclasses.asdict(config),
        "metrics": list(metrics),
        "commit": commit(),
        "jax": jax.__version__,
        "device": device(),
        "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "seconds": round(seconds, 1),
    }
    text = json.dumps(line, ensure_ascii=False, allow_nan=False)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{experiment}.jsonl"
    with path.open("a", encoding="utf-8") as file:
        file.write(text + "\n")
    return path


def track[T](items: Sequence[T], description: str) -> Iterator[T]:
    """Yields the items and shows how far it is: a bar on a terminal, else about ten plain lines."""
    if sys.stdout.isatty():
        from rich.progress import track as bar

        yield from bar(items, description=description)
        return
    watch = Stopwatch()
    every = max(1, len(items) // 10)
    for done, item in enumerate(items, start=1):
        yield item
        if done % every == 0 or done == len(items):
            print(f"{description}: {done}/{len(items)} in {watch.seconds():.0f} s", flush=True)
