"""Who can tell that a record was in the training data, with and without privacy?

    python experiments/membership.py            table and one line of results, under 3 minutes
    python experiments/membership.py --smoke    the same on a small scale, some seconds

Two membership attacks on a small classifier of scikit-learn's handwritten digits:

* "loss": a record whose loss on the trained model is small was a member (one threshold for all);
* "lira": the likelihood-ratio attack of Carlini et al. 2022 (arXiv:2112.03570, Algorithm 1, with a
  variance that all records share): the attacker has trained many models with and without each
  record, and compares the record's confidence with both.

Every model is trained on its own random half of the records; each is a target once and a shadow
model for all others. A fifth of the labels are wrong, the same ones for all models: those records
can only be learned by heart. The non-private models train until they know them, which is the
control: an attack that finds nothing there would prove nothing elsewhere. The private ones have the
same batches, clipped by `clipping.clipped_grad` and noised by `optim.privatize` for the stated
(ε, δ). ZERO_OUT: a record that is no member is NULL in its place, as the batch's mask makes it.

What ε implies: no attack at all, of whatever knowledge, has more true positives at 1 % false ones
than `accounting.attacker.true_positive_rate` of the run's releases. That holds for each record,
hence, the bound being concave, for the average over records that one threshold gives. The run
refuses to write its line where an attack is above the bound by 4 standard errors (over models), or
where the attack on the non-private models is too weak to mean anything.
"""

import argparse
import dataclasses
import math
import pathlib
from collections.abc import Callable
from typing import Any

import _common
import _records
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from scipy import special

import dpfa_jax as dp
from dpfa_jax import clipping, optim, sampling


@dataclasses.dataclass(frozen=True)
class Settings:
    """What is run; every field is public.

    Attributes:
      epsilons: of a whole training run by Rényi curves, nats; None trains without privacy.
      delta: below 1/records.
      records: that may be members; the rest of the 1797 are held out.
      models: each a target once and a shadow model for the others.
      wrong_labels: share of the records whose label is replaced by the next one.
      width: of the one hidden layer.
      steps: of the optimizer.
      batch: expected members and non-members of a batch together (q = batch/records).
      clip_norm: of one record's gradient.
      learning_rate: of Adam.
      together: models that are trained at a time; memory, not result.
      false_positive_rate: at which true positives are counted.
      least: true positives that the best attack on non-private models must have.
      seed: of everything (an experiment is repeatable; a deployment takes `secure_key`).
    """

    epsilons: tuple[float | None, ...] = (None, 8.0, 1.0)
    delta: float = 1e-5
    records: int = 400
    models: int = 64
    wrong_labels: float = 0.2
    width: int = 32
    steps: int = 300
    batch: int = 100
    clip_norm: float = 1.0
    learning_rate: float = 2e-2
    together: int = 8
    false_positive_rate: float = 0.01
    least: float = 0.1
    seed: int = 0


SMOKE = Settings(epsilons=(None, 8.0), records=100, models=8, steps=40, batch=25, least=0.02)


CLASSES = 10


class Classifier(nn.Module):
    """One hidden layer."""

    width: int

    @nn.compact
    def __call__(self, x):
        hidden = nn.relu(nn.Dense(self.width, name="hidden")(x))
        return nn.Dense(CLASSES, name="out")(hidden)


@dataclasses.dataclass(frozen=True)
class Data:
    """Rows and labels: records that may be members, and held-out ones with right labels."""

    rows: np.ndarray
    labels: np.ndarray
    is_wrong: np.ndarray
    other_rows: np.ndarray
    other_labels: np.ndarray


def load(settings: Settings) -> Data:
    task = _records.digits()
    source = np.random.default_rng(settings.seed)
    order = source.permutation(len(task.rows))
    own, other = order[: settings.records], order[settings.records :]
    is_wrong = source.random(settings.records) < settings.wrong_labels
    labels = (task.labels[own] + is_wrong) % task.classes
    rows = np.asarray(task.rows, np.float32)
    return Data(rows[own], labels, is_wrong, rows[other], task.labels[other])


