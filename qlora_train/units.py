"""The GiB, and integer division that rounds up."""

GIB = 2**30


def ceil_div(number: int, divisor: int) -> int:
    """The quotient, rounded up to a whole number."""
    return -(-number // divisor)


def round_up(number: int, unit: int) -> int:
    """The next multiple of `unit`; `number` itself if it is one."""
    return ceil_div(number, unit) * unit
