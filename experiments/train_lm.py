"""What does differential privacy cost a small language model trained from scratch?

    python experiments/train_lm.py                     all four runs; Ctrl-C and again goes on
    python experiments/train_lm.py --minutes 9         stops in time, the same command goes on
    python experiments/train_lm.py --no-checkpoints    keeps nothing but the lines (needs no orbax)
    python experiments/train_lm.py --epsilons none 8   some of them
    python experiments/train_lm.py --nnx               the nnx model
    python experiments/train_lm.py --unit file         protects whole files
    python experiments/train_lm.py --account           adds ε by loss distributions to the last runs
    python experiments/train_lm.py --plot              the picture of the last runs
    python experiments/train_lm.py --smoke             a tiny model, under half a minute

A byte-level transformer of nanoGPT's size reads 256-byte windows of the Python standard library's
sources and pydoc's topics (`_text.py`); bits per byte are those of held-out files. THE UNIT OF
PRIVACY is one 256-byte chunk (`--unit chunk`, the default: ε says nothing about whole files) or one
file (`--unit file`: 8 windows of a file are one record, clipped together). ZERO_OUT: one unit is
there or NULL at its position. The number of records, the corpus's digest and every setting are
public; held-out files are public too. Nothing is chosen by looking at the records: no loss of
theirs is shown or kept. Settings come from the literature and from trials on held-out files alone.

A run draws its batches with `sampling.TruncatedPoisson`, clips per unit with
`clipping.clipped_grad`, adds noise with `optim.privatize` under a target, and steps with Adam. The
non-private run sees as many windows, in smaller batches and more steps, which suits it better, with
plain gradients. Keys come from a seed, since an experiment is repeatable; a deployment takes
`random.secure_key()`.
"""

import argparse
import dataclasses
import math
import pathlib
import sys
from collections.abc import Callable
from typing import Any

import _checkpoints
import _common
import _lm_report
import _lm_training
import _text
import jax
import jax.numpy as jnp

import dpfa_jax as dp
from dpfa_jax import optim


@dataclasses.dataclass(frozen=True)
class Settings:
    """What is run; every field is public.

    Attributes:
      unit: "chunk" or "file": what one record is, and so what ε protects.
      api: "linen" or "nnx".
      epsilon: of the whole run by Rényi curves, nats; None trains without privacy.
      delta: below 1/records.
      steps: of the optimizer; a private run has noise for exactly so many.
      batch: expected records of a batch (q = batch/records).
      plain_split: the run without privacy has batches smaller, and steps more, by this factor.
      clip_norm: of one unit's gradient of its mean loss; where `normalize` is given Adam undoes it.
      normalize: γ of automatic clipping, that of Bu et al. 2022: every gradient is about as long as
        the clip norm, which then need not be chosen. None clips.
      learning_rate: of Adam at its peak, after a tenth of warm-up, then a cosine to 0. At this one
        the noise moves a weight by rate/2·√steps, about the 1/√width of the first weights, which
        did best in trials on held-out files with widths of 64 and 160.
      plain_learning_rate: of the run without privacy; nanoGPT's.
      layers, width, heads: nanoGPT's small character model has 6, 384, 6.
      windows_per_file: windows of a record where the unit is a file.
      microbatch: windows whose gradients are held at a time; memory, not result.
      method: of per-example clipping, as `clipping.clipped_grad` takes it; speed, not result.
      order: of the n-gram baseline.
      held_out: chunks of held-out files that curves look at; the last number is of all of them.
      every: steps between two looks.
      dtype: of activations; parameters, gradients and noise are float32.
      backend: of attention, "auto", "triton" or "xla".
      loss_grid: width of the grid of the loss distributions, nats; they are rounded up to it.
      seed: of parameters, batches and (since this is an experiment) noise.
      most_records: keeps the first records only; None keeps all.
    """

    unit: str = "chunk"
    api: str = "linen"
    epsilon: float | None = None
    delta: float = 1e-5
    steps: int = 512
    batch: int = 1024
    plain_split: int = 4
    clip_norm: float = 1.0
    normalize: float | None = 0.01
    learning_rate: float = 4e-3
    plain_learning_rate: float = 1e-3
    layers: int = 6
    width: int = 384
    heads: int = 6
    windows_per_file: int = 8
    microbatch: int = 256
    method: str = "auto"
    order: int = 5
    held_out: int = 512
    every: int = 32
    dtype: str = "bfloat16"
    backend: str = "auto"
    loss_grid: float = 1e-4
    seed: int = 0
    most_records: int | None = None


EPSILONS = (None, 8.0, 3.0, 1.0)
FILE = {"batch": 128, "steps": 256}
"""What `--unit file` has instead: there are under a thousand files."""
OPTIONS = {
    int: "steps batch plain_split microbatch every width layers heads seed most_records",
    float: "learning_rate plain_learning_rate clip_norm normalize delta",
    str: "backend dtype method",
}
"""Settings that the command line takes by their names."""
SMOKE = Settings(
    steps=6,
    batch=16,
    plain_split=2,
    layers=1,
    width=16,
    heads=2,
    microbatch=16,
    order=3,
    held_out=64,
    every=3,
    loss_grid=1e-2,
    dtype="float32",
    most_records=512,
)


