"""What formats of weights are called and coloured, and which programs were not measured."""

from __future__ import annotations

from reports.core import style
from reports.rules.e09 import PLAIN

OURS, TORCH = "cats", "torch"
COLOURS = (style.BLUE, style.SKY, style.VERMILLION, style.ORANGE, style.GREEN, style.PURPLE)
OTHERS = ("llama.cpp", "gpt-fast", "Marlin", "GemLite", "bitsandbytes")
ALL = "-all"
"""End of the format of a model in which attention and the output matrix are quantised, too."""
NOT_MEASURED = "not measured"
"""Other programs with kernels for quantised weights, none of which was run on these machines in these rounds; their
published times are of other machines."""


def format_name(name: str) -> str:
    """`int4-128` -> `int4, groups of 128`; `int8-row` -> `int8, one scale per row`; `none` -> `unquantised`;
    `int4-128-all` -> `int4, groups of 128, all layers`."""
    if name == PLAIN:
        return "unquantised"
    if name.endswith(ALL):
        return f"{format_name(name.removesuffix(ALL))}, all layers"
    bits, _, size = name.partition("-")
    return f"{bits}, one scale per row" if size == "row" else f"{bits}, groups of {size}"
