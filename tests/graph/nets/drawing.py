"""Draw nets at random: linear blocks of branches, with near misses and activations between."""

from __future__ import annotations

from typing import Any

from tests.graph.nets.builder import Builder, Chance
from tests.graph.nets.fusible import bordered, fusible_block
from tests.graph.nets.language import Net


def draw_net(chance: Chance, seed: int) -> Net:
    """Return a net of one to three blocks: wild ones, where most layers do not fit, or well-formed ones that fuse."""
    dims = chance.choice([2, 2, 2, 2, 2, 2, 1, 3])
    channels = chance.choice([4, 4, 4, 2, 3, 6, 8])
    sizes = [3, 4, 5] if dims == 3 else chance.choice([[6, 7, 8, 9, 10], [6, 7, 8, 9, 10], [1, 2, 3, 4, 5]])
    builder = Builder(chance, (2, channels, *(chance.choice(sizes) for _ in range(dims))), seed)
    value = 0
    for _ in range(chance.choice([1, 1, 2, 3])):
        value = _block(builder, value) if builder.is_rare(2) else fusible_block(builder, value)
        value = ending(builder, value)
    taps = [index for index in range(1, len(builder.values)) if index != value and builder.is_rare(12)]
    return Net(builder.shape, tuple(builder.layers), (value, *taps[:2]), seed, chance.choice([False, False, True]))


def ending(b: Builder, value: int) -> int:
    end = b.chance.choice(["relu", "relu", "relu", "sigmoid", "tanh", "norm", "factor", "gate", "product", "none"])
    if end in ("relu", "sigmoid", "tanh"):
        return b.tried("activation", value, op=end)
    if end == "norm":
        return b.tried("norm", value, affine=True)
    if end == "factor":
        return _factor(b, value)
    if end == "gate":
        return b.tried("gate", value)
    if end == "product":
        found = b.add("product", value, value)
        return value if found is None else found
    return value


def _block(b: Builder, x: int, depth: int = 0) -> int:
    """Return a sum, a concatenation or a chain of branches of ``x``."""
    form = b.chance.choice(["sum", "sum", "sum", "sum", "cat", "chain", "halves"])
    channels = b.size(x)[1]
    out = b.chance.choice([channels, channels, channels, 4, 6])
    stride = b.chance.choice([1, 1, 1, 1, 2]) if min(b.size(x)[2:]) > 3 else 1
    if form == "chain":
        return chain(b, x, out, stride, depth)
    if form == "halves":
        branches = [chain(b, half, b.size(half)[1], stride, depth) for half in _halves(b, x)]
    else:
        branches = [chain(b, x, out, stride, depth) for _ in range(b.chance.choice([1, 2, 2, 3, 4]))]
        if b.is_rare(6):
            branches.append(b.chance.choice(range(len(b.values))))
    branches = _cropped(b, branches)
    if form in ("cat", "halves"):
        found = b.add("cat", *branches, dim=b.chance.choice([1] * 9 + [2]))
        return branches[0] if found is None else found
    total = branches[0] if b.is_likely(4) else b.tried("factor", branches[0], form="number", op="c+x", number=0)
    for branch in branches[1:]:
        found = b.add("plus", total, branch, sign=b.chance.choice("+++--r"), alpha=b.chance.choice([1] * 9 + [2]))
        total = total if found is None else found
    return total


def _halves(b: Builder, x: int) -> list[int]:
    """Return parts of the channels: halves in order or swapped, overlapping, or unequal."""
    channels = b.size(x)[1]
    half = channels // 2
    form = b.chance.choice(["slices", "split", "sizes", "swapped", "overlap", "every second"])
    if form == "split":
        parts = [b.add("part", x, sizes=half, index=index) for index in (0, 1)]
    elif form == "sizes":
        parts = [b.add("part", x, sizes=(1, channels - 1), index=index) for index in (0, 1)]
    elif form == "every second":
        parts = [b.add("window", x, dim=1, start=start, end=2**63 - 1, step=2) for start in (0, 1)]
    else:
        bounds = {"slices": [(0, half), (half, channels)], "swapped": [(half, channels), (0, half)]}
        wanted = bounds.get(form, [(0, half + 1), (half - 1, channels)])
        parts = [b.add("window", x, dim=1, start=start, end=end, step=1) for start, end in wanted]
    return [part for part in parts if part is not None] or [x]


