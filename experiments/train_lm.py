"""What does differential privacy cost a small language model trained from scratch?

    python experiments/train_lm.py                     all four runs; Ctrl-C and again goes on
    python experiments/train_lm.py --minutes 9         stops in time, the same command goes on
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
theirs is shown or kept.

A run draws its batches with `sampling.TruncatedPoisson`, clips per unit with
`clipping.clipped_grad`, adds noise with `optim.privatize` under a target, and steps with Adam. The
non-private run has the same batches and plain gradients. Keys come from a seed, since an experiment
is repeatable; a deployment takes `random.secure_key()`.
"""

import argparse
import dataclasses
import math
import pathlib
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import _checkpoints
import _common
import _language_models
import _lm_report
import _text
import jax
import jax.numpy as jnp
import numpy as np
import optax

import dpfa_jax as dp
from dpfa_jax import clipping, optim, sampling


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
      clip_norm: of one unit's gradient of its mean loss in nats per byte.
      learning_rate: of Adam at its peak, after a tenth of warm-up, then a cosine to a tenth.
      layers, width, heads: nanoGPT's small character model has 6, 384, 6.
      windows_per_file: windows of a record where the unit is a file.
      microbatch: units whose gradients are held at a time; memory, not result.
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
    steps: int = 600
    batch: int = 1024
    clip_norm: float = 1.0
    learning_rate: float = 1e-3
    layers: int = 6
    width: int = 384
    heads: int = 6
    windows_per_file: int = 8
    microbatch: int = 128
    method: str = "vmap"
    order: int = 5
    held_out: int = 512
    every: int = 50
    dtype: str = "bfloat16"
    backend: str = "auto"
    loss_grid: float = 1e-4
    seed: int = 0
    most_records: int | None = None


