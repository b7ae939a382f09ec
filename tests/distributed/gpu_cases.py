"""Cases for test_gpu.py: losses of a few steps under every plugin, eager, compiled and as CUDA graphs.

torchrun --nproc_per_node N gpu_cases.py RESULTS.json [WORD]

WORD: only the cases with it in their names, such as graphs, and plain PyTorch in fp32.
"""

import io
import json
import os
import sys
import traceback
from argparse import Namespace
from contextlib import contextmanager, nullcontext
from pathlib import Path
from unittest import mock

sys.path[:0] = [str(Path(__file__).resolve().parents[2]), str(Path(__file__).resolve().parents[1])]

from vit.console import silence_libraries

silence_libraries()

import torch
import torch.nn.functional as F
from helpers import small_chunks, tiny_vit
from layer_kernel_checks import check_all

from vit.data.dataset import IGNORE_INDEX
from vit.data.processor import Normalize
from vit.distributed import all_reduce_sum, destroy_distributed, device, import_libraries, init_distributed
from vit.layout import ParallelLayout
from vit.parallel.boost import boost
from vit.patches.torch_kernels import safe_attention_kernels
from vit.settings import Settings
from vit.step import TrainStep, evaluate

BASE = dict(
    zero_stage=0,
    max_norm=0.5,
    offload_optim_frac=0.0,
    num_microbatches=4,
    grad_checkpoint=False,
    weight_decay=0.05,
    learning_rate=1e-3,
)
RECIPE = dict(layer_decay=0.7, ema=0.8, label_smoothing=0.1)
COMPILED_GRAPHS = dict(compile=True, cuda_graphs=True)
STEPS, BATCH, LABELS = 16, 16, 4
# heads of 64, for `vit/attention_kernel.py`
MODEL = dict(hidden_size=256, num_attention_heads=4, intermediate_size=512, image_size=32, patch_size=8)


def cases(world: int) -> dict[str, dict]:
    """Name -> what differs from `BASE`."""
    found = {}
    for precision in ("fp32", "fp16", "bf16"):
        found[f"none {precision}"] = dict(plugin="none", precision=precision)
    found["none fp32 recipe"] = found["none fp32"] | dict(recipe=True)
    for name in ("none fp32", "none fp32 recipe"):
        found[f"{name} unclipped"] = found[name] | dict(max_norm=0.0)
    for plugin, precision in (
        ("torch_ddp", "fp32"),
        ("torch_ddp", "bf16"),
        ("torch_ddp_fp16", "fp16"),
        ("low_level_zero", "fp32"),
        ("low_level_zero", "fp16"),
        ("low_level_zero", "bf16"),
        ("gemini", "fp16"),
        ("gemini", "bf16"),
        ("torch_fsdp", "fp32"),
        ("torch_fsdp", "bf16"),
        ("hybrid_parallel", "fp32"),
        ("hybrid_parallel", "fp16"),
        ("hybrid_parallel", "bf16"),
    ):
        forms = {"": {}} | forms_of(plugin, precision)
        stage = 1 if plugin == "low_level_zero" else 0
        case = dict(plugin=plugin, precision=precision, zero_stage=stage)
        found |= {f"{plugin} {precision} {form}".strip(): case | changes for form, changes in forms.items()}
    if torch.cuda.is_available():  # whole steps as graphs
        for name in (
            "none bf16",
            "torch_ddp fp32",
            "low_level_zero fp32",
            "hybrid_parallel fp32",
            "torch_ddp fp32 recipe",
            "low_level_zero bf16 recipe",
            "hybrid_parallel bf16 recipe",
        ):
            found[f"{name} graphs"] = found[name] | COMPILED_GRAPHS
            found[f"{name} graphs unclipped"] = found[f"{name} graphs"] | dict(max_norm=0.0)
        for name in ("gemini bf16", "gemini bf16 recipe", "torch_ddp bf16"):  # gemini: not with clipping
            found[f"{name} graphs unclipped"] = found[name] | dict(cuda_graphs=True, max_norm=0.0)
        found["gemini bf16 graphs unclipped in one chunk"] = found["gemini bf16 graphs unclipped"] | dict(
            in_chunks=False
        )
        if world == 1:
            found |= recorded_passes()
    for tp, pp in ((2, 1), (1, 2), (2, 2), (4, 1), (1, 4)):
        if world == tp * pp:
            for precision in ("fp32", "bf16"):
                name = f"hybrid_parallel {precision} tp {tp} pp {pp}"
                found[name] = dict(plugin="hybrid_parallel", precision=precision, tp=tp, pp=pp)
    return found


