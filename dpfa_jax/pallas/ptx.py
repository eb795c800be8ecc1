"""Text in NVIDIA's assembly language that the kernels of both ways to a GPU share."""

import math
import struct


def hex_float(number: float) -> str:
    """A float32 constant as PTX writes it."""
    return "0f" + struct.pack(">f", number).hex().upper()


def radius(scale: float = 1.0) -> str:
    """Radius of a normal pair, the special functions being the device's approximate ones.

    The 40 bits of the radius are read as a signed number: its sign says which half of (0, 1) the
    uniform number lies in, its magnitude how far it is from that half's end.

    Args:
      scale: of the normals. No scale can make a square overflow: it comes after the root.

    Returns:
      PTX that makes float32 $0 of the 32-bit words $1 and $2.

    Raises:
      ValueError: for a scale that float32 does not hold: noise would vanish or be infinite.

    Source: Box and Muller 1958.
    """
    factor = scale * math.sqrt(2.0 * math.log(2.0))
    if not 2.0**-126 <= factor < 2.0**128 - 2.0**103:
        raise ValueError(
            f"Expected noise of a standard deviation that float32 holds, from 1e-38 to 2.8e38, got "
            f"{scale:g}; pass values, and their bound, in a unit that brings it closer to 1."
        )
    # The upper eight bits of the second word behind the exponent of 2²³, which is taken off again.
    low = (
        "prmt.b32 w, $2, 0x4B000000, 0x7443; mov.b32 low, w;"
        f" fma.rn.f32 low, low, {hex_float(2.0**-40)}, {hex_float(2.0**-41 - 2.0**-17)};"
    )
    uniform = "".join(
        f" cvt.rn.f32.{kind} {name}, $1; fma.rn.f32 {name}, {name}, {hex_float(2.0**-32)}, low;"
        for kind, name in (("s32", "signed"), ("u32", "square"))
    )
    # Closer to 1 than 2⁻⁷ the series of log₂(1 + x), up to a relative x²/3.
    linear, constant = hex_float(-0.5 / math.log(2.0)), hex_float(1.0 / math.log(2.0))
    logarithm = (
        " lg2.approx.ftz.f32 square, square; setp.ge.u32 near, $1, 0xFE000000;"
        f" fma.rn.f32 series, signed, {linear}, {constant}; mul.rn.f32 series, signed, series;"
        " selp.f32 square, series, square, near;"
    )
    # It is not above 0: the unit for roots takes a magnitude for nothing.
    root = (
        " abs.f32 square, square; sqrt.approx.ftz.f32 square, square;"
        f" mul.rn.f32 $0, square, {hex_float(factor)};"
    )
    return (
        "{ .reg .f32 low, signed, square, series; .reg .b32 w; .reg .pred near; "
        f"{low}{uniform}{logarithm}{root} }}"
    )


def projected(name: str) -> str:
    """One number of a normal pair: what `radius` makes times the cosine or sine of its angle.

    Args:
      name: "cos" or "sin".

    Returns:
      PTX that makes float32 $0 of the radius $1 and the second word $2: a rounded product, whatever
      it is added to, so the same bits wherever it is drawn.

    Source: Box and Muller 1958.
    """
    step = 2.0 * math.pi / 2.0**24
    return (
        "{ .reg .f32 angle; .reg .b32 w; bfe.s32 w, $2, 0, 24; cvt.rn.f32.s32 angle, w;"
        f" fma.rn.f32 angle, angle, {hex_float(step)}, {hex_float(step / 2)};"
        f" {name}.approx.ftz.f32 angle, angle; mul.rn.f32 $0, $1, angle; }}"
    )
