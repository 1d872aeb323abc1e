"""What the shapes of a block's tensors tell: its channels and groups, and whether they fit together. No torch here."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from repconv_cli.checkpoint.families.parts import Chain, Identity, Layer, Minus, Norm, Part, Pool, Sum, children, leaves

Shapes = Mapping[str, tuple[int, ...]]


def main_layer(part: Part) -> Layer:
    """Return the layer of the largest kernel, the first of equals."""
    return next(leaf for leaf in leaves(part) if isinstance(leaf, Layer))


def out_channels(layer: Layer, shapes: Shapes, groups: int = 1) -> int:
    """Return the number of outputs of ``layer``; a transposed one has them second."""
    shape = shapes[f"{layer.path}.weight"]
    return shape[1] * groups if layer.transposed else shape[0]


def groups_of(part: Part, shapes: Shapes) -> int:
    """Return the groups of a block's convolutions.

    A norm or an identity on the input tells its channels ``I``, a second layer those between: with a weight of
    ``(O, I / groups, …)`` that is the number of groups. Where nothing tells it, 1: it changes no kernel then.
    """
    for branch in _branches(part):
        parts = _flat(branch)
        layers = [p for p in parts if isinstance(p, Layer)]
        if len(layers) > 1 and not any(isinstance(p, Pool) for p in parts):
            inner, outer = (shapes[f"{layer.path}.weight"] for layer in layers[:2])
            return max(inner[0] // outer[1], 1)
        if layers and layers[0].adds_identity:
            shape = shapes[f"{layers[0].path}.weight"]
            return max(shape[0] // shape[1], 1)
    per_group = shapes[f"{main_layer(part).path}.weight"][1]
    channels = _input_channels(part, shapes)
    if main_layer(part).transposed:
        return 1
    return max(channels // per_group, 1) if channels is not None else 1


def _input_channels(part: Part, shapes: Shapes) -> int | None:
    """Return the channels of the input, where a branch without a layer of its own tells them."""
    for branch in _branches(part):
        parts = _flat(branch)
        if not parts:
            continue
        first = parts[0]
        if isinstance(first, Norm):
            return shapes[f"{first.path}.running_var"][0]
        if isinstance(first, Pool) or (isinstance(first, Identity) and not first.if_square):
            return out_channels(main_layer(part), shapes)
    return None


def input_channels(part: Part, shapes: Shapes) -> int:
    """Return the number of channels that a block takes."""
    layer = main_layer(part)
    shape = shapes[f"{layer.path}.weight"]
    return shape[0] if layer.transposed else shape[1] * groups_of(part, shapes)


def fused_shape(part: Part, shapes: Shapes) -> tuple[int, ...]:
    """Return the shape of the weight of a block's one convolution: that of its largest kernel."""
    return shapes[f"{main_layer(part).path}.weight"]


def fused_shapes(part: Part, shapes: Shapes) -> dict[str, tuple[int, ...]]:
    """Return the shapes of the weight and the bias of a block's one convolution.

    Every one has a bias but that of a block that is a lone layer without one.
    """
    has_bias = len(list(leaves(part))) > 1 or f"{main_layer(part).path}.bias" in shapes
    return {"weight": fused_shape(part, shapes)} | ({"bias": (outputs_of(part, shapes),)} if has_bias else {})


def outputs_of(part: Part, shapes: Shapes) -> int:
    """Return the number of channels that a block gives."""
    return out_channels(main_layer(part), shapes, groups_of(part, shapes))


def is_square(part: Part, shapes: Shapes) -> bool:
    """Whether a block that may be without an identity has as many inputs as outputs; a single one per group is one."""
    shape = shapes[f"{main_layer(part).path}.weight"]
    return shape[0] == shape[1] or shape[1] == 1