def recorded_passes() -> dict[str, dict]:
    """Cases of gemini whose graphs leave out the optimizer's step."""
    found, offloaded = {}, dict(offload_optim_frac=1.0)
    forms = {
        "": {},
        "overflow": dict(overflows=True),
        "offloaded": offloaded,
        "offloaded overflow": offloaded | dict(overflows=True),
        "offloaded checkpointed": offloaded | dict(grad_checkpoint=True),
        "offloaded in one chunk": offloaded | dict(in_chunks=False),
        "offloaded hybrid_adam": offloaded | dict(optimizer="hybrid_adam"),
        "offloaded recipe": offloaded | dict(recipe=True),
        "half offloaded": dict(offload_optim_frac=0.5),
    }
    for precision in ("fp16", "bf16"):
        case = dict(plugin="gemini", precision=precision, cuda_graphs=True, max_norm=0.0)
        for form, changes in forms.items():
            if precision == "fp16" or (changes and "overflow" not in form):
                found[f"gemini {precision} graphs of passes unclipped {form}".strip()] = case | changes
    return found


def forms_of(plugin: str, precision: str) -> dict[str, dict]:
    """Form of training -> what differs from the plain one."""
    forms: dict[str, dict] = {"recipe": dict(recipe=True), "checkpointed": dict(grad_checkpoint=True)}
    if plugin != "torch_fsdp":
        forms["resumed"] = dict(resumes=True)
    offloaded = dict(offload_optim_frac=1.0)
    if plugin == "gemini":
        return forms | {
            "offloaded": offloaded,
            "offloaded recipe": offloaded | dict(recipe=True),
            "offloaded checkpointed": offloaded | dict(grad_checkpoint=True),
            "offloaded unclipped": offloaded | dict(max_norm=0.0),
            "offloaded resumed": offloaded | dict(resumes=True),
            "half offloaded": dict(offload_optim_frac=0.5),
            "half offloaded resumed": dict(offload_optim_frac=0.5, resumes=True),
            "in one chunk": offloaded | dict(in_chunks=False),
            "placed by need": dict(placement_policy="auto"),
        }
    if plugin == "low_level_zero":
        forms["offloaded recipe"] = offloaded | dict(recipe=True)
    if precision == "bf16" and torch.cuda.is_available() and plugin != "torch_fsdp":
        forms |= {"compiled": dict(compile=True), "graphs": COMPILED_GRAPHS}
    return forms


@contextmanager
def late_copies():
    """Gemini's copies to the CPU begin 1 ms late: who reads too early reads what was there before."""
    from colossalai.zero.gemini.chunk import Chunk

    move = Chunk.shard_move

    def move_late(self, target, *args, **options) -> None:
        if target.type == "cpu":
            torch.cuda._sleep(2_000_000)  # cycles
        move(self, target, *args, **options)

    with mock.patch.object(Chunk, "shard_move", move_late):
        yield


def run(tp: int = 1, pp: int = 1, recipe: bool = False, in_chunks: bool = True, **changes) -> list[float]:
    """Losses of the steps, and of four evaluations.

    Args:
        recipe: layer decay, EMA, label smoothing.
        in_chunks: let Gemini cut the model into several chunks; it offloads nothing of one.
    """
    with late_copies(), small_chunks() if in_chunks else nullcontext():
        return train(tp, pp, recipe, **changes)


def train(
    tp: int, pp: int, recipe: bool, overflows: bool = False, resumes: bool = False, **changes
) -> list[float]:
    """See `run`."""
    torch.manual_seed(0)
    model = tiny_vit(LABELS, **MODEL)
    layout = ParallelLayout(int(os.environ["WORLD_SIZE"]), tp, pp, int(os.environ["RANK"]))
    settings = Settings(layout=layout, tp_size=tp, pp_size=pp, **BASE | (RECIPE if recipe else {}) | changes)
    boosted = boost(model, settings)
    step = TrainStep(boosted, 3, Normalize((0.5,) * 3, (0.5,) * 3), settings.label_smoothing)
    if step.graph:
        step.graph.WARM_UP_EVALUATION = 1
    step.model.train()
    generator = torch.Generator().manual_seed(1)
    pixels = torch.randint(0, 256, (BATCH, 3, 32, 32), generator=generator, dtype=torch.uint8)
    labels = torch.randint(0, 3, (BATCH,), generator=generator)
    size = BATCH // layout.data_parallel_size
    mine = slice(layout.data_parallel_rank * size, (layout.data_parallel_rank + 1) * size)
    batch = {"pixel_values": pixels[mine], "labels": labels[mine]}
    labels_of_padded = labels.index_fill(0, torch.tensor([BATCH - 1]), IGNORE_INDEX)
    padded = {"pixel_values": pixels[mine], "labels": labels_of_padded[mine]}
    losses = []
    # a graph is recorded after eleven steps; the learning rate changes, and one step has padding
    for number in range(STEPS):
        if number == STEPS - 3:  # the second evaluation is recorded, and replayed with later weights
            losses += [evaluate(step, [batch], BATCH)["average_loss"] for _ in range(2)]
            step.model.train()
            if overflows:
                overflow(step, batch)
        if resumes and number == 5:
            resume(step)
        last = number == STEPS - 2
        share = step([padded if last else batch], BATCH - last, 1e-3 if number % 2 else 5e-4, number)
        losses.append(all_reduce_sum(share).item())
    losses.append(evaluate(step, [batch], BATCH)["average_loss"])
    step.free_graphs()
    return [*losses, evaluate(step, [batch], BATCH)["average_loss"]]