def _cropped(b: Builder, branches: list[int]) -> list[int]:
    """Return the branches cropped to a common size, at either end; a single position is left to broadcast."""
    for dim in range(2, len(b.shape)):
        sizes = [b.size(branch)[dim] for branch in branches if len(b.size(branch)) == len(b.shape)]
        smallest = min((size for size in sizes if size > 1), default=1)
        for place, branch in enumerate(branches):
            if len(b.size(branch)) == len(b.shape) and b.size(branch)[dim] > smallest:
                start, end = b.chance.choice([(0, smallest), (-smallest, 2**63 - 1)])
                branches[place] = b.tried("window", branch, dim=dim, start=start, end=end, step=1)
    return branches


def chain(b: Builder, x: int, out: int, stride: int, depth: int) -> int:
    """Return one branch: up to three layers in a row, one of which has the stride and the output's channels."""
    kinds = ["conv"] * 8 + ["norm"] * 3 + ["factor"] * 3 + ["pool"] * 2 + ["window", "pad", "bordered", "same", "other"]
    value = x
    for _ in range(b.chance.choice([0, 0, 1, 1, 2, 3])):
        kind = b.chance.choice(kinds)
        if kind == "conv":
            width = b.chance.choice([b.size(value)[1]] * 3 + [out, 1, 8])
            value = _conv(b, value, width)
        else:
            value = _step(b, value, kind, depth)
    if stride > 1 or b.size(value)[1] != out or (value == x and b.is_rare(3)):
        value = _conv(b, value, out, stride)
    if stride > 1 and b.size(value)[-1] == b.size(x)[-1]:
        value = b.tried("window", value, dim=2, start=0, end=2**63 - 1, step=stride)
    return b.tried("norm", value, affine=b.is_likely(5)) if b.is_rare(2) else value


def _step(b: Builder, value: int, kind: str, depth: int) -> int:
    """Return ``value`` after one layer that is no convolution."""
    if kind == "norm":
        return b.tried("norm", value, affine=b.is_likely(5), eps=b.chance.choice([1e-5, 1e-3]))
    if kind == "factor":
        return _factor(b, value)
    if kind == "pool":
        return _pool(b, value)
    if kind == "window":
        return _window(b, value)
    if kind == "pad":
        return _pad(b, value)
    if kind == "same":
        return b.tried("same", value, op=b.chance.choice(["dropout", "clone", "contiguous"]))
    if kind == "bordered":
        return bordered(b, value)
    return _other(b, value, depth)


