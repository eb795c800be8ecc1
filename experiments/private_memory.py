"""How accurate are answers from a private memory of real records at a stated (ε, δ)?

    python experiments/private_memory.py            table, figure, one line of results
    python experiments/private_memory.py --smoke    the same on a small scale, under a minute

Records are scikit-learn's bundled handwritten digits and breast-cancer cytology. Three quarters of
the rows are the private memory; the others are public queries without labels, all answered
jointly. A value is the one-hot label minus 1/classes (a constant, so the best class stays the best
while the norm falls from 1 to √(1 − 1/classes)); the decision is the argmax of the noisy numerator,
so no denominator is released (denominator_weight = 0). ZERO_OUT: one record is there or not.

Nothing below is taken from the private rows:

* each row is put on the unit sphere by its own norm, after constants that stand in `_records.py`;
* the temperature and the clip norm are computed from the public queries, which stand in for the
  records they resemble. If they resemble them badly, accuracy falls and privacy stays.

A repetition draws its own public split and its own noise; ε holds for one repetition, and the
standard error is over repetitions. A deployment draws its key with `secure_key()`; an experiment is
repeatable, so its keys come from a seed.
"""

import argparse
import concurrent.futures
import dataclasses
import functools
import math
import pathlib
from typing import Any

import _common
import _records
import jax
import jax.numpy as jnp
import numpy as np
from scipy.stats import norm

import dpfa_jax as dp
from dpfa_jax.memory import RandomFeatureMemory, RandomFeatures


@dataclasses.dataclass(frozen=True)
class Settings:
    """What is run; every field is public.

    Attributes:
      epsilons: nats; from "very private" to "hardly".
      delta: below 1/records for both data sets.
      repetitions: splits and noise draws; 12 put the standard error near half a percent.
      confidence: how surely a lead of one class share must show through the noise.
      temperatures: half octaves; a grid, so that few programs are compiled.
      temperature_factor: multiplies the temperature, to see how much the rule matters.
      features: of the random-feature memory; its kernel error stays under the noise up to ε = 4.
      seed: of splits, features and (since this is an experiment) noise.
    """

    epsilons: tuple[float, ...] = (0.25, 0.5, 1.0, 2.0, 4.0, 8.0)
    delta: float = 1e-5
    repetitions: int = 12
    confidence: float = 0.99
    temperatures: tuple[float, ...] = tuple(2.0 ** (i / 2) for i in range(9))
    temperature_factor: float = 1.0
    features: int = 1024
    seed: int = 0


SMOKE = Settings(epsilons=(1.0,), repetitions=2)


# ---- Public parameters from public queries


def weights_between(queries: np.ndarray, temperature: float) -> np.ndarray:
    """Attention weights e^{B(cos − 1)} between the queries, without each one's own."""
    weights = np.exp(temperature * (queries @ queries.T - 1))
    np.fill_diagonal(weights, 0)
    return weights


def choose_temperature(
    queries: np.ndarray, *, records: int, noise_multiplier: float, classes: int, settings: Settings
) -> float:
    """The sharpest temperature at which the noise still lets a lead of one class share show.

    At temperature B the median query sees a total weight E(B), estimated with queries in the place
    of records. A score of two classes' difference carries noise √2·σ, so a lead E(B)/classes shows
    against classes − 1 rivals with the wanted confidence if E(B) ≥ √2·z·classes·σ.
    """
    z = norm.ppf(1 - (1 - settings.confidence) / (classes - 1))
    needed = math.sqrt(2) * z * classes * noise_multiplier
    chosen = settings.temperatures[0]
    for temperature in settings.temperatures:
        seen = np.median(weights_between(queries, temperature).sum(axis=1))
        if seen * records / (len(queries) - 1) >= needed:
            chosen = temperature
    return chosen * settings.temperature_factor


