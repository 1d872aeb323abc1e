"""Draw nets with layers over all values of a sample, beside and behind other linear layers."""

from __future__ import annotations

from tests.graph.nets.builder import Builder, Chance
from tests.graph.nets.drawing import chain, ending
from tests.graph.nets.fusible import pointwise
from tests.graph.nets.language import Net


def draw_full_net(chance: Chance, seed: int) -> Net:
    """Return a net of a sum of branches one of which is full, or of a chain that ends in a full layer."""
    dims = chance.choice([2, 2, 2, 1, 3])
    channels = chance.choice([2, 3, 4, 6])
    sizes = [1, 2, 3] if dims == 3 else [1, 2, 3, 4, 5]
    builder = Builder(chance, (2, channels, *(chance.choice(sizes) for _ in range(dims))), seed)
    value = 0
    if builder.is_rare(3):
        value = ending(builder, chain(builder, 0, channels, 1, 2))
    value = _sum(builder, value) if builder.is_likely(3) else _classifier(builder, value)
    value = ending(builder, value)
    taps = [index for index in range(1, len(builder.values)) if index != value and builder.is_rare(16)]
    return Net(builder.shape, tuple(builder.layers), (value, *taps[:1]), seed)


def _full(b: Builder, value: int, out: int, *, is_image: bool) -> int:
    is_conv = b.is_rare(2)
    channels = b.size(value)[1]
    groups = b.chance.choice([1, 1, channels]) if is_conv and is_image and out % channels == 0 else 1
    options = {"out": out, "groups": groups, "bias": b.is_likely(3), "is_conv": is_conv, "is_image": is_image}
    return b.tried("full", value, **options)


def _sum(b: Builder, x: int) -> int:
    out = b.chance.choice([b.size(x)[1], b.size(x)[1], 4])
    full = _full(b, chain(b, x, b.size(x)[1], 1, 2) if b.is_rare(3) else x, out, is_image=True)
    total = pointwise(b, full, out) if b.is_rare(2) else full
    for _ in range(b.chance.choice([0, 1, 1, 2])):
        found = b.add("plus", total, chain(b, x, out, 1, 2), sign=b.chance.choice("+-r"))
        total = total if found is None else found
    return total


def _classifier(b: Builder, x: int) -> int:
    value = chain(b, x, b.size(x)[1], 1, 2)
    return _full(b, value, b.chance.choice([1, 3, 16]), is_image=False)
