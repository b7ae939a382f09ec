"""What a config chooses of a model: mean pooling, fixed positions, mimetic initial weights."""

import numpy as np
import pytest
import torch
from train_cases import tiny_config

from vit.initial_weights import build_vit
from vit.model_variants import mimetic_init, sincos_position_embeddings_
from vit.modules import numbered_layers, output_projection, qkv_projections, self_attention


def test_mean_pooling_classifies_the_mean_of_the_patches_and_there_is_no_class_token():
    torch.manual_seed(0)
    vit = build_vit(tiny_config(POOLING="mean")).eval()
    pixels = torch.randn(3, 3, 24, 24)
    with torch.no_grad():
        tokens = vit.base_model(pixel_values=pixels).last_hidden_state
        assert tokens.shape == (3, 9, 16)
        assert torch.allclose(
            vit(pixel_values=pixels).logits,
            tokens.mean(1) @ vit.classifier.weight.T + vit.classifier.bias,
            atol=1e-6,
        )
    assert build_vit(tiny_config()).base_model(pixel_values=pixels).last_hidden_state.shape == (3, 10, 16)


@pytest.mark.parametrize("pooling", ["class", "mean"])
def test_fixed_positions_are_sines_and_cosines_of_the_place(pooling):
    vit = build_vit(tiny_config(POOLING=pooling))
    sincos_position_embeddings_(vit)
    positions = vit.base_model.embeddings.position_embeddings
    assert not positions.requires_grad and positions.shape[1] == 9 + (pooling == "class")
    assert positions[0, :-9].eq(0).all()
    for y in range(3):
        for x in range(3):
            expected = [
                function(place / 10000 ** (i / 3))
                for place in (x, y)
                for function in (np.sin, np.cos)
                for i in range(4)
            ]
            assert positions[0, -9 + 3 * y + x].tolist() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("pooling", ["class", "mean"])
def test_mimetic_attention_looks_at_the_like_and_takes_away_what_it_finds(pooling):
    """Products as in Trockman and Kolter (2023).

    Query and key near the identity, value and output near its negative.
    """
    torch.manual_seed(0)
    vit = build_vit(tiny_config(POOLING=pooling, HIDDEN_SIZE=64, NUM_HEADS=2))
    others = {
        name: tensor.clone()
        for name, tensor in vit.state_dict().items()
        if ".attention." not in name and "position" not in name
    }
    mimetic_init(vit)
    for layer in numbered_layers(vit).values():
        (queries, keys, values), output = qkv_projections(self_attention(layer)), output_projection(layer)
        for query, key in zip(queries.weight.split(32), keys.weight.split(32)):
            product = (query.T @ key).detach()  # of 64 dimensions the 32 that matter most
            assert (
                0.3 < product.diagonal().mean() < 0.7
                and (product - product.diagonal().diag()).mean().abs() < 0.01
            )
        product = (output.weight @ values.weight).detach()
        noise = (product + 0.4 * torch.eye(64)) / 0.4 * 64**0.5
        assert (
            noise.mean().abs() < 0.05
            and noise.std().item() == pytest.approx(1, abs=0.03)
            and noise.abs().max() < 3**0.5 + 1e-3
        )
        assert torch.allclose(output.weight.norm(), values.weight.norm(), rtol=1e-3)  # neither is the larger
    positions = vit.base_model.embeddings.position_embeddings
    fixed = build_vit(vit.config)
    sincos_position_embeddings_(fixed)
    assert torch.equal(positions, fixed.base_model.embeddings.position_embeddings) and positions.requires_grad
    assert all(torch.equal(vit.state_dict()[name], tensor) for name, tensor in others.items())
