"""`vit/layer_kernels.py`: where it is used, and, where Triton can interpret it, what it computes.

On a GPU tests/distributed/gpu_cases.py runs them.
"""

import sys
from copy import deepcopy
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F
from helpers import ROOT, run_interpreted, tiny_vit

from vit.layout import ParallelLayout
from vit.model import freeze_parameters
from vit.model_variants import add_drop_path
from vit.modules import numbered_layers
from vit.parallel import boost
from vit.patches import transformers_layers as patches
from vit.patches.transformers_vit import fuse_qkv, linear_patch_embedding
from vit.settings import Settings


def gelu(product, bias):
    return F.gelu(product + bias)


def add_norm(hidden, product, bias, factors, weight, shift, epsilon):
    added = product + bias if factors is None else (product + bias) * factors[:, None, None]
    total = hidden + added.to(hidden.dtype)
    return total, F.layer_norm(total, weight.shape, weight, shift, epsilon).to(product.dtype), None


@pytest.fixture
def calls(monkeypatch) -> list:
    """A Hopper GPU, and in the place of the kernels PyTorch's functions, which note that they were called."""
    noted: list = []
    module = ModuleType("vit.layer_kernels")
    for function in (gelu, add_norm):

        def note(*given, function=function):
            noted.append(function.__name__)
            return function(*given)

        setattr(module, function.__name__, note)
    monkeypatch.setitem(sys.modules, "vit.layer_kernels", module)
    monkeypatch.setattr(patches, "runs_kernels", lambda: True)
    return noted


def build(with_kernels: bool, drop_path: float = 0.0, **sizes) -> torch.nn.Module:
    """A model as `boost` prepares it; its biases are not 0."""
    torch.manual_seed(0)
    model = tiny_vit(**sizes)
    with torch.no_grad():
        for param in model.parameters():
            param += 0.1 * torch.randn(param.shape)
    linear_patch_embedding(model)
    fuse_qkv(model)
    patches.class_token_alone(model)
    if with_kernels:
        patches.layer_kernels(model, "bf16")
    patches.direct_forward(model)
    add_drop_path(model, drop_path, model.config.num_hidden_layers)
    return model


def logits_and_gradients(model: torch.nn.Module, is_autocast: bool) -> list[torch.Tensor]:
    pixels = torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    torch.manual_seed(2)  # of drop path
    with torch.autocast("cpu", torch.bfloat16, enabled=is_autocast):
        logits = model(pixel_values=pixels).logits
    return [logits, *torch.autograd.grad(logits.float().square().sum(), list(model.parameters()))]


@pytest.mark.parametrize("drop_path", [0.0, 0.5])
@pytest.mark.parametrize("kind", ["fp32", "bf16", "autocast"])
def test_layers_by_kernels_compute_what_transformers_layers_do(calls, kind, drop_path):
    models = [build(with_kernels, drop_path).train() for with_kernels in (False, True)]
    if kind == "bf16":
        models = [model.bfloat16() for model in models]
    expected, found = (logits_and_gradients(model, kind == "autocast") for model in models)
    assert [tensor.dtype for tensor in found] == [tensor.dtype for tensor in expected]
    # together: the gradient of a key's bias is 0 but for rounding
    is_, was = (torch.cat([tensor.flatten() for tensor in tensors]).float() for tensors in (found, expected))
    assert (is_ - was).norm() <= (1e-5 if kind == "fp32" else 0.02) * was.norm()
    layers = models[0].config.num_hidden_layers
    assert calls == ["add_norm", "gelu"] + ["add_norm", "add_norm", "gelu"] * (layers - 1)


def test_drop_path_is_drawn_for_the_layers_that_train(calls):
    found = []
    for with_kernels in (False, True):
        model = build(with_kernels, drop_path=0.5).train()
        numbered_layers(model)[1].eval()
        found.append(logits_and_gradients(model, is_autocast=False))
    for is_, was in zip(found[1], found[0], strict=True):
        torch.testing.assert_close(is_, was, rtol=1e-4, atol=1e-5)


