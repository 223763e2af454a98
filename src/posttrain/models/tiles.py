"""Which modules of a model are computed in tiles of rows: norms, MLPs and the projections of attention. For the length
of a step, modules are put in their places that tile (`ops.tiled`); names, weights and hooks stay theirs, and everything
is put back.

What mixes rows, or is not known to keep them apart, is left alone: attention itself, and the MLPs of mixtures of
experts.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from torch import nn

from posttrain.errors import UserError
from posttrain.models.head import base_model, replaced
from posttrain.ops.tiled import TiledRows

logger = logging.getLogger(__name__)

_MIXTURES = re.compile(r"expert|router|sparsemoe|moeblock|moe$", re.IGNORECASE)  # in the names of their classes


@contextmanager
def tiled(model: nn.Module, rows: int) -> Iterator[None]:
    """Inside, forward and backward of `model` compute row by row what can be, `rows` at a time."""
    with ExitStack() as stack:
        for parent, name in places(model):
            stack.enter_context(replaced(parent, name, TiledRows(getattr(parent, name), rows)))
        yield


def check_tiles(model: nn.Module, *, strict: bool = True) -> None:
    """Says by name what is left alone. Raises UserError where nothing can be tiled and it is `strict`ly wanted."""
    if strict and not places(model):
        raise UserError(f"tile_rows: {type(base_model(model)).__name__} has no layers with norms and an MLP of a known kind; leave it out")
    mixtures = sorted(
        {type(child).__name__ for layer in _layers(model) for name, child in layer.named_children() if _is_mlp(name) and _is_mixture(child)}
    )
    if mixtures:
        logger.warning("tile_rows: %s mixes experts and is computed as a whole; norms and projections are tiled", mixtures[0])


def places(model: nn.Module) -> list[tuple[nn.Module, str]]:
    """Parent and name of every module that is tiled."""
    found: list[tuple[nn.Module, str]] = []
    layers = _layers(model)
    for layer in layers:
        for name, child in layer.named_children():
            if _is_attention(child):
                found += [(child, part) for part, inner in child.named_children() if _is_norm(inner) or _is_linear(inner)]
            elif _is_norm(child) or (_is_mlp(name) and not _is_mixture(child)):
                found.append((layer, name))
    inside = {id(layer) for layer in layers}
    for module in base_model(model).modules():  # the last norm stands beside the layers
        if any(isinstance(child, nn.ModuleList) and any(id(layer) in inside for layer in child) for child in module.children()):
            found += [(module, name) for name, child in module.named_children() if _is_norm(child)]
    return found


def _layers(model: nn.Module) -> list[nn.Module]:
    """Modules that hold an attention and an MLP side by side."""
    return [
        module
        for module in base_model(model).modules()
        if any(_is_attention(child) for child in module.children()) and any(_is_mlp(name) for name, _ in module.named_children())
    ]


def _is_attention(module: nn.Module) -> bool:
    return type(module).__name__.endswith("Attention")


def _is_mlp(name: str) -> bool:
    return name in ("mlp", "feed_forward")


def _is_norm(module: nn.Module) -> bool:
    return isinstance(module, nn.LayerNorm) or type(module).__name__.endswith(("RMSNorm", "LayerNorm"))


def _is_linear(module: nn.Module) -> bool:
    """A linear, plain, quantised or with adapters."""
    if type(module).__module__.startswith("peft."):
        from peft.tuners.tuners_utils import BaseTunerLayer

        if isinstance(module, BaseTunerLayer):
            module = module.get_base_layer()
    return isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"


def _is_mixture(module: nn.Module) -> bool:
    return any(_MIXTURES.search(type(part).__name__) for part in module.modules())
