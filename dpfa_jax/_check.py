"""Host checks of static values: a bad one is named, shown, and NaN always fails.

Every check is written so that a comparison with NaN is a failure (`if not value >= low`), because
a NaN that slips through a privacy parameter turns into less noise or an ε of zero.
"""

import math
import operator
from collections.abc import Iterable
from typing import Any

_MOST_BITS = 8192


def _number(name: str, value: Any) -> float:
    if isinstance(value, bool):
        raise TypeError(f"Expected {name} to be a number, got the bool {value}.")
    if type(value).__name__.endswith("Tracer"):
        raise TypeError(
            f"Expected {name} to be a static Python number, got a traced value. Privacy parameters "
            "are fixed before tracing: pass it as a Python float, or mark it static in jit."
        )
    if isinstance(value, str | bytes) or getattr(value, "shape", ()) != ():
        raise TypeError(f"Expected {name} to be a number, got {value!r}.")
    try:
        return float(value)
    except OverflowError as error:
        size = f"got {'-' * (value < 0)}2**{int(abs(value)).bit_length() - 1} or more"
        raise ValueError(f"Expected {name} within the floats, {size}.") from error
    except (TypeError, ValueError) as error:
        raise TypeError(f"Expected {name} to be a number, got {value!r}.") from error


def _bounds(name: str, low: Any, high: Any, open_low: bool, open_high: bool) -> str:
    parts = []
    if low is not None:
        parts.append(f"{name} {'>' if open_low else '>='} {low}")
    if high is not None:
        parts.append(f"{name} {'<' if open_high else '<='} {high}")
    return " and ".join(parts) or f"a number {name}"


def real(
    name: str,
    value: Any,
    *,
    low: float | None = None,
    high: float | None = None,
    open_low: bool = False,
    open_high: bool = False,
    finite: bool = True,
) -> float:
    """The value as a float, or an error that names it and its range.

    Args:
      name: the argument's name as the caller wrote it.
      value: a Python or NumPy number; never a bool, a traced value or an array.
      low: smallest allowed value, excluded when `open_low`.
      high: largest allowed value, excluded when `open_high`.
      open_low: whether `low` itself is refused.
      open_high: whether `high` itself is refused.
      finite: whether infinities are refused.

    Raises:
      TypeError: if it is not a static number.
      ValueError: if it is NaN or outside the range.

    Example:
      >>> real("delta", 1e-5, low=0, high=1)
      1e-05
    """
    number = _number(name, value)
    inside = not math.isnan(number)
    if finite:
        inside = inside and math.isfinite(number)
    if low is not None:
        inside = inside and (number > low if open_low else number >= low)
    if high is not None:
        inside = inside and (number < high if open_high else number <= high)
    if not inside:
        expected = _bounds(name, low, high, open_low, open_high)
        raise ValueError(f"Expected {'finite ' if finite else ''}{expected}, got {number}.")
    return number


def noise_std(name: str, value: Any) -> float:
    """The standard deviation of noise that float32 holds beside the values, or an error.

    Smaller noise would be flushed to zero, and values of that size with it or not.

    Raises:
      TypeError: if it is not a static number.
      ValueError: if it is below 2⁻¹⁰⁰ or above 2¹⁰⁰, or NaN.

    Example:
      >>> noise_std("noise_std", 2.0)
      2.0
    """
    number = _number(name, value)
    if not 2.0**-100 <= number <= 2.0**100:
        raise ValueError(
            f"Expected {name} between 2**-100 and 2**100, so that float32 holds the noise, got "
            f"{number}. Scale the values and their bound by the same factor, or pass another noise "
            "multiplier."
        )
    return number


def integer(name: str, value: Any, *, low: int | None = None, high: int | None = None) -> int:
    """The value as an int, or an error that names it and its range.

    Raises:
      TypeError: if it is not a static whole number (bools and floats are refused).
      ValueError: if it is outside the range, or has more than 8192 bits.

    Example:
      >>> integer("steps", 3, low=0)
      3
    """
    # A Python int may lie beyond the floats: only its range is left to check then.
    if type(value) is not int:
        _number(name, value)
    try:
        number = operator.index(value)
    except TypeError as error:
        raise TypeError(f"Expected {name} to be a whole number, got {value!r}.") from error
    if number.bit_length() > _MOST_BITS:  # Python would refuse to print it
        raise ValueError(
            f"Expected {name} of at most {_MOST_BITS} bits, got {number.bit_length()}."
        )
    if (low is not None and number < low) or (high is not None and number > high):
        raise ValueError(f"Expected {_bounds(name, low, high, False, False)}, got {number}.")
    return number


def choice[T](name: str, value: T, allowed: Iterable[T]) -> T:
    """The value if it is one of `allowed`.

    Raises:
      ValueError: otherwise, with the allowed values.
    """
    options = tuple(allowed)
    if value not in options:
        listed = ", ".join(repr(option) for option in options)
        raise ValueError(f"Expected {name} to be one of {listed}, got {value!r}.")
    return value


def flag(name: str, value: Any) -> bool:
    """The value if it is a bool.

    Raises:
      TypeError: otherwise; a truthy number or array is not taken for an answer.
    """
    if not isinstance(value, bool):
        raise TypeError(f"Expected {name} to be True or False, got {value!r}.")
    return value
