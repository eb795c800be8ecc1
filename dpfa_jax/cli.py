"""The command line: what a plan costs, what a target needs, what a ledger holds.

Commands: epsilon, calibrate, plan, verify, explain. Text for people, --json for programs. A mistake
is one sentence on standard error and exit status 2.
"""

import argparse
import dataclasses
import difflib
import json
import math
import os
import re
import sys
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from dpfa_jax import _check, accounting, planning
from dpfa_jax.accounting import attacker, calibrate, groups, ledger, pld, scope
from dpfa_jax.accounting.event import Event

_SHUFFLING = (
    "Shuffled batches have no accounting here: a shuffled epoch is not a Poisson sample, and "
    "charging it as one under-states epsilon. Draw each record with probability q by itself "
    "(--sampling poisson), draw batches of fixed size (--sampling without-replacement), or charge "
    "every step in full (--sampling none)."
)


class _Mistake(Exception):
    """Something the user can put right; shown as one sentence."""


class _Parser(argparse.ArgumentParser):
    """A parser that guesses what was meant and raises instead of exiting."""

    def error(self, message: str) -> NoReturn:
        raise _Mistake(message + self._guess(message))

    def _guess(self, message: str) -> str:
        known = list(self._option_string_actions)
        for action in self._actions:
            known += [str(choice) for choice in action.choices or ()]
        words = re.findall(r"--?[\w-]+|'([^']*)'", message) + re.findall(r"--[\w-]+", message)
        for word in words:
            if word and word not in known:
                close = difflib.get_close_matches(word, known, n=1, cutoff=0.6)
                if close:
                    return f". Did you mean {close[0]}?"
        return f". See `{self.prog} --help`."

    def parse_all(self, arguments: Sequence[str] | None) -> argparse.Namespace:
        """Like `parse_args`, but unknown flags are guessed by the command they were given to."""
        known, unknown = self.parse_known_args(arguments)
        if unknown:
            parser = known.parser if hasattr(known, "parser") else self
            parser.error(f"unknown argument {unknown[0].split('=')[0]}")
        return known


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected a number, got {text!r}") from None


def _whole(text: str) -> int:
    try:
        return int(text.replace("_", ""))
    except ValueError:
        pass
    number = _number(text)
    if not math.isfinite(number) or number != math.floor(number):
        raise argparse.ArgumentTypeError(f"expected a whole number, got {text!r}")
    return int(number)


