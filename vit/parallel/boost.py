"""From a model and settings to a boosted model: everything that is done to a model before it is trained."""

import importlib
from contextlib import nullcontext
from dataclasses import replace

import torch
from torch import nn

from vit.console import rank
from vit.flops import device_peak_tflops, training_flops
from vit.model import pad_classifier
from vit.model_variants import add_drop_path
from vit.modules import numbered_layers, with_first_names
from vit.optim import build_optimizer
from vit.parallel.boosted import BoostedModel
from vit.parallel.lora import add_lora, base_name, lora_scale
from vit.parallel.mesh_train import boost_mesh
from vit.parallel.plain import boost_plain
from vit.parallel.plugins import MESH_PLUGINS, PLUGINS
from vit.patches.colossalai_gemini import (
    accumulate_anew,
    operations_without_hooks,
    steady_chunks,
    update_after_replay,
)
from vit.patches.colossalai_zero import avoid_device_syncs
from vit.patches.torch_kernels import eager_dropout, no_ddp_on_one_rank, safe_attention_kernels
from vit.patches.transformers_layers import class_token_alone, direct_forward, layer_kernels
from vit.patches.transformers_vit import attention_kernel, cpu_attention, fuse_qkv, linear_patch_embedding
from vit.schedule import BatchPlan
from vit.settings import Settings
from vit.system import why_no_compiler

# Compiling ViT-B/16 takes 6 to 11 s on an H100, and compiled it trains 10 to 25 % faster.
SECONDS_THAT_PAY = 60
EAGER_UTILISATION = 0.3  # of the device's peak: 2,800 images/s of ViT-B/16 on an H200


def boost(model: nn.Module, settings) -> BoostedModel:
    """Shard, wrap and cast ``model`` as ``settings.plugin`` does. Collective: every rank calls it.

    Random draws differ between data-parallel ranks afterwards: other images, other dropout masks.
    """
    layout = settings.layout
    safe_attention_kernels(model.config)
    if settings.plugin in MESH_PLUGINS:
        boosted = boost_mesh(model, settings)  # seeds each rank by itself
    else:
        pad_classifier(model, layout.tensor_size)
        boosted = boost_with_plugin(model, settings)
        if settings.drop_path:  # after sharding, which replaces modules
            add_drop_path(boosted.model, settings.drop_path, model.config.num_hidden_layers)
        torch.manual_seed(settings.seed + layout.data_parallel_rank)
    if settings.ema:
        boosted.start_ema(settings.ema)
    return boosted


def frozen_weights(model: nn.Module) -> dict[str, torch.Tensor]:
    """Copies of the parameters that are not trained, in fp32, on the CPU of rank 0; empty elsewhere."""
    if rank() != 0:
        return {}
    named = {name: param.detach() for name, param in model.named_parameters() if not param.requires_grad}
    return {base_name(name): param.cpu().clone() for name, param in with_first_names(named).items()}


def boost_with_plugin(model: nn.Module, settings) -> BoostedModel:
    """The model under a Booster plugin, or under plain PyTorch for the plugin `none`."""
    plugin = PLUGINS[settings.plugin]
    booster = build_booster(settings) if plugin.build else None
    linear_patch_embedding(model)
    if not settings.lora_rank:  # which replaces projections
        fuse_qkv(model)
        cpu_attention(model, settings.precision)
        class_token_alone(model)
        if compiled_part(settings) or records_steps(settings):
            attention_kernel(model)
            layout = settings.layout
            if layout.data_parallel_size == layout.world_size and not settings.grad_checkpoint:
                layer_kernels(model, settings.precision)
    direct_forward(model)
    if settings.grad_checkpoint:
        # the re-entrant form gives no gradients to a layer whose input has none: the first above frozen ones
        reentrant = plugin.reentrant_checkpoint and not settings.trains_a_part
        # the state of random numbers cannot be kept while a step is recorded
        draws = draws_random_numbers(model.config, settings)
        model.gradient_checkpointing_enable({"use_reentrant": reentrant, "preserve_rng_state": draws})
    stream = torch.cuda.Stream() if records_steps(settings) else None
    compile_model(model, compiled_part(settings))
    if settings.lora_rank:
        model = add_lora(booster, model, settings)
    frozen = frozen_weights(model) if settings.trains_a_part else {}
    adamw = build_optimizer(model, settings)
    # DistributedDataParallel accumulates gradients on the stream on which it was made
    with torch.cuda.stream(stream) if stream else nullcontext():
        if booster is None:
            booster, model, optimizer = boost_plain(model, adamw, settings)
        else:
            model, optimizer, *_ = booster.boost(model, adamw)
            avoid_device_syncs(optimizer)
            no_ddp_on_one_rank(model)
            if plugin.own_adam:
                patch_gemini(model, optimizer, settings)
    if stream:
        torch.cuda.current_stream().wait_stream(stream)
        for module in model.modules():
            if isinstance(module, nn.parallel.DistributedDataParallel):
                module._set_ddp_runtime_logging_sample_rate(2**31 - 1)  # its timers cannot be recorded
    path, _, name = plugin.boosted.partition(":")
    kind = getattr(importlib.import_module(path), name)
    is_rounded = any(param.dtype != torch.float32 for param in model.parameters())
    return kind(
        booster,
        model,
        optimizer,
        settings.layout,
        plugin,
        zero_stage=settings.zero_stage,
        clip_norm=0.0 if plugin.clips else settings.max_norm,
        graph_stream=stream,
        graph_updates=not plugin.records_passes(settings),
        frozen=frozen if is_rounded else {},
        lora_scale=lora_scale(settings) if settings.lora_rank else 0.0,
    )