def choose_clip_norm(queries: np.ndarray, temperature: float, value_bound: float) -> float:
    """S3's clip norm: what half of the records stay below if they resemble the queries.

    Rounded down to a half octave, so that few programs are compiled.
    """
    squares = (weights_between(queries, temperature) ** 2).sum(axis=0)
    median = value_bound * math.sqrt(float(np.median(squares)))
    return 2.0 ** (math.floor(2 * math.log2(median)) / 2)


# ---- One answer per mechanism, through the public API


@functools.partial(jax.jit, static_argnames=("mechanism", "scale"))
def attend(rng, feature_rng, query, key, value, *, mechanism, scale: float) -> jax.Array:
    """All queries answered jointly by one memory: rows (T, H), (S, H), (S, h) → (T, h)."""
    if isinstance(mechanism, RandomFeatures):
        memory = RandomFeatureMemory.release(
            key[:, None, :],
            value[:, None, :],
            mechanism=mechanism,
            rng=rng,
            feature_rng=feature_rng,
            scale=scale,
        )
        return memory.attend(query[:, None, :])[:, 0, :]
    answer = dp.private_attention(
        query[None, :, None, :],
        key[None, :, None, :],
        value[None, :, None, :],
        mechanism=mechanism,
        rng=rng,
        queries="public",
        scale=scale,
    )
    return answer[0, :, 0, :]


@dataclasses.dataclass(frozen=True)
class Split:
    """One repetition's arrays: what is private, what is public, and the labels to be guessed.

    The random features are drawn with a public key of their own.
    """

    query: jax.Array
    key: jax.Array
    value: jax.Array
    truth: np.ndarray
    feature_rng: jax.Array

    @classmethod
    def of(cls, task: _records.Task, repetition: int) -> "Split":
        private, public = task.split(repetition)
        classes = task.classes
        value = np.eye(classes)[task.labels[private]] - 1 / classes
        query, key, value = (
            jnp.asarray(x, jnp.float32) for x in (task.rows[public], task.rows[private], value)
        )
        return cls(query, key, value, task.labels[public], jax.random.key(repetition))

    def answer(self, rng: jax.Array | None, mechanism: Any, scale: float) -> jax.Array:
        """The answers (T, h) to all queries jointly."""
        return attend(
            rng,
            self.feature_rng,
            self.query,
            self.key,
            self.value,
            mechanism=mechanism,
            scale=scale,
        )

    def accuracy(self, answer: jax.Array) -> float:
        return float(np.mean(np.asarray(answer).argmax(axis=1) == self.truth))


def value_bound(classes: int) -> float:
    """Norm of a one-hot row minus 1/classes."""
    return math.sqrt(1 - 1 / classes)


def mechanisms(
    noise_multiplier: float,
    classes: int,
    temperature: float,
    clip_norm: float,
    settings: Settings,
) -> dict[str, tuple[Any, float]]:
    """Each mechanism by class name, with the temperature it runs at.

    On the unit sphere the largest score is the temperature, so it is the public score cap and
    score bound too. S1's noise grows like e^(2B), so it gets the mildest temperature there is.
    """
    bound = value_bound(classes)
    shared: dict[str, Any] = {
        "noise_multiplier": noise_multiplier,
        "value_bound": bound,
        "denominator_weight": 0.0,
    }
    chosen = [
        (dp.GaussianProcessNoise(**shared, key_bound=1.0), temperature),
        (RandomFeatures(**shared, key_bound=1.0, features=settings.features), temperature),
        (
            dp.ClippedContributions(**shared, score_cap=temperature, clip_norm=clip_norm),
            temperature,
        ),
        (dp.IndependentNoise(**shared, score_cap=temperature), temperature),
        (dp.SoftmaxNoise(noise_multiplier, bound, score_bound=1.0), 1.0),
        (dp.NonPrivate(), temperature),
    ]
    return {type(mechanism).__name__: (mechanism, scale) for mechanism, scale in chosen}


# ---- Checks that come before any number