# One run ----------------------------------------------------------------------------------------


def _spent(training: _lm_training.Training, settings: Settings) -> float | None:
    if settings.epsilon is None:
        return None
    return optim.epsilon(training.opt_state, settings.delta)


def _clock(seconds: float) -> str:
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"


@dataclasses.dataclass(frozen=True)
class Text:
    """The corpus on the device: records, and held-out windows in parts of one look each."""

    corpus: _text.Corpus
    records: jax.Array
    parts: jax.Array


def on_device(corpus: _text.Corpus, look: int) -> Text:
    count = len(corpus.held_out) // look
    held_out = jnp.asarray(corpus.held_out[: count * look])
    parts = held_out.reshape(look, count, -1).swapaxes(0, 1)
    return Text(corpus, jnp.asarray(corpus.records), parts)


def train(
    settings: Settings,
    run: _lm_training.Run,
    text: Text,
    store: _checkpoints.Store | None,
    stopped: Callable[[], bool],
) -> tuple[list[dict[str, Any]], float, bool]:
    """Trains to the end or until it is stopped; (rows, seconds, whether it came to the end)."""
    training, begin, notes = run.start, 0, {"curve": [], "seconds": 0.0}
    found = store.latest(run.start) if store else None
    if found:
        begin, training, notes = found
        print(f"going on from step {begin}", flush=True)
    coordinates = sum(leaf.size for leaf in jax.tree.leaves(training.params))
    name = "without privacy" if settings.epsilon is None else f"ε = {settings.epsilon:g}"
    print(
        f"{name}: {coordinates:,} parameters, {len(text.records):,} records, "
        f"{run.sampler}, noise multiplier {run.noise_multiplier:.4g}, δ = {settings.delta:g}, "
        f"gradients by {run.method or 'jax.grad'}",
        flush=True,
    )
    watch, before = _common.Stopwatch(), float(notes["seconds"])
    curve, timed, each = list(notes["curve"]), None, None
    size = run.sampler.expected_batch_size
    same = {"model": settings.api, "unit": settings.unit, "epsilon": settings.epsilon}
    for step in range(begin, run.steps):
        last, training = training, run.step(training, text.records)
        jax.block_until_ready(last.params)  # one step ahead of the device, so that clocks are right
        done = step + 1
        if timed is None:  # the first step waits for its program
            jax.block_until_ready(training.params)
            timed = (done, watch.seconds())
        look = done % run.every == 0 or done == run.steps
        stop = stopped()
        if look:
            bits = float(run.bits(training.params, text.parts[0]))
            epsilon = _spent(training, settings)
            seconds = before + watch.seconds()
            each = (watch.seconds() - timed[1]) / max(done - timed[0], 1)
            row = {"phase": "curve"} | same | {"step": done, "windows": round(done * size)}
            row |= {"bits_per_byte": round(bits, 4), "epsilon_rdp": epsilon}
            curve.append(row | {"seconds": round(seconds, 1)})
            so_far = "" if epsilon is None else f", ε {epsilon:.3f} so far"
            print(
                f"step {done}/{run.steps}: {bits:.3f} bits/byte held out{so_far}, "
                f"{each:.3f} s a step, {_clock(each * (run.steps - done))} left",
                flush=True,
            )
        if store and (look or stop):
            jax.block_until_ready(training.params)
            seconds = before + watch.seconds()
            store.save(done, training, {"curve": curve, "seconds": seconds})
        if stop and done < run.steps:
            return curve, before + watch.seconds(), False
    every_part = [float(run.bits(training.params, part)) for part in text.parts]
    final = {"phase": "final"} | same
    final |= {
        "step": run.steps,
        "bits_per_byte": round(sum(every_part) / len(every_part), 4),
        "epsilon_rdp": _spent(training, settings),
        "epsilon_pld": None,
        "noise_multiplier": run.noise_multiplier,
        "batch": size,
        "method": run.method,
        "seconds_per_step": each and round(each, 4),
        "records": len(text.records),
        "parameters": coordinates,
        "held_out_chunks": text.parts.shape[0] * text.parts.shape[1],
        "corpus": text.corpus.digest,
        "python": sys.version.split()[0],
    }
    if settings.epsilon is not None:
        final |= {"sampling_rate": run.sampler.sampling_rate, "capacity": run.sampler.capacity}
        check_account(final, settings, run)
        final["epsilon_pld"] = _lm_report.loss_distribution_epsilon(
            settings, run.sampler, run.noise_multiplier, coordinates
        )
    return [final, *curve], before + watch.seconds(), True