def patch_gemini(model: nn.Module, optimizer, settings) -> None:
    """Apply the patches of a `GeminiDDP` model and its optimizer."""
    recorded = records_steps(settings)
    accumulate_anew(model, optimizer)
    operations_without_hooks(model, settings, recorded=recorded)
    if not settings.moves_weights:
        steady_chunks(model, recorded=recorded)
    if recorded and PLUGINS[settings.plugin].records_passes(settings):
        update_after_replay(model, optimizer)


def build_booster(settings):
    """Colossal-AI's own way: a plugin, and a Booster that boosts the model by it."""
    from colossalai.booster import Booster

    build = PLUGINS[settings.plugin].build
    assert build is not None
    plugin, mixed_precision = build(settings)
    return Booster(plugin=plugin, mixed_precision=mixed_precision)


def draws_random_numbers(config, settings) -> bool:
    """Whether layers draw random numbers in training: by dropout, or by drop path.

    Args:
        config: HuggingFace config of the model.
    """
    names = [name for name in vars(config) if "dropout" in name or "drop_path" in name]
    return bool(settings.drop_path or any(getattr(config, name) for name in names))


def records_steps(settings) -> bool:
    """Whether train steps are recorded as CUDA graphs by `StepGraph`, not by the compiler."""
    return settings.cuda_graphs and not PLUGINS[settings.plugin].why_not_recorded(settings)


def compiled_part(settings) -> str:
    """What is compiled: "each layer", "the model", or nothing, ""."""
    if not settings.compile:
        return ""
    return "the model" if settings.cuda_graphs and not records_steps(settings) else "each layer"


def compile_model(model: nn.Module, part: str) -> None:
    """Compile each layer, or the model into CUDA graphs of its forward and backward pass, in place."""
    if not part:
        return
    eager_dropout()
    if part == "the model":  # a graph gains more the less is left between graphs
        model.compile(mode="reduce-overhead", dynamic=False)
    else:  # the layers between the first and the last are alike: one's kernels serve all
        import torch._dynamo.config as dynamo

        # first, middle and last layer, in training and evaluation, frozen or not: more than the 8 of PyTorch,
        # from where on nothing is compiled
        limit = "recompile_limit" if hasattr(dynamo, "recompile_limit") else "cache_size_limit"
        setattr(dynamo, limit, 32)
        for module in (model.base_model.embeddings, *numbered_layers(model).values()):
            module.compile(dynamic=False)


def decide_compilation(settings: Settings, config, labels: int, plan: BatchPlan) -> Settings:
    """The settings with ``compile`` decided, where it was open: by the expected time of the training. And
    without CUDA graphs, if layers would be repeated that draw random numbers.

    Args:
        config: HuggingFace config of the model.
        labels: number of classes.
    """
    if settings.cuda_graphs and settings.grad_checkpoint and draws_random_numbers(config, settings):
        reason = "the model has dropout, which gradient checkpointing repeats"
        notes = (*settings.notes, f"no CUDA graphs are recorded: {reason}")
        settings = replace(settings, cuda_graphs=False, notes=notes)
    if settings.compile is not None:
        return settings
    if reason := why_no_compiler():
        note = f"PRESET=fast compiles nothing: {reason}"
        return replace(settings, compile=False, notes=(*settings.notes, note))
    images = plan.images_per_step / plan.layout.data_parallel_size * plan.steps_per_epoch * settings.num_epoch
    peak, _ = device_peak_tflops(settings.precision)
    seconds = training_flops(config, labels) * images / (peak * 1e12 * EAGER_UTILISATION)
    return replace(settings, compile=seconds >= SECONDS_THAT_PAY)