# ---- Training


def make_sampler(settings: Settings) -> sampling.TruncatedPoisson:
    rate = settings.batch / settings.records
    capacity = sampling.truncation_capacity(
        records=settings.records,
        sampling_rate=rate,
        steps=settings.steps,
        epsilon=max(each or 0.0 for each in settings.epsilons),
        delta=settings.delta,
    )
    return sampling.TruncatedPoisson(settings.records, rate, capacity)


def draw(settings: Settings, sampler: sampling.TruncatedPoisson) -> sampling.Batch:
    """The batches of every step of every model, (models, steps, slots): the same for every ε."""

    def of_one(rng):
        def step(state, _):
            batch, state = sampler.next(state)
            return state, batch

        return jax.lax.scan(step, sampler.init(rng), length=settings.steps)[1]

    keys = dp.random.split(jax.random.key(settings.seed + 3), settings.models)
    return jax.jit(jax.vmap(of_one))(keys)


def start(settings: Settings) -> Any:
    """Parameters of every model before its first step, with He's variance for the hidden layer."""
    source = np.random.default_rng(settings.seed + 1)

    def dense(inputs, outputs):
        kernel = source.normal(size=(settings.models, inputs, outputs)) * math.sqrt(2 / inputs)
        zeros = np.zeros((settings.models, outputs), np.float32)
        return {"kernel": kernel.astype(np.float32), "bias": zeros}

    layers = {"hidden": dense(64, settings.width), "out": dense(settings.width, CLASSES)}
    return {"params": layers}


def trainer(
    settings: Settings, data: Data, sampler: sampling.TruncatedPoisson, multiplier: float | None
) -> Callable[[Any, Any, Any, Any], Any]:
    """(key, who is a member, batches, parameters) -> trained parameters of one model."""
    model = Classifier(settings.width)
    rows, labels = jnp.asarray(data.rows), jnp.asarray(data.labels)

    def loss(params, row, label):
        logits: Any = model.apply(params, row)
        return -jax.nn.log_softmax(logits)[label]

    clipped = clipping.clipped_grad(loss, clip_norm=settings.clip_norm)

    def mean_loss(params, batch_rows, batch_labels, mask):
        each = jax.vmap(loss, (None, 0, 0))(params, batch_rows, batch_labels)
        return jnp.sum(jnp.where(mask, each, 0.0)) / sampler.expected_batch_size

    def train(rng, is_member, batches, params):
        adam = optax.adam(settings.learning_rate)
        tx: Any = adam
        if multiplier is not None:
            noise = optim.privatize(noise_multiplier=multiplier, sampling=sampler, rng=rng)
            tx = optax.chain(noise, adam)

        def step(carry, batch):
            params, state = carry
            mask = batch.mask & jnp.take(is_member, batch.indices)
            args = batch.gather((rows, labels))
            if multiplier is None:
                gradient = jax.grad(mean_loss)(params, *args, mask)
                updates, state = tx.update(gradient, state, params)
            else:
                c = clipped(params, *args, mask=mask)
                updates, state = tx.update(c.tree, state, params, clipped=c)
            return (optax.apply_updates(params, updates), state), None

        return jax.lax.scan(step, (params, tx.init(params)), batches)[0][0]

    return train


@dataclasses.dataclass(frozen=True)
class Models:
    """What the trained models say: (models, records) each, and their accuracy."""

    is_member: np.ndarray
    log_odds: np.ndarray
    member_accuracy: float
    held_out_accuracy: float