def fits(part: Part, shapes: Shapes) -> str | None:
    """Return what is wrong with the shapes of a block, or None."""
    first = main_layer(part)
    first_shape = shapes[f"{first.path}.weight"]
    if len(first_shape) < 2:
        return f"{first.path}.weight has shape {first_shape}, needed 2 or more sizes"
    if not all(size > 0 for leaf in leaves(part) for key in _keys(leaf) for size in shapes.get(key, ())):
        return "a tensor is empty"
    groups = groups_of(part, shapes)
    outputs = out_channels(first, shapes, groups)
    for branch in _branches(part):
        trouble = _chain_trouble(_flat(branch), shapes, first_shape[1] * groups, groups)
        if trouble is not None:
            return trouble
    for leaf in leaves(part):
        if isinstance(leaf, Layer) and len(shapes[f"{leaf.path}.weight"]) != len(first_shape):
            return f"{leaf.path}.weight has shape {shapes[f'{leaf.path}.weight']}, needed {len(first_shape)} sizes"
    if isinstance(part, Sum) and any(_ends_in(b, shapes, groups, outputs) != outputs for b in part.branches):
        return "its branches give different numbers of channels"
    return _kernel_trouble(part, shapes)


def _chain_trouble(parts: list[Part], shapes: Shapes, channels: int, groups: int) -> str | None:
    """Return where one part of a chain does not take what the part before it gives."""
    for leaf in parts:
        if isinstance(leaf, Layer):
            shape = shapes[f"{leaf.path}.weight"]
            per_group = shape[0] // groups if leaf.transposed else shape[1]
            if not leaf.transposed and per_group * groups != channels:
                return f"{leaf.path}.weight has shape {shape}, needed {channels // groups} inputs"
            channels = out_channels(leaf, shapes, groups)
            bias = shapes.get(f"{leaf.path}.bias", (channels,))
            if bias != (channels,):
                return f"{leaf.path}.bias has shape {bias}, needed {(channels,)}"
        elif isinstance(leaf, Norm):
            for key in _keys(leaf):
                if shapes.get(key, (channels,)) != (channels,):
                    return f"{key} has shape {shapes[key]}, needed {(channels,)}"
    return None


def _kernel_trouble(part: Part, shapes: Shapes) -> str | None:
    kernels = [shapes[f"{leaf.path}.weight"][2:] for leaf in leaves(part) if isinstance(leaf, Layer)]
    largest = kernels[0]
    for kernel in kernels:
        if len(kernel) != len(largest) or any((a - b) % 2 for a, b in zip(kernel, largest, strict=False)):
            return f"kernels of {_times(largest)} and {_times(kernel)} have no common middle"
        if any(a > b for a, b in zip(kernel, largest, strict=False)):
            return f"a branch of {_times(kernel)} is larger than the block's kernel of {_times(largest)}"
    return None


def _times(sizes: tuple[int, ...]) -> str:
    return "×".join(map(str, sizes)) or "no size"


def _ends_in(branch: Part, shapes: Shapes, groups: int, otherwise: int) -> int:
    for leaf in reversed(_flat(branch)):
        if isinstance(leaf, Layer):
            return out_channels(leaf, shapes, groups)
        if isinstance(leaf, Norm):
            return shapes[f"{leaf.path}.running_var"][0]
    return otherwise


def _branches(part: Part) -> Iterator[Part]:
    """Yield the chains from the input on: sums are taken apart, what follows a sum belongs to none of them."""
    if isinstance(part, (Sum, Minus)):
        for child in children(part):
            yield from _branches(child)
    elif isinstance(part, Chain) and part.parts and isinstance(part.parts[0], (Sum, Chain)):
        yield from _branches(part.parts[0])
    else:
        yield part


def _flat(branch: Part) -> list[Part]:
    return list(leaves(branch))


def _keys(leaf: Part) -> tuple[str, ...]:
    if isinstance(leaf, Norm):
        return tuple(f"{leaf.path}.{name}" for name in ("weight", "bias", "running_mean", "running_var"))
    return (f"{leaf.path}.weight",) if isinstance(leaf, Layer) else ()