def check(settings: Settings) -> None:
    """Answers are right without noise, and with almost none.

    Without noise the answer may err at most twice as much as plain float32 code, both from
    float64. At noise multiplier 1e-6 each mechanism must pick the float64 class of every
    query whose lead is beyond the reach of that noise.

    Raises:
      SystemExit: if one does not; no line is written.
    """
    task = _records.digits()
    split = Split.of(task, settings.seed)
    temperature, tiny = 4.0, 1e-6
    query, key, value = (np.asarray(x, np.float64) for x in (split.query, split.key, split.value))
    weights = np.exp(temperature * (query @ key.T - 1))
    sums = weights @ value
    truth = sums / weights.sum(axis=1, keepdims=True)
    rng = dp.random.secure_key()
    ours = split.answer(None, dp.NonPrivate(), temperature)
    scores = temperature * (split.query @ split.key.T)
    plain = jax.nn.softmax(scores) @ split.value
    errors = [float(np.abs(np.asarray(x) - truth).max()) for x in (ours, plain)]
    if not errors[0] <= 2 * errors[1]:
        raise SystemExit(f"Off float64 by {errors[0]}, plain code by {errors[1]}.")

    # One whole contribution can reach √m·Cv; with this clip norm nothing is clipped.
    reach = math.sqrt(task.queries) * value_bound(task.classes)
    first, second = np.sort(sums, axis=1)[:, :-3:-1].T
    clear = first - second > 20 * tiny * reach + 1e-4 * second
    chosen = mechanisms(tiny, task.classes, temperature, reach, settings)
    for name in ("GaussianProcessNoise", "ClippedContributions", "IndependentNoise"):
        answer = np.asarray(split.answer(rng, *chosen[name]))
        wrong = int((answer.argmax(axis=1) != sums.argmax(axis=1))[clear].sum())
        print(f"check {name}: {wrong} of {int(clear.sum())} clear answers differ", flush=True)
        if wrong:
            raise SystemExit(f"{name} with almost no noise gives other answers than float64.")


# ---- The run


@dataclasses.dataclass(frozen=True)
class Job:
    """All mechanisms on one data set at one ε."""

    task: _records.Task
    epsilon: float
    index: int


def run_job(job: Job, settings: Settings) -> list[dict[str, Any]]:
    """The metric rows of one data set and ε."""
    task, classes = job.task, job.task.classes
    records = len(task.rows) - task.queries
    noise_multiplier = dp.accounting.noise_multiplier(
        epsilon=job.epsilon,
        delta=settings.delta,
        coordinates=max(task.queries, 2 * settings.features) * classes,
    )
    root = dp.random.fold_in(jax.random.key(settings.seed), job.index)
    accuracies: dict[str, list[float]] = {}
    temperatures: dict[str, list[float]] = {}
    adjacencies: dict[str, str] = {}
    for repetition in range(settings.repetitions):
        split = Split.of(task, settings.seed + repetition)
        public = np.asarray(split.query, np.float64)
        temperature = choose_temperature(
            public,
            records=records,
            noise_multiplier=noise_multiplier,
            classes=classes,
            settings=settings,
        )
        clip_norm = choose_clip_norm(public, temperature, value_bound(classes))
        keys = dp.random.split(dp.random.fold_in(root, repetition), 8)
        chosen = mechanisms(noise_multiplier, classes, temperature, clip_norm, settings)
        for rng, (name, (mechanism, scale)) in zip(keys, chosen.items(), strict=False):
            answer = split.answer(rng, mechanism, scale)
            accuracies.setdefault(name, []).append(split.accuracy(answer))
            temperatures.setdefault(name, []).append(scale)
            adjacencies[name] = str(getattr(mechanism, "adjacency", "none"))
            require_epsilon(mechanism, split, job.epsilon, settings.delta)
    return [
        {
            "dataset": task.name,
            "mechanism": name,
            "epsilon": job.epsilon,
            "delta": settings.delta,
            "accuracy": round(float(np.mean(found)), 4),
            "standard_error": round(standard_error(found), 4),
            "adjacency": adjacencies[name],
            "temperature": round(float(np.median(temperatures[name])), 3),
        }
        for name, found in accuracies.items()
    ]