def train_all(
    settings: Settings, data: Data, batches: sampling.Batch, multiplier: float | None
) -> Models:
    train = trainer(settings, data, make_sampler(settings), multiplier)
    model = Classifier(settings.width)
    source = np.random.default_rng(settings.seed + 2)
    is_member = source.random((settings.models, settings.records)) < 0.5

    @jax.jit
    def run(*operands):
        params = jax.lax.map(lambda each: train(*each), operands, batch_size=settings.together)
        apply = jax.vmap(model.apply, (0, None))
        return apply(params, jnp.asarray(data.rows)), apply(params, jnp.asarray(data.other_rows))

    keys = dp.random.split(jax.random.key(settings.seed + 4), settings.models)
    out = run(keys, jnp.asarray(is_member), batches, start(settings))
    own, other = (np.asarray(each, np.float64) for each in out)
    right = own.argmax(-1) == data.labels
    log_probability = special.log_softmax(own, axis=-1)
    chosen = np.take_along_axis(log_probability, data.labels[None, :, None], -1)[..., 0]
    kinds = np.arange(CLASSES) != data.labels[:, None]
    rest = special.logsumexp(np.where(kinds, log_probability, -np.inf), axis=-1)
    return Models(
        is_member,
        chosen - rest,
        float(right[is_member].mean()),
        float((other.argmax(-1) == data.other_labels).mean()),
    )


# ---- Attacks


def loss_scores(models: Models) -> np.ndarray:
    """Higher for members: the record's probability, as log-odds (the loss falls with it)."""
    return models.log_odds


def lira_scores(models: Models) -> np.ndarray:
    """log N(φ; μ_in, σ_in²) − log N(φ; μ_out, σ_out²), each model left out of its own shadows."""
    odds = models.log_odds

    def fit(chosen):
        """Means over the other models that were chosen, and one variance for all records."""
        count = np.maximum(chosen.sum(0) - chosen, 1)
        mean = ((odds * chosen).sum(0) - odds * chosen) / count
        # A residual to the mean of n others has the variance 1 + 1/n.
        square = (odds - mean) ** 2 / (1.0 + 1.0 / count)
        return mean, square[chosen].mean()

    (mean_in, var_in), (mean_out, var_out) = fit(models.is_member), fit(~models.is_member)
    inside = (odds - mean_in) ** 2 / var_in + math.log(var_in)
    outside = (odds - mean_out) ** 2 / var_out + math.log(var_out)
    return 0.5 * (outside - inside)


ATTACKS = {"loss": loss_scores, "lira": lira_scores}


def area(members: np.ndarray, others: np.ndarray) -> float:
    """AUC: how often a member's score is above another's, ties counting half."""
    order = np.sort(others)
    below = np.searchsorted(order, members, "left") + np.searchsorted(order, members, "right")
    return float(below.mean() / (2 * len(others)))


def true_positives(scores: np.ndarray, is_member: np.ndarray, rate: float) -> tuple[float, float]:
    """(TPR at a false-positive rate of at most `rate`, its standard error over models)."""
    others = np.sort(scores[~is_member])[::-1]
    threshold = others[math.floor(rate * len(others))]  # at most that share lies above it
    found = (scores > threshold) & is_member
    each = found.sum(1) / is_member.sum(1)
    return float(found.sum() / is_member.sum()), float(each.std(ddof=1) / math.sqrt(len(each)))


# ---- The run


def check(settings: Settings) -> None:
    """Before anything is written: attacks and clipped sums against what they must be.

    Raises:
      RuntimeError: if the scores of two known laws, or a clipped sum in float64, come out wrong.
    """
    grid = special.ndtri((np.arange(20_000) + 0.5) / 20_000)
    auc = area(grid + 1.0, grid)
    scores = np.stack([np.concatenate([grid + 1.0, grid])] * 2)
    member = np.stack([np.arange(40_000) < 20_000] * 2)
    found, _ = true_positives(scores, member, 0.01)
    wanted = special.ndtr(math.sqrt(0.5)), special.ndtr(special.ndtri(0.01) + 1.0)
    if abs(auc - wanted[0]) > 1e-3 or abs(found - wanted[1]) > 1e-3:
        raise RuntimeError(f"Expected AUC and TPR {wanted}, got {(auc, found)}.")
    source = np.random.default_rng(0)
    w, x = source.normal(size=(5, 3)), source.normal(size=(7, 5))
    gradients = x[:, :, None] * (x @ w)[:, None, :]  # of |x w|²/2, in float64
    norms = np.sqrt((gradients**2).sum((1, 2), keepdims=True))
    exact = (gradients * np.minimum(1.0, settings.clip_norm / norms)).sum(0)
    clip = clipping.clipped_grad(
        lambda w, x: 0.5 * jnp.sum((x @ w) ** 2), clip_norm=settings.clip_norm
    )
    ours = jax.jit(lambda w, x: clip(w, x).tree)(np.float32(w), np.float32(x))
    if np.abs(np.asarray(ours) - exact).max() > 2.0**-10 * np.abs(exact).max():
        raise RuntimeError("Expected the clipped sum of float64, got another.")


