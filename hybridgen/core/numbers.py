"""Numbers that a user gives: Python's own, NumPy's scalars, and arrays without axes, such as an element of an array."""

import math
import numbers
from typing import Any

from hybridgen.core.errors import UserError


def plain(value: Any) -> Any:
    """A number as Python's int or float (a fraction); anything else, such as a boolean or a text, unchanged."""
    if getattr(value, "shape", None) == () and hasattr(value, "item"):  # of NumPy, JAX or another library of arrays
        value = value.item()
    if isinstance(value, bool):
        return value
    if isinstance(value, numbers.Integral):
        return int(value)
    return float(value) if isinstance(value, numbers.Real) else value


def is_number(value: Any, whole: bool = False) -> bool:
    """Whether a value is a finite number; with `whole` without a fraction and of an integer type."""
    value = plain(value)
    return type(value) is int or (type(value) is float and not whole and math.isfinite(value))


def checked(where: str, value: Any, low: float, high: float, whole: bool = False) -> Any:
    """`value` as an int if `whole`, else as an int or float. UserError, which begins with `where`, if it is invalid.

    Booleans and texts are no numbers; where whole numbers are meant, 3.0 is one and 3.7 is not.
    """
    found = plain(value)
    if whole and type(found) is float and found.is_integer():
        found = int(found)
    if is_number(found, whole) and low <= found <= high:
        return found
    shown = repr(value if found is value else found)
    kind = "a whole number " * (whole and type(found) is float)
    raise UserError(f"{where} {shown[:80]} is not {kind}within {low} and {high}")
