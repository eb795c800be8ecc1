"""What is said about finished runs of `train_lm`: ε by loss distributions, and the picture."""

import dataclasses
import json
import math
import pathlib
from typing import Any

import dpfa_jax as dp
from dpfa_jax import sampling


def loss_distribution_epsilon(
    settings: Any, sampler: sampling.TruncatedPoisson, multiplier: float, coordinates: int
) -> float | None:
    """ε of the whole run by loss distributions; None where dp_accounting is not installed."""
    try:
        import dp_accounting  # noqa: F401
    except ImportError:
        return None
    event = sampler.event(multiplier, coordinates, dp.random.WIDE_RADIUS_BITS)
    whole = dp.accounting.Repeated(event, settings.steps)
    return dp.accounting.pld.epsilon(whole, settings.delta, discretization=settings.loss_grid)


def last_runs(folder: pathlib.Path, settings: Any) -> dict[float | None, dict[str, Any]]:
    """The last line of each ε with these settings otherwise."""
    path = folder / "train_lm.jsonl"
    wanted = json.loads(json.dumps(dataclasses.asdict(settings)))
    found = {}
    for text in path.read_text().splitlines() if path.exists() else ():
        line = json.loads(text)
        if line["config"] | {"epsilon": None} == wanted | {"epsilon": None}:
            found[line["config"]["epsilon"]] = line
    return found


def account(folder: pathlib.Path, settings: Any) -> None:
    """Appends the last private runs again with ε by loss distributions, as measured otherwise."""
    for epsilon, line in last_runs(folder, settings).items():
        final, *rest = line["metrics"]
        if epsilon is None or final["epsilon_pld"] is not None:
            continue
        own = dataclasses.replace(settings, epsilon=epsilon)
        sampler = sampling.TruncatedPoisson(
            final["records"], final["sampling_rate"], final["capacity"]
        )
        multiplier, coordinates = final["noise_multiplier"], final["parameters"]
        found = loss_distribution_epsilon(own, sampler, multiplier, coordinates)
        print(f"ε = {epsilon:g} by Rényi curves is {found} by loss distributions", flush=True)
        line["metrics"] = [final | {"epsilon_pld": found}, *rest]
        with (folder / "train_lm.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(line, ensure_ascii=False, allow_nan=False) + "\n")


def plot(folder: pathlib.Path, figures: pathlib.Path, settings: Any) -> None:
    """Draws bits per byte against steps for the last run of each ε."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4.5))
    runs = last_runs(folder, settings)
    for epsilon in sorted(runs, key=lambda e: math.inf if e is None else e):
        metrics = runs[epsilon]["metrics"]
        rows = [row for row in metrics if row["phase"] == "curve"]
        label = "without privacy" if epsilon is None else f"ε = {epsilon:g}"
        axes.plot([r["step"] for r in rows], [r["bits_per_byte"] for r in rows], label=label)
        if epsilon is None:
            for row in metrics:
                if row["phase"] == "baseline":
                    axes.axhline(row["bits_per_byte"], color="gray", linestyle=":")
                    axes.annotate(row["model"], (0, row["bits_per_byte"]), color="gray")
    axes.set(xlabel="step", ylabel="bits per held-out byte")
    axes.set_title(f"unit: one {settings.unit}, δ = {settings.delta:g}")
    axes.legend()
    figures.mkdir(parents=True, exist_ok=True)
    figure.savefig(figures / "train_lm.png", dpi=120, bbox_inches="tight")