def rows_of(
    settings: Settings, models: Models, epsilon: float | None, price: tuple[float, float] | None
) -> list[dict[str, Any]]:
    """One row of metrics per attack; price is (noise multiplier, bound) of private models.

    Raises:
      RuntimeError: for an attack above the bound, or none that finds non-private members.
    """
    multiplier, bound = (None, None) if price is None else price
    rows = []
    for name, attack in ATTACKS.items():
        scores = attack(models)
        found, error = true_positives(scores, models.is_member, settings.false_positive_rate)
        if bound is not None and found > bound + 4 * error:
            raise RuntimeError(f"{name} finds {found:.4f} at ε = {epsilon}, bound {bound:.4f}.")
        rows.append(
            {
                "epsilon": epsilon,
                "attack": name,
                "auc": round(area(scores[models.is_member], scores[~models.is_member]), 4),
                "true_positive_rate": round(found, 4),
                "standard_error": round(error, 5),
                "bound": None if bound is None else round(bound, 4),
                "member_accuracy": round(models.member_accuracy, 4),
                "held_out_accuracy": round(models.held_out_accuracy, 4),
                "noise_multiplier": None if multiplier is None else round(multiplier, 4),
            }
        )
    if epsilon is None and max(row["true_positive_rate"] for row in rows) < settings.least:
        raise RuntimeError(f"The attacks find nothing on models without privacy: {rows}.")
    return rows


def price_of(settings: Settings, epsilon: float | None) -> tuple[float, float] | None:
    """(noise multiplier, largest true-positive rate of any attack) of a run with this ε."""
    if epsilon is None:
        return None
    sampler = make_sampler(settings)
    coordinates = sum(leaf[0].size for leaf in jax.tree.leaves(start(settings)))

    def whole(multiplier: float) -> dp.accounting.Event:
        step = sampler.event(multiplier, coordinates, dp.random.WIDE_RADIUS_BITS)
        return dp.accounting.Repeated(step, settings.steps)

    multiplier = dp.accounting.calibrate.smallest(whole, epsilon=epsilon, delta=settings.delta)
    return multiplier, dp.accounting.attacker.true_positive_rate(
        whole(multiplier), settings.false_positive_rate
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--smoke", action="store_true")
    parser.add_argument("--results", type=pathlib.Path, default=_common.RESULTS)
    given = parser.parse_args()
    settings = SMOKE if given.smoke else Settings()
    if given.smoke:  # compiling is most of it
        jax.config.update("jax_disable_most_optimizations", True)
    watch, data, metrics = _common.Stopwatch(), load(settings), []
    check(settings)
    batches = draw(settings, make_sampler(settings))
    for epsilon in settings.epsilons:
        price = price_of(settings, epsilon)
        models = train_all(settings, data, batches, None if price is None else price[0])
        for row in rows_of(settings, models, epsilon, price):
            metrics.append(row)
            print(row, f"{watch.seconds():.0f} s", flush=True)
    path = _common.append_line(given.results, "membership", settings, metrics, watch.seconds())
    print(f"one line more in {path}")


if __name__ == "__main__":
    main()
