"""Cases of test_offload.py: Gemini with its optimizer on the CPU, beside a GPU that is pretended.

VIT_DISABLE_PATCHES=cpu_gemini torchrun --nproc_per_node 1 offload_cases.py RESULTS.json

Without a GPU nothing can be recorded. But what a replay does is known: it changes memory as the recorded
passes did, and Python's notes of chunks and of the loss scale not at all. So the passes run, and the notes
are put back.
"""

import json
import sys
from argparse import Namespace
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from copy import deepcopy
from pathlib import Path
from unittest import mock

sys.path[:0] = [str(Path(__file__).resolve().parents[2]), str(Path(__file__).resolve().parents[1])]

from vit.console import silence_libraries

silence_libraries()

import torch
from helpers import in_memory_images, small_chunks, tiny_vit

from vit.data.loaders import BatchDataset
from vit.data.processor import Normalize
from vit.data.transforms import Resize
from vit.distributed import destroy_distributed, import_libraries, init_distributed
from vit.layout import ParallelLayout
from vit.parallel.boost import boost
from vit.patches import colossalai_gemini
from vit.settings import Settings
from vit.step import TrainStep, evaluate

CASES = {
    "fp16, all": dict(precision="fp16", offload_optim_frac=1.0),
    "fp16, half": dict(precision="fp16", offload_optim_frac=0.5),
    "fp16, nothing": dict(precision="fp16", offload_optim_frac=0.0),
    "bf16, all": dict(precision="bf16", offload_optim_frac=1.0),
}
STEPS, FIRST_REPLAY = 9, 2


class PretendedGPU(str):
    """A device that torch takes for the CPU, and Colossal-AI for a GPU."""

    type = "cuda"


@contextmanager
def pretended_gpu() -> Iterator[None]:
    from colossalai.accelerator import get_accelerator
    from colossalai.zero.gemini import gemini_ddp, gemini_optimizer, placement_policy
    from colossalai.zero.gemini.chunk import chunk, manager

    real, gpu = get_accelerator(), PretendedGPU("cpu")
    to, empty = torch.Tensor.to, torch.empty
    pretended = Namespace(name="cuda", get_current_device=lambda: gpu)
    for name in ("Stream", "current_stream", "stream"):
        setattr(pretended, name, getattr(real, name))

    def copy_to(tensor, *args, **options):
        copied = to(tensor, *args, **options)
        moves = any(isinstance(value, PretendedGPU) for value in (*args, *options.values()))
        return copied.clone() if moves and copied is tensor else copied

    def pageable(*args, pin_memory: bool = False, **options):  # memory can be pinned only for a GPU
        return empty(*args, **options)

    def is_offloaded(model, chunk) -> bool:
        return model.grads_device[next(iter(chunk.tensors_info))].type == "cpu"

    with ExitStack() as stack:
        for module in (chunk, manager, gemini_ddp, gemini_optimizer, placement_policy):
            stack.enter_context(mock.patch.object(module, "get_accelerator", lambda: pretended))
        stack.enter_context(mock.patch.object(torch, "empty", pageable))
        stack.enter_context(mock.patch.object(torch.Tensor, "to", copy_to))
        for name in ("Stream", "current_stream"):
            stack.enter_context(mock.patch.object(torch.cuda, name, mock.Mock()))
        stack.enter_context(mock.patch.object(torch.cuda, "stream", lambda stream: nullcontext()))
        stack.enter_context(mock.patch.object(colossalai_gemini, "_is_offloaded", is_offloaded))
        yield


def build(recorded: bool, **changes) -> TrainStep:
    torch.manual_seed(0)
    settings = Settings(
        layout=ParallelLayout(1),
        plugin="gemini",
        zero_stage=0,
        num_microbatches=1,
        grad_checkpoint=True,
        weight_decay=0.05,
        learning_rate=1e-2,
        cuda_graphs=recorded,
        **changes,
    )
    with small_chunks(pin_memory=True):
        boosted = boost(tiny_vit(4), settings)
    step = TrainStep(boosted, 3, Normalize((0.5,) * 3, (0.5,) * 3))
    step.free_graphs()  # nothing is captured: `train` replays
    return step


def one_batch() -> dict:
    return BatchDataset(in_memory_images(8), Resize(16)).__getitems__([(0, i) for i in range(8)])


@contextmanager
def as_replayed(boosted) -> Iterator[None]:
    """Context that changes memory, but not what Python notes of chunks and of the loss scale."""
    manager, mixin = boosted.model.chunk_manager, boosted.optimizer.mix_precision_mixin
    kept = [(owner, dict(vars(owner))) for owner in (manager, mixin, *boosted.chunks())]
    states = [(info, info.state) for chunk in boosted.chunks() for info in chunk.tensors_info.values()]
    counts = [(chunk.tensor_state_cnter, dict(chunk.tensor_state_cnter)) for chunk in boosted.chunks()]
    accessed, memory = set(manager.accessed_chunks), dict(manager.total_mem)
    for chunk in boosted.chunks():  # a graph reads the weights of offloaded chunks from the fp32 ones
        if colossalai_gemini._is_offloaded(boosted.model, chunk):
            chunk.payload.fill_(torch.nan)
    yield
    for owner, values in kept:
        vars(owner).update(values)
    for info, state in states:
        info.state = state
    for counter, values in counts:
        counter.update(values)
    manager.accessed_chunks, manager.total_mem = accessed, memory


def train(recorded: bool, **changes) -> dict:
    """Losses of steps and evaluations, factors of the loss, and the number of their places in memory.

    In fp16 one step overflows, and three without overflow double the factor.
    """
    step = build(recorded, **changes)
    scaler, passes = step.boosted.loss_scaler(), step.forward_backward
    if scaler:
        scaler._growth_interval = 3

    def replayed(*args):
        with as_replayed(step.boosted):
            return passes(*args)

    batch, losses, scales, places = one_batch(), [], [], set()
    for number in range(STEPS):
        if recorded and number >= FIRST_REPLAY:
            step.forward_backward = replayed
        if number == 7:
            step.boosted.restore_state(deepcopy(step.boosted.capture_state()))
        if scaler and number in (4, 5):
            scaler._scale.fill_(2.0 ** (60 if number == 4 else 10))
        step.model.train()
        losses.append(step([batch], 8, 1e-2, number).item())
        if number % 2:  # which leaves chunks on the GPU
            losses.append(evaluate(step, [batch], 8)["average_loss"])
        if scaler:
            scales.append(scaler.scale.item())
            places.add(scaler.scale.data_ptr())
    return {"losses": losses, "scales": scales, "places": len(places)}


def evaluated_after_loading(**changes) -> list[float]:
    """Losses of three evaluations after other weights were loaded, before any step."""
    step = build(False, **changes)
    step.boosted.load_weights({"masters": [2 * weights for weights in step.boosted.master_weights()]})
    batch = one_batch()
    return [evaluate(step, [batch], 8)["average_loss"] for _ in range(3)]


def main() -> None:
    import_libraries()
    init_distributed(0)
    with pretended_gpu():
        found: dict = {"loaded": {name: evaluated_after_loading(**case) for name, case in CASES.items()}}
        for name, case in CASES.items():
            found[name] = {kind: train(kind == "replayed", **case) for kind in ("usual", "replayed")}
    Path(sys.argv[1]).write_text(json.dumps(found))
    destroy_distributed()


if __name__ == "__main__":
    main()