def _add_run(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("the run")
    group.add_argument("--noise-multiplier", type=_number, help="noise std over sensitivity")
    group.add_argument("--noise-std", type=_number, help="noise std; without replacement only")
    group.add_argument("--clip-norm", type=_number, help="clip norm; without replacement only")
    group.add_argument("--steps", type=_whole, default=1, help="how many releases (default 1)")
    group.add_argument(
        "--sampling",
        choices=("none", "poisson", "without-replacement", "shuffle"),
        help="how each step's batch is drawn (default poisson with a rate, otherwise none)",
    )
    group.add_argument("--sampling-rate", type=_number, help="probability of each record")
    group.add_argument("--batch-size", type=_whole, help="expected batch; needs --records")
    group.add_argument("--records", type=_whole, help="size of the data set, public")
    group.add_argument("--capacity", type=_whole, help="largest batch kept of a Poisson sample")
    group.add_argument(
        "--coordinates", type=_whole, default=0, help="noisy scalars per release (default 0: ideal)"
    )
    group.add_argument(
        "--radius-bits",
        type=_whole,
        default=40,
        help="of the noise: 40, or 64 for training runs (random.normal)",
    )
    group.add_argument(
        "--group-rows", type=_whole, default=1, help="rows that one person may own (default 1)"
    )


def _rate(options: argparse.Namespace) -> float | None:
    if options.sampling_rate is not None and options.batch_size is not None:
        raise _Mistake("Give --sampling-rate or --batch-size, not both.")
    if options.batch_size is None:
        return options.sampling_rate
    if options.records is None:
        raise _Mistake("--batch-size needs --records, the public size of the data set.")
    records = _check.integer("--records", options.records, low=1)
    size = _check.integer("--batch-size", options.batch_size, low=1, high=records)
    return size / records


def _noise(options: argparse.Namespace) -> float:
    """What the run's noise is given as: a multiplier, or a standard deviation."""
    if options.sampling != "without-replacement":
        if options.noise_std is not None or options.clip_norm is not None:
            raise _Mistake("--noise-std and --clip-norm go with --sampling without-replacement.")
        _need(options, "noise_multiplier")
        return options.noise_multiplier
    if options.noise_multiplier is not None:
        raise _Mistake(
            "--sampling without-replacement takes --noise-std and --clip-norm: replacing a record "
            "moves the sum by twice the clip norm, so a multiplier could be meant in two ways."
        )
    _need(options, "noise_std", "clip_norm")
    return options.noise_std


def _step(options: argparse.Namespace, noise: float, rate: float | None) -> Event:
    """What one release of the run costs a group of rows."""
    return groups.grouped(_release(options, noise, rate), options.group_rows)


def _release(options: argparse.Namespace, noise: float, rate: float | None) -> Event:
    """One release of the run; `noise` is a multiplier, or a std without replacement."""
    scalars, bits = options.coordinates, options.radius_bits
    sampling = options.sampling or ("none" if rate is None else "poisson")
    if sampling == "shuffle":
        raise _Mistake(_SHUFFLING)
    if sampling == "none":
        if rate is not None:
            raise _Mistake("--sampling none takes no --sampling-rate and no --batch-size.")
        return accounting.Gaussian(noise, scalars, bits)
    if rate is None:
        raise _Mistake(
            f"--sampling {sampling} needs --sampling-rate, or --batch-size and --records."
        )
    if sampling == "without-replacement":
        if options.records is None:
            raise _Mistake("--sampling without-replacement needs --records and --batch-size.")
        size = max(1, math.ceil(rate * options.records - 1e-9))
        _need(options, "clip_norm")
        return accounting.SampledWithoutReplacement(
            noise, options.clip_norm, size, options.records, scalars, bits
        )
    base = accounting.Gaussian(noise, scalars, bits)
    if options.capacity is None:
        return accounting.PoissonSampled(base, rate)
    if options.records is None:
        raise _Mistake("--capacity needs --records, the public size of the data set.")
    return accounting.TruncatedPoissonSampled(base, rate, options.records, options.capacity)


def _need(options: argparse.Namespace, *names: str) -> None:
    for name in names:
        if getattr(options, name) is None:
            raise _Mistake(f"--{name.replace('_', '-')} is missing. It has no default.")


def _adjacency(options: argparse.Namespace) -> str:
    sampling = options.sampling or ("none" if _rate(options) is None else "poisson")
    named = {"poisson": "ZERO_OUT", "without-replacement": "REPLACE_ONE"}
    unit = named.get(sampling, "that of the sensitivity in --noise-multiplier")
    rows = options.group_rows
    return unit if rows == 1 else f"{unit}, up to {rows:,} rows of one person (GROUP({rows}))"


def _gains(event: Event, delta: float) -> dict[str, float]:
    loss = attacker.largest_loss(event, delta)
    return {
        "advantage": attacker.advantage(event),
        "true_positive_rate_at_1_percent": attacker.true_positive_rate(event, 0.01),
        "true_positive_rate_at_0.1_percent": attacker.true_positive_rate(event, 0.001),
        "odds_factor": math.exp(loss) if loss < 709.0 else math.inf,
        "belief_from_one_half": attacker.belief(event, 0.5, failure=delta),
        "belief_fails_with": delta,
    }


def _gain_lines(gains: dict[str, float]) -> list[str]:
    first, second, third, odds, belief, failure = gains.values()
    return [
        "An attacker who knows everything but one record:",
        f"  tells whether it is there with advantage at most {first:.4g}",
        f"  finds at most {second:.4g} of the members at a false-positive rate of 0.01",
        f"  finds at most {third:.4g} of the members at a false-positive rate of 0.001",
        f"  has its odds multiplied by at most {odds:.4g}: a belief of 0.5 grows to {belief:.4g},",
        f"  but for outputs of probability {failure:.3g}",
    ]


def _cost(event: Event, delta: float) -> tuple[dict[str, Any], list[str]]:
    found = accounting.report(event, delta)
    gains = _gains(event, delta)
    result = {
        "epsilon": found.epsilon,
        "delta": found.delta,
        "accounts": dict(found.accounts),
        "missing": dict(found.missing),
        "event": ledger.to_json(event),
        "attacker": gains,
    }
    return result, [str(event), str(found), *_gain_lines(gains)]


def _epsilon(options: argparse.Namespace) -> tuple[dict[str, Any], list[str]]:
    _need(options, "delta")
    step = _step(options, _noise(options), _rate(options))
    event = accounting.Repeated(step, options.steps)
    result, lines = _cost(event, options.delta)
    adjacency = _adjacency(options)
    return result | {"adjacency": adjacency}, [*lines, f"Adjacency: {adjacency}."]


def _calibrate(options: argparse.Namespace) -> tuple[dict[str, Any], list[str]]:
    _need(options, "epsilon", "delta")
    cost = pld.epsilon if options.accountant == "pld" else accounting.epsilon
    target = {"epsilon": options.epsilon, "delta": options.delta, "cost": cost}
    width = 1e-4 if options.accountant == "pld" else 1e-6
    find, steps = options.find, options.steps
    if find == "noise-multiplier":
        if options.sampling == "without-replacement":
            find = "noise-std"
        for name in ("noise_multiplier", "noise_std"):
            if getattr(options, name) is not None:
                raise _Mistake(f"--{name.replace('_', '-')} is what is to be found; leave it out.")
        rate = _rate(options)
        found: float = calibrate.smallest(
            lambda z: accounting.Repeated(_step(options, z, rate), steps), **target, tolerance=width
        )
        event = accounting.Repeated(_step(options, found, rate), steps)
    elif find == "steps":
        step = _step(options, _noise(options), _rate(options))
        found = calibrate.steps(step, **target)
        if found == 0:
            one = cost(step, options.delta)
            raise _Mistake(f"Not one step meets the target: one costs epsilon {one:.4g}.")
        event = accounting.Repeated(step, found)
    else:
        if find == "batch-size":
            _need(options, "records")
        noise = _noise(options)

        def run(rate: float) -> Event:
            return accounting.Repeated(_step(options, noise, rate), steps)

        if find == "batch-size":
            found = calibrate.batch_size(run, records=options.records, **target)
            event = run(found / options.records)
        else:
            found = calibrate.largest(run, **target, tolerance=width)
            event = run(found)
    reached = cost(event, options.delta)
    result = {
        "accountant": options.accountant,
        "find": find,
        "value": found,
        "epsilon": reached,
        "delta": options.delta,
        "event": ledger.to_json(event),
    }
    number = f"{found:,}" if isinstance(found, int) else f"{found:.8g}"
    lines = [
        f"{find} = {number}",
        f"  costs epsilon = {reached:.6g} of {options.epsilon:g} at delta = {options.delta:g}, "
        "the private side of the bracket",
        f"  {event}",
    ]
    return result, lines


def _plan(options: argparse.Namespace) -> tuple[dict[str, Any], list[str]]:
    _need(options, "delta")
    rate, noise = _rate(options), _noise(options)
    steps = _check.integer("--steps", options.steps, low=1)
    base = _step(options, noise, rate)
    factors = (0.25, 0.5, 1.0, 2.0, 4.0)

    def cost(step: Event, count: int) -> float:
        return accounting.epsilon(accounting.Repeated(step, count), options.delta)

    tables: dict[str, list[tuple[float, float]]] = {
        "steps": [
            (count, cost(base, count))
            for count in dict.fromkeys(max(1, round(steps * factor)) for factor in factors)
        ],
        "noise multiplier" if options.noise_std is None else "noise std": [
            (z, cost(_step(options, z, rate), steps))
            for z in (noise * factor for factor in factors)
        ],
    }
    if rate is not None and options.records is not None:
        sizes = dict.fromkeys(max(1, round(rate * options.records * factor)) for factor in factors)
        tables["batch size"] = [
            (size, cost(_step(options, noise, size / options.records), steps))
            for size in sizes
            if size <= options.records
        ]
    elif rate is not None:
        tables["sampling rate"] = [
            (q, cost(_step(options, noise, q), steps))
            for q in (rate * factor for factor in factors)
            if q <= 1.0
        ]
    event = accounting.Repeated(base, steps)
    gains, curve = _gains(event, options.delta), attacker.trade_off(event, points=41)
    result: dict[str, Any] = {
        "delta": options.delta,
        "event": ledger.to_json(event),
        "tables": {name: [list(row) for row in rows] for name, rows in tables.items()},
        "attacker": gains,
        "trade_off": {
            "false_positive_rates": curve.false_positive_rates.tolist(),
            "true_positive_rates": curve.true_positive_rates.tolist(),
        },
    }
    lines = [f"{event}, delta = {options.delta:g}"]
    for name, rows in tables.items():
        lines += ["", f"{name:>16}     epsilon"]
        lines += [f"{value:>16.6g}  {epsilon:>10.4g}" for value, epsilon in rows]
    lines += ["", *_gain_lines(gains)]
    if options.parameters is not None:
        count = _check.integer("--parameters", options.parameters, low=1)
        batch = options.batch_size
        if batch is None and rate is not None and options.records is not None:
            batch = math.ceil(rate * options.records)
        needs = planning.training_memory(count, batch)
        result["memory_bytes"] = needs
        lines += ["", "Memory in float32, before activations:"]
        lines += [f"  {name}: {planning.bytes_as_text(size)}" for name, size in needs.items()]
    if options.figure is not None:
        try:
            planning.draw(tables, curve, options.figure, delta=options.delta)
        except ImportError:
            raise _Mistake("--figure needs matplotlib: install dpfa_jax[demo].") from None
        result["figure"] = options.figure
        lines += ["", f"Figure: {options.figure}"]
    return result, lines


def _verify(options: argparse.Namespace) -> tuple[dict[str, Any], list[str]]:
    _need(options, "delta")
    found = ledger.verify(options.file, head=options.head)
    count = len(found.history.entries)
    result, lines = _cost(found.history.event, options.delta)
    by_label = found.history.by_label(options.delta)
    result |= {"entries": count, "head": found.head, "by_label": by_label}
    seen = "up to the given head" if options.head else "as far as it goes (no --head was given)"
    text = [f"{options.file}: {count:,} entries, the chain is whole {seen}."]
    text += [f"head: {found.head}", *lines]
    if len(by_label) > 1:
        text.append("Each label by itself (these do not add up to the total):")
        text += [f"  {label or '(none)'}: epsilon = {each:.6g}" for label, each in by_label.items()]
    return result, text


def _explain(options: argparse.Namespace) -> tuple[dict[str, Any], list[str]]:
    found = scope.SETUPS[options.setup]
    return {"setup": options.setup} | dataclasses.asdict(found), str(found).split("\n")


def _parser() -> _Parser:
    parser = _Parser(
        prog="dpfa-jax",
        description="What private attention and training cost, and what a target needs.",
        allow_abbrev=False,
    )
    commands = parser.add_subparsers(dest="command", metavar="command", parser_class=_Parser)

    def command(name: str, run: Callable, text: str) -> _Parser:
        made = commands.add_parser(name, help=text, description=text, allow_abbrev=False)
        made.set_defaults(run=run, parser=made)
        made.add_argument("--json", action="store_true", help="print one JSON object")
        return made

    epsilon = command("epsilon", _epsilon, "epsilon of a run, by every accountant that can tell")
    _add_run(epsilon)
    epsilon.add_argument("--delta", type=_number, help="delta of the guarantee")

    solve = command("calibrate", _calibrate, "the noise, steps, rate or batch that meets a target")
    _add_run(solve)
    solve.add_argument(
        "--find",
        choices=("noise-multiplier", "steps", "sampling-rate", "batch-size"),
        default="noise-multiplier",
        help="what to solve for (default noise-multiplier)",
    )
    solve.add_argument(
        "--accountant",
        choices=("rdp", "pld"),
        default="rdp",
        help="what the target is met by: the composed bound, or the slower published number",
    )
    solve.add_argument("--epsilon", type=_number, help="target epsilon")
    solve.add_argument("--delta", type=_number, help="target delta")

    plan = command("plan", _plan, "epsilon against steps, noise and rate; memory; the attacker")
    _add_run(plan)
    plan.add_argument("--delta", type=_number, help="delta of the guarantee")
    plan.add_argument("--parameters", type=_whole, help="model size, for the memory preflight")
    plan.add_argument("--figure", help="write the tables as a picture to this file")

    check = command("verify", _verify, "check a ledger file's chain and recompute its epsilon")
    check.add_argument("file", help="a ledger written by accounting.ledger.append")
    check.add_argument("--head", help="hash of the last line, as noted elsewhere")
    check.add_argument("--delta", type=_number, help="delta of the guarantee")

    explain = command("explain", _explain, "what a setup protects and what it does not")
    explain.add_argument("setup", choices=tuple(scope.SETUPS), help="the setup")
    return parser


def _plain(value: Any) -> Any:
    """JSON has no infinity and no NaN: "inf" as a string."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, dict):
        return {key: _plain(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    return value


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command.

    Args:
      arguments: as in `sys.argv[1:]`, which is the default.

    Returns:
      The exit status: 0, 2 for a mistake, 130 when interrupted.

    Example:
      >>> main(["calibrate", "--epsilon", "1", "--delta", "1e-5"])
      noise-multiplier = 3.7306331
        costs epsilon = 1 of 1 at delta = 1e-05, the private side of the bracket
        1 × (Gaussian release, noise multiplier 3.73063, ideal noise)
      0
    """
    parser = _parser()
    try:
        options = parser.parse_all(arguments)
        if options.command is None:
            parser.print_help()
            return 2
        result, lines = options.run(options)
        if options.json:
            print(json.dumps(_plain(result), indent=1, ensure_ascii=False))
        else:
            print("\n".join(lines))
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:
        return 130
    except SystemExit as stop:  # --help
        return int(stop.code or 0)
    except (
        _Mistake,
        ValueError,
        TypeError,
        OSError,
        ArithmeticError,
        NotImplementedError,
    ) as error:
        print(f"dpfa-jax: {error}", file=sys.stderr)
        return 2
    return 0
