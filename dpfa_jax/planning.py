"""What a plan needs besides noise: memory for a model size, and its figure."""

import math
import os
from collections.abc import Mapping, Sequence

from dpfa_jax import _check
from dpfa_jax.accounting import attacker


def training_memory(parameters: int, batch: int | None = None) -> dict[str, float]:
    """Bytes that private training of a model needs in float32, before activations.

    Args:
      parameters: size of the model, ≥ 1.
      batch: examples per step, ≥ 1; None leaves out what grows with it.

    Returns:
      Bytes by purpose. Exact for arrays of these shapes; what a compiler adds is not in it.

    Raises:
      ValueError: for a number below 1.

    Example:
      >>> training_memory(1000, 8)["per-example gradients, if materialised"]
      32000.0
    """
    each = 4.0 * _check.integer("parameters", parameters, low=1)
    needs = {
        "weights": each,
        "adam moments": 2.0 * each,
        "clipped sum": each,
        # Five of sixteen words are radius and angle of two normals: 1.6 words a normal, 64 bits.
        "noise and the random words it is made of": each + 1.6 * each,
    }
    if batch is not None:
        size = _check.integer("batch", batch, low=1)
        needs["per-example gradients, if materialised"] = each * size
        needs["one gradient at a time, summed in a scan"] = each
    return needs


def bytes_as_text(count: float) -> str:
    """A number of bytes with a unit.

    Args:
      count: bytes, ≥ 0.

    Returns:
      Four digits and a binary unit.

    Example:
      >>> bytes_as_text(3 * 2**30)
      '3 GiB'
    """
    units = ("B", "KiB", "MiB", "GiB", "TiB")
    power = 0
    while count >= 1024 and power < len(units) - 1:
        count, power = count / 1024, power + 1
    return f"{count:.4g} {units[power]}"


def draw(
    tables: Mapping[str, Sequence[tuple[float, float]]],
    curve: attacker.TradeOff,
    path: str | os.PathLike[str],
    *,
    delta: float,
) -> None:
    """One picture of a plan: ε against each quantity, and what an attacker reaches.

    Args:
      tables: by the name of the quantity, its values and their ε.
      curve: the trade-off curve of the plan.
      path: the picture's file; its ending says the format.
      delta: δ of the tables.

    Raises:
      ImportError: where matplotlib is missing (it comes with the extra dpfa_jax[demo]).
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    count = len(tables) + 1
    figure, axes = pyplot.subplots(1, count, figsize=(4 * count, 3.2), squeeze=False)
    for axis, (name, rows) in zip(axes[0], tables.items(), strict=False):
        finite = [(x, y) for x, y in rows if math.isfinite(y)]
        axis.loglog([x for x, _ in finite], [y for _, y in finite], marker="o")
        axis.set_xlabel(name)
        axis.set_ylabel(f"epsilon at delta = {delta:g}")
        axis.grid(alpha=0.3)
    last, rates = axes[0][-1], curve.false_positive_rates
    last.plot(rates, curve.true_positive_rates, label="best attack")
    last.plot(rates, rates, linestyle="--", color="grey", label="guessing")
    last.set_xscale("log")
    last.set_xlim(1e-5, 1.0)
    last.set_xlabel("false-positive rate")
    last.set_ylabel("true-positive rate, at most")
    last.legend()
    last.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(path)
    pyplot.close(figure)
