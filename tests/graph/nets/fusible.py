"""Draw well-formed blocks: branches of one stride, padding mode and border, nearly all of which fuse."""

from __future__ import annotations

from typing import Any

from tests.graph.nets.builder import Builder


def fusible_block(b: Builder, x: int) -> int:
    """Return a sum of branches that have one stride, one padding mode and the output's channels in common."""
    channels = b.size(x)[1]
    geometry: dict[str, Any] = {
        "stride": b.chance.choice([1, 1, 1, 2, 3]),
        "mode": b.chance.choice(["zeros"] * 5 + ["reflect", "replicate", "circular"]),
        "is_valid": b.is_rare(4),
        "groups": b.chance.choice([1, 1, channels, 2 if channels % 2 == 0 else 1]),
        "out": b.chance.choice([channels, channels, channels, 2 * channels]),
    }
    if geometry["is_valid"] and min(b.size(x)[2:]) < 6:
        geometry["is_valid"] = False
    branches = [_fusible_branch(b, x, geometry) for _ in range(b.chance.choice([1, 2, 2, 3, 4]))]
    if b.is_rare(5):
        found = b.add("cat", *branches, dim=1)
        total = branches[0] if found is None else found
    else:
        total = branches[0]
        for branch in branches[1:]:
            found = b.add("plus", total, branch, sign=b.chance.choice("+++-r"))
            total = total if found is None else found
    for _ in range(b.chance.choice([0, 0, 1, 2])):
        total = pointwise(b, total, b.size(total)[1])
    return total