EPSILONS = (None, 8.0, 3.0, 1.0)
SMOKE = Settings(
    steps=6,
    batch=16,
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


class Training(NamedTuple):
    """Everything that a resumed run needs to go on as if it had never stopped."""

    params: Any
    opt_state: Any
    sampler: Any


class Run(NamedTuple):
    """One run, ready to start: its sampler, noise and compiled functions."""

    sampler: sampling.TruncatedPoisson
    noise_multiplier: float
    step: Callable[[Training, Any], Training]
    bits: Callable[[Any, Any], Any]
    start: Training


def make_sampler(settings: Settings, records: int) -> sampling.TruncatedPoisson:
    rate = settings.batch / records
    capacity = sampling.truncation_capacity(
        records=records,
        sampling_rate=rate,
        steps=settings.steps,
        epsilon=settings.epsilon or 8.0,
        delta=settings.delta,
        multiple_of=settings.microbatch,
    )
    return sampling.TruncatedPoisson(records, rate, capacity)


def noise_for(settings: Settings, sampler: sampling.TruncatedPoisson, coordinates: int) -> float:
    """The smallest noise multiplier whose `steps` steps keep to the target, by Rényi curves."""
    assert settings.epsilon is not None

    def whole(noise_multiplier: float) -> dp.accounting.Event:
        step = sampler.event(noise_multiplier, coordinates, dp.random.WIDE_RADIUS_BITS)
        return dp.accounting.Repeated(step, settings.steps)

    return dp.accounting.calibrate.smallest(
        whole, epsilon=settings.epsilon, delta=settings.delta, low=0.2, high=200.0, tolerance=1e-4
    )


def prepare(settings: Settings, records: int) -> Run:
    """Compiles nothing yet; parameters, optimizer and sampler at their start."""
    size = _language_models.Size(
        settings.layers, settings.width, settings.heads, settings.dtype, settings.backend
    )
    seed = jax.random.key(settings.seed)
    params, logits = _language_models.create(size, jax.random.fold_in(seed, 0), settings.api)
    coordinates = sum(leaf.size for leaf in jax.tree.leaves(params))
    sampler = make_sampler(settings, records)
    rate = optax.warmup_cosine_decay_schedule(
        0.0,
        settings.learning_rate,
        max(1, settings.steps // 10),
        settings.steps,
        settings.learning_rate / 10,
    )
    adam = optax.adam(rate, b2=0.99)
    multiplier, tx = 0.0, optax.with_extra_args_support(adam)
    if settings.epsilon is not None:
        multiplier = noise_for(settings, sampler, coordinates)
        private = optim.privatize(
            noise_multiplier=multiplier,
            sampling=sampler,
            rng=dp.random.fold_in(seed, 1),
            target=(settings.epsilon, settings.delta),
        )
        tx = optax.chain(private, adam)

    def loss(params, tokens):
        return _language_models.nats(logits, params, tokens)

    clipped = clipping.clipped_grad(
        loss,
        clip_norm=settings.clip_norm,
        microbatch_size=settings.microbatch,
        method=settings.method,
    )

    def mean_gradient(params, tokens, mask):
        """The gradient of the mean loss over a batch, in microbatches."""

        def add(total, part):
            def masked(params):
                return jnp.sum(jax.vmap(loss, (None, 0))(params, part[0]) * part[1])

            return jax.tree.map(jnp.add, total, jax.grad(masked)(params)), None

        blocks = sampler.slots // settings.microbatch
        parts = jax.tree.map(lambda x: x.reshape(blocks, -1, *x.shape[1:]), (tokens, mask * 1.0))
        total, _ = jax.lax.scan(add, jax.tree.map(jnp.zeros_like, params), parts)
        return jax.tree.map(lambda leaf: leaf / jnp.sum(mask), total)

    @jax.jit
    def step(training: Training, data: Any) -> Training:
        batch, state = sampler.next(training.sampler)
        tokens, params = batch.gather(data), training.params
        if settings.epsilon is None:
            gradient = mean_gradient(params, tokens, batch.mask)
            updates, opt_state = tx.update(gradient, training.opt_state, params)
        else:
            c = clipped(params, tokens, mask=batch.mask)
            updates, opt_state = tx.update(c.tree, training.opt_state, params, clipped=c)
        return Training(optax.apply_updates(params, updates), opt_state, state)

    @jax.jit
    def bits(params: Any, windows: Any) -> jax.Array:
        blocks = windows.reshape(-1, min(32, windows.shape[0]), windows.shape[-1])
        each = jax.lax.map(lambda block: jax.vmap(loss, (None, 0))(params, block), blocks)
        return jnp.mean(each) / math.log(2.0)

    start = Training(params, tx.init(params), sampler.init(dp.random.fold_in(seed, 2)))
    return Run(sampler, multiplier, step, bits, start)


def check_clipping(settings: Settings, records: np.ndarray) -> None:
    """Fails unless a clipped sum of four records is that of one gradient after the other."""
    layers = min(settings.layers - 1, 1)  # a smoke run has no second to compile attention twice
    size = _language_models.Size(layers, 16, 2, "float32", settings.backend)
    params, logits = _language_models.create(size, jax.random.key(1), settings.api)

    def loss(params, tokens):
        return _language_models.nats(logits, params, tokens)

    four = jnp.asarray(records[:4])
    mask = jnp.array([True, True, False, True])
    bound = 0.5 * settings.clip_norm
    clipped = clipping.clipped_grad(loss, clip_norm=bound, method=settings.method)
    found = jax.jit(clipped)(params, four, mask=mask).tree
    gradient = jax.jit(jax.grad(loss))
    wanted = jax.tree.map(lambda leaf: np.zeros(leaf.shape), params)
    for row in (0, 1, 3):
        one = jax.tree.map(lambda x: np.asarray(x, np.float64), gradient(params, four[row]))
        norm = math.sqrt(sum(float(np.sum(leaf**2)) for leaf in jax.tree.leaves(one)))
        factor = min(1.0, bound / norm)
        wanted = jax.tree.map(lambda total, leaf, f=factor: total + f * leaf, wanted, one)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        if not np.allclose(np.asarray(a), b, rtol=0, atol=2e-2 * bound):
            raise SystemExit(
                f"The clipped sum is off by {np.abs(np.asarray(a) - b).max()} from a loop over its "
                "examples in float64: no line is written."
            )


# One run ----------------------------------------------------------------------------------------


def _spent(run: Run, training: Training, settings: Settings) -> float | None:
    if settings.epsilon is None:
        return None
    return optim.epsilon(training.opt_state, settings.delta)


def _clock(seconds: float) -> str:
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"


def train(
    settings: Settings,
    corpus: _text.Corpus,
    store: _checkpoints.Store,
    interrupt: _checkpoints.Interrupt,
    deadline: Callable[[], bool],
) -> tuple[list[dict[str, Any]], float] | None:
    """Trains until the end and returns (records, seconds), or None where it was stopped."""
    run = prepare(settings, len(corpus.records))
    data = jnp.asarray(corpus.records)
    parts = len(corpus.held_out) // settings.held_out
    public = jnp.asarray(corpus.held_out[: parts * settings.held_out])
    public = public.reshape(settings.held_out, parts, -1).swapaxes(0, 1)
    training, begin, notes = run.start, 0, {"curve": [], "seconds": 0.0}
    found = store.latest(run.start)
    if found:
        begin, training, notes = found
        print(f"going on from step {begin}", flush=True)
    coordinates = sum(leaf.size for leaf in jax.tree.leaves(training.params))
    name = "without privacy" if settings.epsilon is None else f"ε = {settings.epsilon:g}"
    print(
        f"{name}: {coordinates:,} parameters, {len(corpus.records):,} records, q = "
        f"{run.sampler.sampling_rate:.4f}, capacity {run.sampler.capacity}, noise multiplier "
        f"{run.noise_multiplier:.4g}, δ = {settings.delta:g}",
        flush=True,
    )
    watch, before = _common.Stopwatch(), float(notes["seconds"])
    curve, timed = list(notes["curve"]), None
    for step in range(begin, settings.steps):
        training = run.step(training, data)
        done = step + 1
        if timed is None:  # the first step compiles
            jax.block_until_ready(training.params)
            timed = (done, watch.seconds())
        look = done % settings.every == 0 or done == settings.steps
        stop = interrupt.seen or deadline()
        if look:
            bits = float(run.bits(training.params, public[0]))
            epsilon = _spent(run, training, settings)
            curve.append({"step": done, "bits_per_byte": round(bits, 4), "epsilon_rdp": epsilon})
            each = (watch.seconds() - timed[1]) / max(done - timed[0], 1)
            so_far = "" if epsilon is None else f", ε {epsilon:.3f} so far"
            left = _clock(each * (settings.steps - done))
            print(
                f"step {done}/{settings.steps}: {bits:.3f} bits/byte held out{so_far}, "
                f"{each:.2f} s a step, {left} left",
                flush=True,
            )
        if look or stop:
            jax.block_until_ready(training.params)
            seconds = before + watch.seconds()
            store.save(done, training, {"curve": curve, "seconds": seconds})
        if stop and done < settings.steps:
            print(f"stopped after step {done}; the same command goes on from there", flush=True)
            return None
    every_part = [float(run.bits(training.params, part)) for part in public]
    final = {
        "phase": "final",
        "model": settings.api,
        "unit": settings.unit,
        "epsilon": settings.epsilon,
        "step": settings.steps,
        "bits_per_byte": round(sum(every_part) / parts, 4),
        "epsilon_rdp": _spent(run, training, settings),
        "epsilon_pld": None,
        "noise_multiplier": run.noise_multiplier,
        "sampling_rate": run.sampler.sampling_rate,
        "capacity": run.sampler.capacity,
        "records": len(corpus.records),
        "parameters": coordinates,
        "held_out_chunks": parts * settings.held_out,
        "corpus": corpus.digest,
        "python": sys.version.split()[0],
    }
    if settings.epsilon is not None:
        check_account(final, settings, run)
        final["epsilon_pld"] = _lm_report.loss_distribution_epsilon(
            settings, run.sampler, run.noise_multiplier, coordinates
        )
    same = {key: final[key] for key in ("model", "unit", "epsilon")}
    rows = [{"phase": "curve"} | same | row for row in curve]
    return [final, *rows], before + watch.seconds()


def check_account(final: dict[str, Any], settings: Settings, run: Run) -> None:
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
    parser.add_argument("--unit", choices=("chunk", "file"), default="chunk")
    parser.add_argument("--epsilons", nargs="+", help="numbers, or none")
    parser.add_argument("--minutes", type=float, default=math.inf)
    parser.add_argument("--results", type=pathlib.Path, default=_common.RESULTS)
    parser.add_argument("--figures", type=pathlib.Path, default=_common.FIGURES)
    parser.add_argument("--checkpoints", type=pathlib.Path, default=pathlib.Path("checkpoints"))
    for name in ("steps", "batch", "microbatch", "every", "width", "layers", "heads"):
        parser.add_argument(f"--{name}", type=int)
    for name in ("learning_rate", "clip_norm"):
        parser.add_argument(f"--{name.replace('_', '-')}", type=float)
    for name in ("backend", "dtype", "method"):
        parser.add_argument(f"--{name}")
    given = parser.parse_args()
    settings = SMOKE if given.smoke else Settings()
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
        if given.plot:
            _lm_report.plot(given.results, given.figures, settings)
        return
    names = given.epsilons or (["none", "2"] if given.smoke else [None])
    epsilons = [None if n in ("none", None) else float(n) for n in names]
    if names == [None]:
        epsilons = list(EPSILONS)
    watch, interrupt = _common.Stopwatch(), _checkpoints.Interrupt()
    corpus = _text.load(settings.unit, settings.windows_per_file, settings.most_records)
    print(
        f"the unit of privacy is one {settings.unit}; {len(corpus.records):,} records, "
        f"{len(corpus.held_out):,} held-out chunks, corpus {corpus.digest}",
        flush=True,
    )
    check_clipping(settings, corpus.records)
    counted = baselines(settings, corpus)
    for row in counted:
        print(f"{row['model']}: {row['bits_per_byte']:.3f} bits/byte", flush=True)
    for epsilon in epsilons:
        own = dataclasses.replace(settings, epsilon=epsilon)
        if epsilon in _lm_report.last_runs(given.results, settings):
            print(f"ε = {epsilon} has its line already", flush=True)
            continue
        name = f"{own.unit}_{own.api}_{own.epsilon}_{own.steps}"
        store = _checkpoints.Store(given.checkpoints, name, own)
        out = train(own, corpus, store, interrupt, lambda: watch.seconds() > 60 * given.minutes)
        if out is None:
            sys.exit(130 if interrupt.seen else 0)
        rows, seconds = out
        path = _common.append_line(given.results, "train_lm", own, [*rows, *counted], seconds)
        print(f"{rows[0]['bits_per_byte']:.3f} bits/byte; one line more in {path}", flush=True)


if __name__ == "__main__":
    main()