def resume(step: TrainStep) -> None:
    """Continue from a checkpoint of this step, whose tensors come from the CPU."""
    saved = io.BytesIO()
    torch.save(step.boosted.capture_state(), saved)
    saved.seek(0)
    step.boosted.restore_state(torch.load(saved, map_location="cpu"))


def overflow(step: TrainStep, batch: dict) -> None:
    """A step that must change nothing, because its gradients overflow."""
    scale = step.boosted.loss_scaler().scale
    usual = scale.item()
    scale.fill_(2.0**60)
    step([batch], BATCH, 1e-3)
    scale.fill_(usual)


def attention_gradients(dropout: float) -> list[torch.Tensor]:
    """Of attention over 64 tokens where all products are far below zero, see `safe_attention_kernels`."""
    switches = torch.backends.cuda
    usual = switches.cudnn_sdp_enabled(), switches.flash_sdp_enabled()
    safe_attention_kernels(
        Namespace(image_size=32, patch_size=4, model_type="ijepa", attention_probs_dropout_prob=dropout)
    )
    query, key, value = torch.randn(
        3,
        1,
        4,
        64,
        64,
        device=device(),
        dtype=torch.bfloat16,
        generator=torch.Generator(device()).manual_seed(0),
    )
    query[..., 0], key[..., 0] = 1, -960  # divided by the root of 64: -120
    parts = [part.requires_grad_() for part in (query, key, value)]
    attended = torch.nn.functional.scaled_dot_product_attention(*parts, dropout_p=dropout)
    gradients = torch.autograd.grad(attended.float().square().sum(), parts)
    switches.enable_cudnn_sdp(usual[0])
    switches.enable_flash_sdp(usual[1])
    return gradients


def kernel_error(tokens: int, dtype: torch.dtype) -> float:
    """Of `vit/attention_kernel.py`'s context and gradients, relative to fp32's."""
    from vit.attention_kernel import attention

    torch.manual_seed(0)
    joined = torch.randn(3, tokens, 3 * 256, device=device()).to(dtype).requires_grad_()
    outer = torch.randn(3, tokens, 256, device=device()).to(dtype)
    parts = (part.unflatten(2, (4, 64)).transpose(1, 2) for part in joined.float().chunk(3, 2))
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        expected = F.scaled_dot_product_attention(*parts).transpose(1, 2).flatten(2)
    bias = torch.zeros(3 * 256, device=device()).requires_grad_()
    found, _ = attention(joined, bias, 4)
    (wanted,) = torch.autograd.grad(expected, joined, outer.float())
    gradients, of_bias = torch.autograd.grad(found, (joined, bias), outer)
    pairs = ((found, expected), (gradients, wanted), (of_bias, wanted.float().sum((0, 1))))
    return max(((a.float() - b.float()).norm() / b.float().norm()).item() for a, b in pairs)


def main() -> None:
    import_libraries()
    init_distributed(0)
    gradients = [*attention_gradients(0.1), *attention_gradients(0.0)]
    results = {"attention is finite": all(grad.isfinite().all().item() for grad in gradients)}
    if torch.cuda.is_available() and torch.cuda.get_device_capability()[0] >= 8:
        results["errors of the attention kernel"] = [
            kernel_error(tokens, dtype)
            for tokens in (16, 64, 65, 197, 577)
            for dtype in (torch.float16, torch.bfloat16)
        ]
        check_all("cuda")
    word = sys.argv[2] if len(sys.argv) > 2 else ""
    for name, changes in cases(int(os.environ["WORLD_SIZE"])).items():
        if word not in name and "none fp32" not in name:
            continue
        try:
            results[name] = run(**changes)
        except Exception as error:
            traceback.print_exc()
            results[name] = f"{type(error).__name__}: {error}"
        if os.environ["RANK"] == "0":  # at once: a later case may hang
            Path(sys.argv[1]).write_text(json.dumps(results))
        if isinstance(results[name], str) and int(os.environ["WORLD_SIZE"]) > 1:
            os._exit(1)  # the others may wait for this rank
    destroy_distributed()


if __name__ == "__main__":
    main()
