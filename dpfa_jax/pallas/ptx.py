"""Text in NVIDIA's assembly language that the kernels of both ways to a GPU share."""

import math
import struct


def hex_float(number: float) -> str:
    """A float32 constant as PTX writes it."""
    return "0f" + struct.pack(">f", number).hex().upper()


def normal_pair(scale: float = 1.0) -> str:
    """`random.normal_pair` times `scale`, with the device's approximate functions.

    The 40 bits of the radius are read as a signed number: its sign says which half of (0, 1) the
    uniform number lies in, its magnitude how far it is from that half's end.

    Args:
      scale: of the normals. No scale can make a square overflow: it comes after the root.

    Returns:
      PTX that makes float32 $0 and $1 of the 32-bit words $2 and $3. Both are rounded products,
      whatever they are added to: the same bits wherever they are drawn.
    """
    # The upper eight bits of the second word behind the exponent of 2²³, which is taken off again.
    low = (
        "prmt.b32 w, $3, 0x4B000000, 0x7443; mov.b32 low, w;"
        f" fma.rn.f32 low, low, {hex_float(2.0**-40)}, {hex_float(2.0**-41 - 2.0**-17)};"
    )
    uniform = "".join(
        f" cvt.rn.f32.{kind} {name}, $2; fma.rn.f32 {name}, {name}, {hex_float(2.0**-32)}, low;"
        for kind, name in (("s32", "signed"), ("u32", "square"))
    )
    # Closer to 1 than 2⁻⁷ the series of log₂(1 + x), up to a relative x²/3.
    linear, constant = hex_float(-0.5 / math.log(2.0)), hex_float(1.0 / math.log(2.0))
    logarithm = (
        " lg2.approx.ftz.f32 square, square; setp.ge.u32 near, $2, 0xFE000000;"
        f" fma.rn.f32 series, signed, {linear}, {constant}; mul.rn.f32 series, signed, series;"
        " selp.f32 square, series, square, near;"
    )
    # It is not above 0: the unit for roots takes a magnitude for nothing.
    radius = (
        " abs.f32 square, square; sqrt.approx.ftz.f32 radius, square;"
        f" mul.rn.f32 radius, radius, {hex_float(scale * math.sqrt(2.0 * math.log(2.0)))};"
    )
    step = 2.0 * math.pi / 2.0**24
    angle = (
        " bfe.s32 w, $3, 0, 24; cvt.rn.f32.s32 angle, w;"
        f" fma.rn.f32 angle, angle, {hex_float(step)}, {hex_float(step / 2)};"
        " cos.approx.ftz.f32 x, angle; sin.approx.ftz.f32 y, angle;"
    )
    names = "low, signed, square, series, radius, angle, x, y"
    return (
        f"{{ .reg .f32 {names}; .reg .b32 w; .reg .pred near; {low}{uniform}{logarithm}{radius}"
        f"{angle} mul.rn.f32 $0, radius, x; mul.rn.f32 $1, radius, y; }}"
    )