def test_layers_by_kernels_serve_transformers_own_loop(calls):
    plain, fast = (build(with_kernels) for with_kernels in (False, True))
    pixels = torch.randn(3, 3, 16, 16)
    # without `direct_forward`, as VIT_DISABLE_PATCHES leaves it
    logits = [type(model).forward(model, pixels).logits for model in (plain, fast)]
    torch.testing.assert_close(logits[1], logits[0])
    assert not calls


@pytest.mark.parametrize("sizes", [dict(hidden_dropout_prob=0.1), dict(hidden_act="relu")])
def test_no_kernels_for_layers_that_compute_something_else(calls, sizes):
    logits_and_gradients(build(with_kernels=True, **sizes), is_autocast=True)
    assert not calls


@pytest.mark.parametrize(
    "changes, used",
    [
        ({}, True),
        (dict(compile=False), False),  # the host is too slow for it to matter
        (dict(compile=False, cuda_graphs=True, plugin="gemini"), True),  # recorded
        (dict(grad_checkpoint=True), False),
        (dict(lora_rank=2), False),
        (dict(layout=ParallelLayout(2, tensor_size=2)), False),
        (dict(layout=ParallelLayout(2, pipeline_size=2)), False),
        (dict(layout=ParallelLayout(2)), True),
    ],
)
def test_kernels_are_for_compiled_layers_that_are_whole(monkeypatch, changes, used):
    class Ends(Exception):
        pass

    def end(*_):
        raise Ends

    called: list = []
    monkeypatch.setattr(boost, "layer_kernels", lambda *given: called.append(given[1]))
    monkeypatch.setattr(boost, "compile_model", end)
    monkeypatch.setattr(boost, "build_booster", lambda settings: None)
    model = tiny_vit()  # before, for its imports look at the class of streams
    monkeypatch.setattr(torch.cuda, "Stream", lambda: None)
    chosen = dict(plugin="none", precision="bf16", batch_size=2, learning_rate=0.1, weight_decay=0.0)
    rest = dict(zero_stage=0, num_microbatches=1, offload_optim_frac=0.0, grad_checkpoint=False)
    settings = dict(layout=ParallelLayout(1), compile=True) | chosen | rest | changes
    with pytest.raises(Ends):
        boost.boost_with_plugin(model, Settings(**settings))
    assert called == ["bf16"] * used


def test_no_kernels_in_fp32_or_where_they_cannot_run(calls, monkeypatch):
    model = tiny_vit()

    def is_changed() -> bool:
        return any(hasattr(layer, "kernels") for layer in numbered_layers(model).values())

    patches.layer_kernels(model, "fp32")
    assert not is_changed()
    monkeypatch.setattr(patches, "runs_kernels", lambda: False)
    patches.layer_kernels(model, "bf16")
    assert not is_changed()
    monkeypatch.setattr(patches, "runs_kernels", lambda: True)
    for precision in ("fp16", "bf16"):
        model = deepcopy(model)
        patches.layer_kernels(model, precision)
        assert is_changed()
        model = tiny_vit()


def test_every_kind_of_layer_is_compiled(calls, monkeypatch):
    """First, middle and last layer, frozen or not, in training and evaluation: more than the usual limit."""
    import torch._dynamo as dynamo

    monkeypatch.setitem(vars(sys.modules["vit.layer_kernels"]), "gelu", gelu)
    monkeypatch.setitem(vars(sys.modules["vit.layer_kernels"]), "add_norm", add_norm)
    compile_module = torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, **_: compile_module(self, backend="eager"))
    dynamo.reset()
    dynamo.utils.counters.clear()
    model = build(with_kernels=True, num_hidden_layers=12)
    freeze_parameters(model, "3")
    limit = "recompile_limit" if hasattr(dynamo.config, "recompile_limit") else "cache_size_limit"
    with dynamo.config.patch({limit: 8}):
        boost.compile_model(model, "each layer")
        for training in (True, False, True):
            with torch.set_grad_enabled(training):
                logits = model.train(training)(pixel_values=torch.randn(4, 3, 16, 16)).logits
            if training:
                logits.sum().backward()
    reasons = dynamo.utils.counters["unimplemented"]
    dynamo.reset()
    assert not [reason for reason in reasons if "limit" in reason]


def test_kernels_interpreted_on_the_cpu():
    run_interpreted(ROOT / "tests" / "layer_kernel_checks.py", "cpu")
