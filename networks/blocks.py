"""What a network is a sequence of: the places at which it can be cut into stages.

An ``nn.Sequential`` is the sequence of what it holds, and another network says so by an attribute ``blocks``: the names
of its modules, each fed with what the one before it returns. Sequences inside sequences are taken apart.
"""

from __future__ import annotations

from torch import nn

from utils.errors import UsageError


def blocks_of(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """The blocks, by name, in the order in which they are called: the network is their composition.

    Raises UsageError of a network that is no sequence.
    """
    if isinstance(model, nn.Sequential):
        names = list(model._modules)  # named_children() would pass over a module that is used twice
    else:
        names = getattr(model, "blocks", None)
        if not isinstance(names, tuple | list) or not all(isinstance(name, str) for name in names):
            raise UsageError(
                f"{type(model).__name__} cannot be cut into stages: what can is an nn.Sequential (cnn, mlp), or a "
                "network whose attribute 'blocks' names its modules in the order of their calls (resnet18, squeezenet)."
            )
    found = []
    for name in names:
        module = model.get_submodule(name)
        inner = blocks_of(module) if isinstance(module, nn.Sequential) else [("", module)]
        found += [(f"{name}.{rest}" if rest else name, block) for rest, block in inner]
    return found