def _conv(b: Builder, value: int, out: int, stride: int = 1) -> int:
    inputs, dims = b.size(value)[1], len(b.shape) - 2
    earlier = [i for i, layer in enumerate(b.layers) if layer.kind == "conv" and layer.like is None]
    if earlier and b.is_rare(8):
        index = b.chance.choice(earlier)
        found = b.add("conv", value, like=index, **b.layers[index].options)
        if found is not None:
            return found
    groups = b.chance.choice([g for g in (1, 1, 1, 2, 3, 4, inputs) if inputs % g == 0 and out % g == 0])
    square = b.chance.choice([1, 1, 3, 3, 3, 5, 2, 4])
    kernel = (square,) * dims
    if b.is_rare(4):
        kernel = tuple(b.chance.choice([1, 3, square]) for _ in range(dims))
    dilation = (b.chance.choice([1] * 6 + [2, 3]),) * dims
    strides = (stride,) * dims if b.is_likely(12) else tuple(b.chance.choice([1, stride, 2, 3]) for _ in range(dims))
    whole = tuple((k - 1) * d // 2 for k, d in zip(kernel, dilation, strict=True))
    padding: Any = b.chance.choice([whole] * 8 + [(0,) * dims, tuple(p + 1 for p in whole)])
    if set(strides) == {1} and b.is_rare(8):
        padding = "same"
    mode = "zeros" if padding == "same" or b.is_likely(6) else b.chance.choice(["reflect", "replicate", "circular"])
    options: dict[str, Any] = {
        "out": out,
        "kernel": kernel,
        "stride": strides,
        "padding": padding,
        "dilation": dilation,
        "groups": groups,
        "bias": b.chance.choice([True, False]),
        "mode": mode,
    }
    if b.is_rare(8):
        options["made_of"] = b.chance.choice(["masked", "product", "centred"])
    return b.tried("conv", value, **options)


def _factor(b: Builder, value: int) -> int:
    form = b.chance.choice(["channel"] * 5 + ["whole channel", "one", "scalar", "last", "position", "number", "number"])
    operation = b.chance.choice(["x*c", "c*x", "x*c", "x/c", "x+c", "c+x", "x-c", "c-x", "x+2c", "c-2x"])
    number = b.chance.choice([0.5, -2.0, 1, 0, 0.0, 3, 1.7]) if operation != "x/c" else b.chance.choice([0.5, -2.0, 3])
    if b.is_rare(6):
        if b.is_rare(2):
            return b.tried("negate", value)
        return b.tried("addcmul", value, value=b.chance.choice([1, 1, 0.5]))
    return b.tried("factor", value, form=form, op=operation, **({"number": number} if form == "number" else {}))


def _pool(b: Builder, value: int) -> int:
    dims = len(b.shape) - 2
    kernel = (b.chance.choice([2, 3, 3]),) * dims if b.is_likely(5) else (3, *(1,) * (dims - 1))
    stride = b.chance.choice([(1,) * dims] * 4 + [(2,) * dims, kernel])
    padding = b.chance.choice([tuple(k // 2 for k in kernel)] * 2 + [(0,) * dims])
    return b.tried(
        "pool",
        value,
        kernel=kernel,
        stride=stride,
        padding=padding,
        ceil=b.is_rare(6),
        count=b.is_likely(4),
        divisor=b.chance.choice([None] * 6 + [2]),
    )


def _window(b: Builder, value: int) -> int:
    dim = b.chance.choice(range(2, len(b.shape)))
    size = b.size(value)[dim] if len(b.size(value)) > dim else 1
    start, end, step = b.chance.choice(
        [(1, 2**63 - 1, 1), (0, -1, 1), (1, -1, 1), (0, 2**63 - 1, 2), (1, 2**63 - 1, 2), (0, size - 1, 1), (-3, -1, 1)]
    )
    return b.tried("window", value, dim=dim, start=start, end=end, step=step)


def _pad(b: Builder, value: int) -> int:
    dims = len(b.shape) - 2
    widths = tuple(b.chance.choice([1, 1, 0, 2, -1]) for _ in range(2 * dims))
    if b.is_rare(2):
        widths = (1,) * (2 * dims)
    mode = b.chance.choice(["constant"] * 4 + ["reflect", "replicate", "circular"])
    if mode == "circular":
        # Torch leaves memory unwritten where a crop takes all that a wrapped side would repeat.
        widths = tuple(max(width, 0) for width in widths)
    number = b.chance.choice([None, 0.0, 0.5, -1.0]) if mode == "constant" else None
    return b.tried("pad", value, widths=widths, mode=mode, value=number)


_OTHERS = ["block", "block", "transposed", "mix", "tokens", "linear", "mean", "shuffle", "swapped", "rearranged"]
_OTHERS += ["stacked", "reduced", "spread", "matrix"]


def _other(b: Builder, value: int, depth: int) -> int:
    dims, channels = len(b.shape) - 2, b.size(value)[1]
    form = b.chance.choice(_OTHERS)
    if form == "block":
        return _block(b, value, depth + 1) if depth < 2 else value
    if form == "transposed":
        stride = b.chance.choice([1, 2])
        return b.tried(
            "transposed",
            value,
            out=channels,
            kernel=(b.chance.choice([2, 3]),) * dims,
            stride=(stride,) * dims,
            padding=(b.chance.choice([0, 1]),) * dims,
            output_padding=(b.chance.choice([0, 1]) if stride > 1 else 0,) * dims,
            dilation=(1,) * dims,
            groups=b.chance.choice([g for g in (1, 2, channels) if channels % g == 0]),
            bias=b.chance.choice([True, False]),
        )
    if form in ("mix", "tokens"):
        return b.tried(form, value, out=channels, bias=b.chance.choice([True, False]))
    if form == "linear":
        return b.tried(form, value, out=b.size(value)[-1], bias=b.chance.choice([True, False]))
    if form == "matrix":
        return b.tried(form, value, out=channels)
    if form == "reduced":
        return b.tried(form, value, dim=b.chance.choice(range(1, len(b.shape))), is_rest=b.is_rare(2))
    if form == "spread":
        names = ["nearest", "bilinear", "shuffle", "unshuffle", "pooled", "running sum"]
        return b.tried(form, value, op=b.chance.choice(names))
    if form == "stacked":
        branches = [chain(b, value, channels, 1, depth + 1) for _ in range(2)] if depth < 2 else [value, value]
        found = b.add(form, *branches, dim=b.chance.choice([0, 1, len(b.shape)]), op=b.chance.choice(["sum", "mean"]))
        return value if found is None else found
    if form == "swapped":
        return b.tried(form, value, scale=b.chance.choice([1.0, -0.5]))
    if form == "rearranged":
        return b.tried(form, value, op=b.chance.choice(["flip", "roll", "transpose"]))
    return b.tried(form, value)