def require_epsilon(mechanism: Any, split: Split, epsilon: float, delta: float) -> None:
    """Asks the accountant what the release costs; NonPrivate must cost ∞, the others at most ε."""
    if isinstance(mechanism, RandomFeatures):
        event = mechanism.event(kv_heads=1, value_dim=split.value.shape[1])
    else:
        shapes = [(1, len(x), 1, x.shape[1]) for x in (split.query, split.key, split.value)]
        event = mechanism.event(*shapes)
    cost = dp.accounting.epsilon(event, delta)
    private = not isinstance(mechanism, dp.NonPrivate)
    if not (cost <= epsilon if private else math.isinf(cost)):
        raise SystemExit(f"Expected a cost of at most {epsilon}, got {cost}: {mechanism!r}")


def standard_error(found: list[float]) -> float:
    return float(np.std(found, ddof=1) / math.sqrt(len(found)))


def baselines(task: _records.Task, settings: Settings) -> list[dict[str, Any]]:
    """What needs no ε: always the records' most frequent class, and the sharpest bare attention."""
    rows: dict[str, list[float]] = {"MajorityClass": [], "NonPrivate": []}
    sharpest = settings.temperatures[-1]
    for repetition in range(settings.repetitions):
        split = Split.of(task, settings.seed + repetition)
        answer = split.answer(None, dp.NonPrivate(), sharpest)
        rows["NonPrivate"].append(split.accuracy(answer))
        common = jnp.zeros_like(answer) + split.value.sum(axis=0)
        rows["MajorityClass"].append(split.accuracy(common))
    return [
        {
            "dataset": task.name,
            "mechanism": name,
            "epsilon": None,
            "delta": None,
            "accuracy": round(float(np.mean(found)), 4),
            "standard_error": round(standard_error(found), 4),
            "adjacency": "none",
            "temperature": sharpest if name == "NonPrivate" else None,
        }
        for name, found in rows.items()
    ]


# ---- What a reader sees

# Colours that stay apart for colour-blind readers (Okabe and Ito), and a shape each.
_STYLES = {
    "NonPrivate": ("non-private, same temperature", "#000000", ""),
    "GaussianProcessNoise": ("S5 Gaussian-process noise", "#0072B2", "o"),
    "RandomFeatures": ("S6 random features", "#56B4E9", "s"),
    "ClippedContributions": ("S3 clipped contributions", "#009E73", "^"),
    "IndependentNoise": ("S2 independent noise", "#E69F00", "D"),
    "SoftmaxNoise": ("S1 softmax, then noise", "#D55E00", "v"),
}


def series(metrics: list[dict[str, Any]], dataset: str, mechanism: str) -> list[dict[str, Any]]:
    """The rows of one curve, by rising ε."""
    rows = [r for r in metrics if r["dataset"] == dataset and r["mechanism"] == mechanism]
    return sorted((r for r in rows if r["epsilon"]), key=lambda r: r["epsilon"])


def baseline(metrics: list[dict[str, Any]], dataset: str, mechanism: str) -> float:
    """The accuracy of a row without ε."""
    return next(
        r["accuracy"]
        for r in metrics
        if (r["dataset"], r["mechanism"], r["epsilon"]) == (dataset, mechanism, None)
    )


def show_table(
    metrics: list[dict[str, Any]], tasks: list[_records.Task], settings: Settings
) -> None:
    for task in tasks:
        records = len(task.rows) - task.queries
        print(
            f"\n{task.name}: {records} private records, {task.queries} public queries, "
            f"δ = {settings.delta:g}; always the most frequent class: "
            f"{baseline(metrics, task.name, 'MajorityClass'):.3f}; non-private at its sharpest: "
            f"{baseline(metrics, task.name, 'NonPrivate'):.3f}"
        )
        print(f"{'accuracy at ε =':30}" + "".join(f"{e:>12g}" for e in settings.epsilons))
        for name, (label, _, _) in _STYLES.items():
            cells = "".join(
                f"{r['accuracy']:7.3f}±{r['standard_error']:.3f}"
                for r in series(metrics, task.name, name)
            )
            print(f"{label:30} {cells}")


