"""How HybridParallelPlugin shards a ViT: which layers become tensor-parallel, and what a pipeline stage runs.

Colossal-AI's own policy (colossalai/shardformer/policies/vit.py, 0.5.0) does the same with the modules of
transformers 4.51; later releases name and call them differently. This one works with all of them.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from colossalai.shardformer.layer import DropoutForReplicatedInput, Linear1D_Col, Linear1D_Row
from colossalai.shardformer.policies.base_policy import (
    ModulePolicyDescription,
    Policy,
    SubModuleReplacementDescription,
)
from torch import nn

from vit.modules import RENAMED, has_new_names, numbered_layers
from vit.patches.transformers_layers import embed, run_layer

OUTPUTS = ("attention.output.dense", "output.dense")  # their inputs are sharded: Linear1D_Row


class ViTPolicy(Policy):
    """The policy of a ViT for image classification, for `HybridParallelPlugin(custom_policy=...)`."""

    def config_sanity_check(self) -> None:
        pass

    def preprocess(self) -> nn.Module:
        return self.model

    def postprocess(self) -> nn.Module:
        return self.model

    def module_policy(self) -> dict:
        policy: dict = {}
        if self.shard_config.enable_tensor_parallelism:
            # in this order: each new module takes the next of Colossal-AI's seeds
            embeddings, layer = self.model.base_model.embeddings, numbered_layers(self.model)[0]
            policy[type(embeddings)] = _replacing({"dropout": DropoutForReplicatedInput})
            policy[type(layer)] = self._layer_policy(layer)
            policy[type(self.model)] = _replacing({"classifier": Linear1D_Col}, gather_output=True)
        if self.pipeline_stage_manager is not None:
            forward = stage_forward(self.pipeline_stage_manager, self._own_layers())
            self.append_or_create_method_replacement({"forward": forward}, policy, type(self.model))
        return policy

    def _layer_policy(self, layer: nn.Module) -> ModulePolicyDescription:
        """Queries, keys, values and the first product of the MLP are sharded by outputs, the others by
        inputs.
        """
        new_names = has_new_names(layer)
        kinds: dict[str, type] = {}
        for first, new in RENAMED.items():
            kinds[new if new_names else first] = Linear1D_Row if first in OUTPUTS else Linear1D_Col
            if first in OUTPUTS:
                dropout = "dropout" if new_names else first.replace("dense", "dropout")
                kinds[dropout] = DropoutForReplicatedInput
        attributes = {}
        if not new_names:  # since 5.9 the number of heads follows from the size of the projections
            size, config = self.shard_config.tensor_parallel_size, self.model.config
            attributes["attention.attention.num_attention_heads"] = config.num_attention_heads // size
            attributes["attention.attention.all_head_size"] = config.hidden_size // size
        description = _replacing(kinds)
        description.attribute_replacement = attributes
        return description

    def _own_layers(self) -> list[nn.Module]:
        """The layers of this stage."""
        stages, layers = self.pipeline_stage_manager, numbered_layers(self.model)
        first, end = stages.get_stage_index(stages.distribute_layers(len(layers)))
        return [layers[number] for number in range(first, end)]

    def get_held_layers(self) -> list[nn.Module]:
        held, base = self._own_layers(), self.model.base_model
        if self.pipeline_stage_manager.is_first_stage():
            held.append(base.embeddings)
        if self.pipeline_stage_manager.is_last_stage():
            held += [base.layernorm, self.model.classifier]
        return held


def _replacing(kinds: dict[str, type], **options) -> ModulePolicyDescription:
    """Replace submodules, given by name, with modules of other classes."""
    replacements = [SubModuleReplacementDescription(name, kind, options) for name, kind in kinds.items()]
    return ModulePolicyDescription(sub_module_replacement=replacements)


def stage_forward(stages, layers: list[nn.Module]) -> Callable:
    """The forward pass of a pipeline stage: pixels or hidden states -> hidden states or logits."""
    from transformers.modeling_outputs import ImageClassifierOutput

    def forward(self, pixel_values: torch.Tensor | None = None, hidden_states=None, **_):
        """``pixel_values``: (N, C, H, W), for the first stage; ``hidden_states``: (N, tokens, hidden)."""
        base = self.base_model
        if stages.is_first_stage():
            hidden_states = embed(base, pixel_values)
        for layer in layers:
            hidden_states = run_layer(base, layer, hidden_states)
        if not stages.is_last_stage():
            return {"hidden_states": hidden_states}
        return ImageClassifierOutput(logits=self.classifier(base.layernorm(hidden_states)[:, 0]))

    return forward
