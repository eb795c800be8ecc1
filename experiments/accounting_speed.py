"""How long does the accountant take, beside dp_accounting's loss distributions?

    python experiments/accounting_speed.py            the full sizes, about two minutes on one core
    python experiments/accounting_speed.py --smoke    the same questions on small sizes

Three questions: ε of a history of many different steps, the first time and after one more step;
calibrating a training run's noise to a relative 1e-4, by our RDP curve, by loss distributions
between our brackets, and by dp_accounting's own calibration; and ε of one training run by both.
Every timed answer is checked first: the history's ε against a plain sum of its curves, the
calibrated noise against its target, PLD against RDP. Times are CPU seconds of this process, all of
its threads together, so that a busy machine does not count; `wall_seconds` stands beside them.
"""

import argparse
import dataclasses
import pathlib
import statistics
import time
from collections.abc import Callable
from typing import Any

import _common
import numpy as np

from dpfa_jax import accounting
from dpfa_jax.accounting import Gaussian, PoissonSampled, Repeated, calibrate, convert, ledger, pld


@dataclasses.dataclass(frozen=True)
class Settings:
    """What is timed.

    Attributes:
      history_steps: entries in the heterogeneous history.
      distinct_plain: distinct Gaussian multipliers among them (as many heads, layers, steps).
      distinct_sampled: distinct (rate, multiplier) pairs among them, as in a changing schedule.
      training_steps: of the calibrated run.
      sampling_rate: of the calibrated run.
      epsilon: target of the calibration.
      delta: of everything.
      tolerance: relative width of the calibration's last bracket.
      repeats: timings of each answer; their median is reported.
      rival_calibration: whether dp_accounting calibrates too (it takes long).
    """

    history_steps: int = 100_000
    distinct_plain: int = 1000
    distinct_sampled: int = 20
    training_steps: int = 1000
    sampling_rate: float = 0.01
    epsilon: float = 1.0
    delta: float = 1e-5
    tolerance: float = 1e-4
    repeats: int = 5
    rival_calibration: bool = True


SMOKE = Settings(
    history_steps=2000,
    distinct_plain=50,
    distinct_sampled=3,
    training_steps=100,
    tolerance=1e-2,
    repeats=1,
    rival_calibration=False,
)


@dataclasses.dataclass(frozen=True)
class Timed:
    """An answer and what it took: CPU seconds, and wall-clock seconds of the same calls."""

    answer: Any
    first: float
    first_wall: float
    later: float


def timed(call: Callable[[], Any], repeats: int) -> Timed:
    """The answer, the time of the first call, and the median time of the later ones."""
    cpu, wall = [], []
    for _ in range(repeats + 1):
        started, start = time.perf_counter(), time.process_time()
        answer = call()
        cpu.append(time.process_time() - start)
        wall.append(time.perf_counter() - started)
    later = statistics.median(cpu[1:]) if repeats else cpu[0]
    return Timed(answer, cpu[0], wall[0], later)