def check_account(final: dict[str, Any], settings: Settings, run: _lm_training.Run) -> None:
    """Fails unless the state's ε is that of the plan and keeps to the target."""
    event = run.sampler.event(run.noise_multiplier, final["parameters"], dp.random.WIDE_RADIUS_BITS)
    planned = dp.accounting.epsilon(dp.accounting.Repeated(event, settings.steps), settings.delta)
    assert settings.epsilon is not None
    if not final["epsilon_rdp"] == planned <= settings.epsilon:
        raise SystemExit(
            f"The state says ε = {final['epsilon_rdp']}, the plan {planned}, the target "
            f"{settings.epsilon}: no line is written."
        )


def baselines(settings: Settings, corpus: _text.Corpus) -> list[dict[str, Any]]:
    """Bits per byte of models that count, without privacy."""
    rows = []
    for name, order in (("unigram", 1), (f"{settings.order}-gram", settings.order)):
        if order == 1:
            bits = _text.unigram_bits(corpus.records, corpus.held_out)
        else:
            bits = _text.ngram_bits(corpus.records, corpus.held_out, order)
        same = {"phase": "baseline", "model": name, "unit": settings.unit, "epsilon": None}
        rows.append(same | {"bits_per_byte": round(bits, 4)})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--smoke", action="store_true")
    parser.add_argument("--nnx", action="store_true")
    parser.add_argument("--account", action="store_true")
    parser.add_argument("--plot", action="store_true")
    parser.add_argument("--no-checkpoints", action="store_true")
    parser.add_argument("--unit", choices=("chunk", "file"), default="chunk")
    parser.add_argument("--epsilons", nargs="+", help="numbers, or none")
    parser.add_argument("--minutes", type=float, default=math.inf)
    parser.add_argument("--results", type=pathlib.Path, default=_common.RESULTS)
    parser.add_argument("--figures", type=pathlib.Path, default=_common.FIGURES)
    parser.add_argument("--checkpoints", type=pathlib.Path, default=pathlib.Path("checkpoints"))
    for kind, names in OPTIONS.items():
        for name in names.split():
            parser.add_argument(f"--{name.replace('_', '-')}", type=kind)
    given = parser.parse_args()
    settings = SMOKE if given.smoke else Settings()
    if given.unit == "file" and not given.smoke:
        settings = dataclasses.replace(settings, **FILE)
    if given.smoke:  # compiling is most of it
        jax.config.update("jax_disable_most_optimizations", True)
    changed = {
        field.name: getattr(given, field.name)
        for field in dataclasses.fields(settings)
        if getattr(given, field.name, None) is not None
    }
    settings = dataclasses.replace(settings, **changed, api="nnx" if given.nnx else "linen")
    if given.account or given.plot:
        if given.account:
            _lm_report.account(given.results, settings)
            _lm_report.summarize(given.results, settings)
        if given.plot:
            _lm_report.plot(given.results, given.figures, settings)
        return
    names = given.epsilons or (["none", "2"] if given.smoke else [None])
    epsilons = [None if n in ("none", None) else float(n) for n in names]
    if names == [None]:
        epsilons = list(EPSILONS)
    watch, interrupt = _common.Stopwatch(), _checkpoints.Interrupt()
    corpus = _text.load(settings.unit, settings.windows_per_file, settings.most_records)
    text = on_device(corpus, settings.held_out)
    print(
        f"the unit of privacy is one {settings.unit}; {len(corpus.records):,} records, "
        f"{len(corpus.held_out):,} held-out chunks, corpus {corpus.digest}",
        flush=True,
    )
    model, programs, runs = _lm_training.create(settings), _lm_training.Programs(), {}
    finished = _lm_report.last_runs(given.results, settings)
    for epsilon in epsilons:
        if epsilon in finished:
            print(f"ε = {epsilon} has its line already", flush=True)
            continue
        own = dataclasses.replace(settings, epsilon=epsilon)
        runs[own] = _lm_training.prepare(own, model, programs, text.records, text.parts[0])
    print(f"{watch.seconds():.0f} s: compiling in the background", flush=True)
    _lm_training.check_clipping(settings, corpus.records)
    counted = baselines(settings, corpus)
    for row in counted:
        print(f"{row['model']}: {row['bits_per_byte']:.3f} bits/byte", flush=True)

    def stopped():
        return interrupt.seen or watch.seconds() > 60 * given.minutes

    for own, run in runs.items():
        store = None
        if not given.no_checkpoints:
            name = f"{own.unit}_{own.api}_{own.epsilon}_{own.steps}"
            store = _checkpoints.Store(given.checkpoints, name, own)
        print(f"{watch.seconds():.0f} s since the start", flush=True)
        rows, seconds, is_whole = train(own, run, text, store, stopped)
        if not is_whole:
            if store is None:
                _common.append_line(given.results, "train_lm_unfinished", own, rows, seconds)
                sys.exit("stopped; what it had seen so far stands in train_lm_unfinished.jsonl")
            print("stopped; the same command goes on from there", flush=True)
            sys.exit(130 if interrupt.seen else 0)
        path = _common.append_line(given.results, "train_lm", own, [*rows, *counted], seconds)
        print(f"{rows[0]['bits_per_byte']:.3f} bits/byte; one line more in {path}", flush=True)


if __name__ == "__main__":
    main()
