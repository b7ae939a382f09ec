"""The modules inside a ViT of transformers, which release 5.9 renamed. Beside this file, only the policy that
shards them (vit/parallel/policy.py) knows a name.

Files keep the first names in every release: those of the hub, exported models and checkpoints.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

import torch
from torch import nn

from vit.versions import installed_version

# Names within a layer: in files and until transformers 5.8, and since 5.9
RENAMED = {
    "attention.attention.query": "attention.q_proj",
    "attention.attention.key": "attention.k_proj",
    "attention.attention.value": "attention.v_proj",
    "attention.output.dense": "attention.o_proj",
    "intermediate.dense": "mlp.fc1",
    "output.dense": "mlp.fc2",
}
FIRST_NAMES = {new: first for first, new in RENAMED.items()}
FIRST, NEW = "encoder.layer", "layers"  # the list of layers
LAYER = re.compile(r"\.(?:encoder\.layer|layers)\.(\d+)\b")


def layer_number(name: str) -> int | None:
    """The layer that a module or a parameter of this name belongs to; None for embeddings and classifier."""
    found = LAYER.search(name)
    return int(found[1]) if found else None


def numbered_layers(model: nn.Module) -> dict[int, nn.Module]:
    """The layers of a model by number, whatever wraps it. A pipeline stage has its own ones alone.

    Raises:
        LookupError: it has none, so whatever should be done to each layer would not be done.
    """
    layers = {}
    for name, module in model.named_modules():
        found = LAYER.search(name)
        # FSDP wraps each layer: the last module of a number, the inner one, is the layer
        if found and name[found.end() :] in ("", "._fsdp_wrapped_module"):
            layers[int(found[1])] = module
    if not layers:
        version = installed_version("transformers")
        raise LookupError(f"transformers {version}: {type(model).__name__} has no layers of a known name")
    return layers


def layer_list(base: nn.Module) -> nn.ModuleList:
    """The layers of a base model, wrapped as they are."""
    return base.layers if hasattr(base, "layers") else base.encoder.layer


def has_new_names(layer: nn.Module) -> bool:
    return hasattr(layer, "mlp")


def self_attention(layer: nn.Module) -> nn.Module:
    """The module that computes attention. Since 5.9 it also projects the output: `project_output`."""
    return layer.attention if has_new_names(layer) else layer.attention.attention


def qkv_projections(attention: nn.Module) -> tuple[nn.Module, nn.Module, nn.Module]:
    """Query, key and value of a `self_attention`. Under tensor parallelism each has this rank's heads."""
    if hasattr(attention, "q_proj"):
        return attention.q_proj, attention.k_proj, attention.v_proj
    return attention.query, attention.key, attention.value


def output_projection(layer: nn.Module) -> nn.Module:
    return layer.attention.o_proj if has_new_names(layer) else layer.attention.output.dense


def project_output(attention: nn.Module, context: torch.Tensor) -> torch.Tensor:
    """What a `self_attention` still does to its heads' outputs, (N, tokens, hidden), before it returns."""
    return attention.o_proj(context) if hasattr(attention, "o_proj") else context


def mlp_projections(layer: nn.Module) -> tuple[nn.Module, nn.Module]:
    """The two linear layers of the MLP."""
    if has_new_names(layer):
        return layer.mlp.fc1, layer.mlp.fc2
    return layer.intermediate.dense, layer.output.dense


def branch_dropouts(layer: nn.Module) -> list[nn.Module]:
    """The modules whose ``dropout`` is the last operation of the attention branch and of the MLP branch.

    Since 5.9 that is one module, called twice.
    """
    return [layer] if has_new_names(layer) else [layer.attention.output, layer.output]


def order_parameters(model: nn.Module) -> nn.Module:
    """Put each layer's parameters in the order that they had until 5.8, in place. -> ``model``

    Optimizer states and shards are kept by the order of the parameters.
    """
    for layer in numbered_layers(model).values():
        for name in ("layernorm_before", "layernorm_after"):
            layer._modules[name] = layer._modules.pop(name)
    return model


def with_first_names(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A state dict with the names that files have."""
    return {_renamed(name, FIRST, FIRST_NAMES): tensor for name, tensor in state.items()}


def with_names_of(names: Iterable[str], state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A state dict with the names that the installed transformers uses, which ``names`` are examples of."""
    if any(f".{NEW}." in name for name in names):
        return {_renamed(name, NEW, RENAMED): tensor for name, tensor in state.items()}
    return with_first_names(state)


def load_weights(model: nn.Module, state: dict[str, torch.Tensor]) -> None:
    """``model.load_state_dict(state)``, with the names of any release of transformers."""
    model.load_state_dict(with_names_of(model.state_dict().keys(), state))


def _renamed(name: str, layers: str, modules: dict[str, str]) -> str:
    found = LAYER.search(name)
    if found is None:
        return name
    inner = name[found.end() + 1 :]
    for old, new in modules.items():
        if inner.startswith(f"{old}."):  # its weight and bias, or what PEFT put into it
            inner = new + inner.removeprefix(old)
            break
    return f"{name[: found.start()]}.{layers}.{found[1]}.{inner}"