def heterogeneous(settings: Settings) -> ledger.History:
    """A history whose steps cycle through many multipliers, plain and sampled."""
    plain = [Gaussian(float(z)) for z in np.geomspace(300.0, 3000.0, settings.distinct_plain)]
    sampled = [
        PoissonSampled(Gaussian(float(z)), 0.001)
        for z in np.geomspace(1.0, 3.0, settings.distinct_sampled)
    ]
    entries = []
    for step in range(settings.history_steps):
        events = sampled if step % 2 else plain
        entries.append(ledger.Entry(events[step // 2 % len(events)]))
    return ledger.History(tuple(entries))


def check_history(history: ledger.History, found: float, delta: float) -> None:
    """ε again, from a plain sum over distinct steps on a dense grid of orders."""
    orders = np.linspace(1.5, 100.0, 2000)
    counts: dict[accounting.Event, int] = {}
    for entry in history.entries:
        counts[entry.event] = counts.get(entry.event, 0) + entry.count
    total = sum(count * accounting.rdp_curve(event, orders) for event, count in counts.items())
    dense = float(convert.epsilons(orders, total, delta).min())
    if not dense * 0.99 <= found <= dense * (1 + 1e-9):
        raise SystemExit(f"history: epsilon {found} where a plain sum gives {dense}")


def measure(settings: Settings) -> list[dict[str, Any]]:
    """Every timing, each after its check."""
    history = heterogeneous(settings)
    done = timed(lambda: history.epsilon(settings.delta), settings.repeats)
    check_history(history, done.answer, settings.delta)
    one_more = history.spend(PoissonSampled(Gaussian(1.0), 0.001))
    after = timed(lambda: one_more.epsilon(settings.delta), 0)
    if not after.answer > done.answer:
        raise SystemExit("one more step did not cost more")
    metrics = [
        {
            "question": "epsilon of a heterogeneous history",
            "steps": settings.history_steps,
            "epsilon": done.answer,
            "first_seconds": done.first,
            "seconds": done.later,
            "one_step_later_seconds": after.first,
            "wall_seconds": done.first_wall,
        }
    ]

    def run(multiplier: float) -> accounting.Event:
        step = PoissonSampled(Gaussian(multiplier), settings.sampling_rate)
        return Repeated(step, settings.training_steps)

    def ours() -> float:
        return calibrate.smallest(
            run, epsilon=settings.epsilon, delta=settings.delta, tolerance=settings.tolerance
        )

    done = timed(ours, 0)
    noise = done.answer
    if not accounting.epsilon(run(noise), settings.delta) <= settings.epsilon:
        raise SystemExit("the calibrated noise misses its target")
    metrics.append(calibrated("calibration by RDP", done, settings))

    def by_loss() -> float:
        return calibrate.smallest(
            run,
            epsilon=settings.epsilon,
            delta=settings.delta,
            tolerance=settings.tolerance,
            cost=pld.epsilon,
        )

    pld.epsilon(Gaussian(1.0), settings.delta)  # importing dp_accounting is not the question
    done = timed(by_loss, 0)
    less = done.answer
    if not (pld.epsilon(run(less), settings.delta) <= settings.epsilon and less <= noise):
        raise SystemExit("the noise calibrated by loss distributions misses its target")
    metrics.append(calibrated("calibration by loss distributions", done, settings))
    if settings.rival_calibration:
        metrics.append(rival(settings, noise))

    event = run(noise)
    renyi = timed(lambda: accounting.epsilon(event, settings.delta), 0)
    loss = timed(lambda: pld.epsilon(event, settings.delta), settings.repeats)
    if not loss.answer <= renyi.answer:
        raise SystemExit(f"PLD epsilon {loss.answer} above RDP epsilon {renyi.answer}")
    metrics.append(
        {
            "question": "epsilon of one training run by RDP",
            "epsilon": renyi.answer,
            "seconds": renyi.first,
            "wall_seconds": renyi.first_wall,
        }
    )
    metrics.append(
        {
            "question": "epsilon of one training run by loss distributions",
            "epsilon": loss.answer,
            "seconds": loss.later,
            "wall_seconds": loss.first_wall,
        }
    )
    return metrics


def calibrated(question: str, done: Timed, settings: Settings) -> dict[str, Any]:
    """One row about a calibration."""
    return {
        "question": question,
        "noise_multiplier": float(done.answer),
        "tolerance": settings.tolerance,
        "seconds": done.first,
        "wall_seconds": done.first_wall,
    }


def rival(settings: Settings, noise: float) -> dict[str, Any]:
    """The same target met by dp_accounting's own calibration with its PLD accountant."""
    import dp_accounting
    from dp_accounting.pld import PLDAccountant

    def make(multiplier: float) -> dp_accounting.DpEvent:
        gaussian = dp_accounting.GaussianDpEvent(multiplier)
        step = dp_accounting.PoissonSampledDpEvent(settings.sampling_rate, gaussian)
        return dp_accounting.SelfComposedDpEvent(step, settings.training_steps)

    def theirs() -> float:
        return dp_accounting.calibrate_dp_mechanism(
            PLDAccountant,
            make,
            settings.epsilon,
            settings.delta,
            dp_accounting.ExplicitBracketInterval(0.1, 10.0),
            tol=settings.tolerance * noise,
        )

    done = timed(theirs, 0)
    if not done.answer <= noise * (1 + 1e-3):
        raise SystemExit(f"dp_accounting wants noise {done.answer}, RDP only {noise}")
    return calibrated("calibration by dp_accounting's PLD", done, settings)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--smoke", action="store_true", help="small sizes")
    parser.add_argument("--results", type=pathlib.Path, default=_common.RESULTS)
    options = parser.parse_args()
    settings = SMOKE if options.smoke else Settings()
    watch = _common.Stopwatch()
    metrics = measure(settings)
    for row in metrics:
        print(
            ", ".join(f"{k}: {v:.6g}" if isinstance(v, float) else f"{v}" for k, v in row.items())
        )
    _common.append_line(options.results, "accounting_speed", settings, metrics, watch.seconds())


if __name__ == "__main__":
    main()