def _fusible_branch(b: Builder, x: int, g: dict[str, Any]) -> int:
    """Return a branch that fits the block: k x k, 1x1→k x k, pool, padded norm, part of the channels, identity."""
    dims, channels = len(b.shape) - 2, b.size(x)[1]
    is_same = g["stride"] == 1 and g["out"] == channels
    form = b.chance.choice(["conv", "conv", "conv", "deep", "pool", "identity", "bordered", "part", "nested"])
    value = x
    if form == "deep":
        plain: dict[str, Any] = {"stride": (1,) * dims, "padding": (0,) * dims, "dilation": (1,) * dims}
        groups = g["groups"] if channels % g["groups"] == 0 else 1
        value = b.tried("conv", x, out=channels, kernel=(1,) * dims, groups=groups, bias=b.is_rare(4), **plain)
    elif form == "bordered" and g["stride"] == 1 and not g["is_valid"] and g["mode"] == "zeros":
        value = bordered(b, pointwise(b, x, channels))
        return value if b.size(value)[1] == g["out"] else _pointwise_conv(b, value, g["out"])
    elif form == "part" and channels % 2 == 0:
        start = b.chance.choice([0, channels // 2])
        value = b.tried("window", x, dim=1, start=start, end=start + channels // 2, step=1)
    elif form == "nested" and is_same and not g["is_valid"] and g["mode"] == "zeros":
        inner = [_fusible_branch(b, x, {**g, "groups": 1}) for _ in range(2)]
        found = b.add("plus", *inner, sign=b.chance.choice("+-"))
        return inner[0] if found is None else pointwise(b, found, channels)
    elif form == "identity" and is_same:
        value = _inset(b, x, 1) if g["is_valid"] else x
        return pointwise(b, value, channels) if b.is_likely(3) else value
    elif form == "pool":
        return _fusible_pool(b, x, g)
    kernel = b.chance.choice([1, 3, 3, 3, 5])
    value = _fusible_conv(b, value, kernel, g)
    for _ in range(b.chance.choice([0, 1, 1, 2])):
        value = pointwise(b, value, g["out"])
    return value


def _inset(b: Builder, value: int, width: int) -> int:
    """Return ``value`` without ``width`` rows on every side."""
    for dim in range(2, len(b.shape)):
        end = b.chance.choice([-width, b.size(value)[dim] - width])
        value = b.tried("window", value, dim=dim, start=width, end=end, step=1)
    return value


def _fusible_conv(b: Builder, value: int, kernel: int, g: dict[str, Any]) -> int:
    """Return a convolution centred on the same places as the block's others."""
    dims, channels = len(b.shape) - 2, b.size(value)[1]
    sides = tuple(b.chance.choice([kernel] * 5 + [1]) for _ in range(dims))
    dilation = 2 if kernel == 3 and b.is_rare(6) else 1
    reach = tuple((side - 1) * dilation // 2 for side in sides)
    padding = reach
    if g["is_valid"]:
        sides, reach, padding, dilation = (3,) * dims if kernel > 1 else (1,) * dims, (1,) * dims, (0,) * dims, 1
        value = _inset(b, value, 1) if kernel == 1 else value
    groups = g["groups"] if channels % g["groups"] == 0 and g["out"] % g["groups"] == 0 else 1
    return b.tried(
        "conv",
        value,
        out=g["out"],
        kernel=sides,
        stride=(g["stride"],) * dims,
        padding=padding,
        dilation=(dilation,) * dims,
        groups=groups,
        bias=b.chance.choice([True, False]),
        mode=g["mode"],
    )


def _fusible_pool(b: Builder, x: int, g: dict[str, Any]) -> int:
    dims = len(b.shape) - 2
    padding = 0 if g["is_valid"] else 1
    value = b.tried(
        "pool",
        x,
        kernel=(3,) * dims,
        stride=(g["stride"],) * dims,
        padding=(padding,) * dims,
        ceil=b.is_rare(8),
        count=b.is_likely(8),
        divisor=None,
    )
    return value if b.size(value)[1] == g["out"] else _pointwise_conv(b, value, g["out"])


def _pointwise_conv(b: Builder, value: int, out: int) -> int:
    dims = len(b.shape) - 2
    plain: dict[str, Any] = {"stride": (1,) * dims, "padding": (0,) * dims, "dilation": (1,) * dims, "groups": 1}
    return b.tried("conv", value, out=out, kernel=(1,) * dims, bias=b.is_likely(3), **plain)


def pointwise(b: Builder, value: int, out: int) -> int:
    """Return ``value`` after a norm, a scale, a copy, a 1x1 or a linear layer on the channels."""
    form = b.chance.choice(["norm", "norm", "norm", "channel", "channel", "number", "same", "conv", "mix", "negate"])
    if form == "norm":
        return b.tried("norm", value, affine=b.is_likely(5))
    if form in ("channel", "number"):
        operation = b.chance.choice(["x*c", "c*x", "x/c", "x+c", "x-c", "c-x", "x+2c", "c-2x"])
        number = {"number": b.chance.choice([0.5, -2.0, 3])} if form == "number" else {}
        return b.tried("factor", value, form=form, op=operation, **number)
    if form == "same":
        return b.tried("same", value, op=b.chance.choice(["dropout", "clone", "contiguous"]))
    if form == "conv":
        return _pointwise_conv(b, value, out)
    if form == "mix":
        return b.tried("mix", value, out=out, bias=b.chance.choice([True, False]))
    return b.tried("negate", value)


def bordered(b: Builder, value: int) -> int:
    """Return ``value`` after a norm padded with its constant, and a convolution without padding of its own."""
    dims, channels = len(b.shape) - 2, b.size(value)[1]
    constant = b.chance.choice(["own"] * 5 + ["other"])
    sides = b.chance.choice([2 * dims] * 5 + [1])
    excess = b.chance.choice([0] * 8 + [1])
    padded = b.tried("bordered", value, width=1, constant=constant, sides=sides, excess=excess)
    plain: dict[str, Any] = {"stride": (1,) * dims, "dilation": (1,) * dims, "groups": 1, "bias": False}
    return b.tried("conv", padded, out=channels, kernel=(3,) * dims, padding=(0,) * dims, **plain)