def draw(metrics: list[dict[str, Any]], tasks: list[_records.Task], settings: Settings) -> Any:
    """Accuracy against ε, one panel for each data set."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    figure, panels = pyplot.subplots(1, len(tasks), figsize=(10, 4.6), sharey=True)
    for panel, task in zip(panels, tasks, strict=True):
        for name, (label, colour, marker) in _STYLES.items():
            rows = series(metrics, task.name, name)
            panel.errorbar(
                [r["epsilon"] for r in rows],
                [r["accuracy"] for r in rows],
                yerr=[2 * r["standard_error"] for r in rows],
                label=label,
                color=colour,
                marker=marker or None,
                linestyle="-" if marker else "--",
                linewidth=1.6,
                markersize=5,
                markerfacecolor="white" if name == "RandomFeatures" else colour,
                capsize=2,
            )
        panel.axhline(
            baseline(metrics, task.name, "MajorityClass"),
            color="#777777",
            linestyle=":",
            label="always the most frequent class",
        )
        records = len(task.rows) - task.queries
        title = task.name.replace("_", " ")
        panel.set_title(f"{title}: {records} private records, {task.queries} joint queries")
        panel.set_xscale("log", base=2)
        panel.xaxis.set_major_locator(FixedLocator(settings.epsilons))
        panel.xaxis.set_minor_locator(NullLocator())
        panel.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
        panel.set_xlabel(f"ε (δ = {settings.delta:g})")
        panel.set_ylim(0, 1)
        panel.grid(color="#dddddd", linewidth=0.6)
    panels[0].set_ylabel("accuracy of the joint answer (± 2 standard errors)")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="lower center", ncols=4, frameon=False, fontsize=9)
    figure.tight_layout(rect=(0, 0.11, 1, 1))
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--smoke", action="store_true", help="a small scale, under a minute")
    parser.add_argument("--temperature-factor", type=float, default=1.0)
    parser.add_argument("--results", type=pathlib.Path, default=_common.RESULTS)
    parser.add_argument("--figures", type=pathlib.Path, default=_common.FIGURES)
    arguments = parser.parse_args()
    settings = dataclasses.replace(
        SMOKE if arguments.smoke else Settings(), temperature_factor=arguments.temperature_factor
    )
    watch = _common.Stopwatch()
    check(settings)

    tasks = [_records.digits(), _records.breast_cancer()]
    pairs = [(task, epsilon) for task in tasks for epsilon in settings.epsilons]
    jobs = [Job(task, epsilon, index) for index, (task, epsilon) in enumerate(pairs)]
    metrics = [row for task in tasks for row in baselines(task, settings)]
    # Two threads: most of the time goes into compiling, which runs beside Python.
    with concurrent.futures.ThreadPoolExecutor(max_workers=2) as pool:
        futures = [pool.submit(run_job, job, settings) for job in jobs]
        for future in _common.track(futures, "data sets × ε"):
            metrics.extend(future.result())

    show_table(metrics, tasks, settings)
    name = "private_memory"
    if settings.temperature_factor == 1:
        arguments.figures.mkdir(parents=True, exist_ok=True)
        picture = arguments.figures / f"{name}.png"
        draw(metrics, tasks, settings).savefig(picture, dpi=150)
        print(f"\nwrote {picture}")
    else:
        name += "_temperature"  # not the experiment's answer: a file of its own
    path = _common.append_line(arguments.results, name, settings, metrics, watch.seconds())
    print(f"appended one line to {path} after {watch.seconds():.0f} s")


if __name__ == "__main__":
    main()
