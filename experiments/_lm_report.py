"""What is said about finished runs of `train_lm`: ε by loss distributions, a table, a picture."""

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


_COLUMNS = (
    *("model", "epsilon", "epsilon_pld", "noise_multiplier", "batch", "step"),
    *("seconds_per_step", "bits_per_byte"),
)


def summarize(folder: pathlib.Path, settings: Any) -> None:
    """Appends one line with the ends of the last runs of one commit, and prints it as a table."""
    runs = last_runs(folder, settings)
    commits = {line["commit"] for line in runs.values()}
    if len(commits) != 1:
        raise SystemExit(f"Expected runs of one commit, got {sorted(commits)}.")
    ends = [line["metrics"][0] for line in runs.values()]
    some = next(iter(runs.values()))
    ends += [row for row in some["metrics"] if row["phase"] == "baseline"]
    rows = [{name: end.get(name) for name in _COLUMNS} for end in ends]
    rows.sort(key=lambda row: row["bits_per_byte"])
    line = some | {"experiment": "train_lm_summary", "metrics": rows}
    line["config"] = some["config"] | {"epsilon": None}
    line["seconds"] = round(sum(each["seconds"] for each in runs.values()), 1)
    with (folder / "train_lm_summary.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps(line, ensure_ascii=False, allow_nan=False) + "\n")
    print(f"<!-- results: train_lm_summary commit={line['commit']} -->")
    print("| " + " | ".join(_COLUMNS) + " |\n|" + " --- |" * len(_COLUMNS))
    for row in rows:
        shown = [_cell(row[name]) for name in _COLUMNS]
        print("| " + " | ".join([f"`{shown[0]}`", *shown[1:]]) + " |")


def _cell(value: Any) -> str:
    if value is None:
        return "–"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def plot(folder: pathlib.Path, figures: pathlib.Path, settings: Any) -> None:
    """Draws bits per byte against passes over the records for the last run of each ε."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4.5))
    runs = last_runs(folder, settings)
    for epsilon in sorted(runs, key=lambda e: math.inf if e is None else e):
        metrics = runs[epsilon]["metrics"]
        rows = [row for row in metrics if row["phase"] == "curve"]
        label = "without privacy" if epsilon is None else f"ε = {epsilon:g}"
        passes = [row["windows"] / metrics[0]["records"] for row in rows]
        axes.plot(passes, [row["bits_per_byte"] for row in rows], label=label)
        if epsilon is None:
            for row in metrics:
                if row["phase"] == "baseline":
                    axes.axhline(row["bits_per_byte"], color="gray", linestyle=":")
                    axes.annotate(row["model"], (0, row["bits_per_byte"]), color="gray")
    axes.set(xlabel="passes over the records", ylabel="bits per held-out byte", xlim=(0, None))
    axes.set_title(f"unit: one {settings.unit}, δ = {settings.delta:g}")
    axes.legend()
    figures.mkdir(parents=True, exist_ok=True)
    figure.savefig(figures / "train_lm.png", dpi=120, bbox_inches="tight")
