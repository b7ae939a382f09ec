"""Training and evaluation of in-memory images by every plugin and layout: cases of parallel_cases.py."""

import json
import os
import sys
import weakref
from pathlib import Path
from unittest import mock

import helpers
import torch
from colossalai.tensor.d_tensor.api import layout_converter
from colossalai.zero.gemini.chunk import Chunk
from colossalai.zero.gemini.gemini_hook import GeminiZeROHook
from helpers import (
    EMA,
    LABEL_SMOOTHING,
    LAYER_DECAY,
    LEARNING_RATES,
    WEIGHT_DECAY,
    in_memory_images,
    small_chunks,
)

from data import load_dataset
from vit.checkpoint import CheckpointFolder, load_checkpoint, read_meta
from vit.data.decode import plan_decoding
from vit.data.loaders import BatchDataset
from vit.data.processor import Normalize
from vit.data.transforms import Resize
from vit.distributed import all_reduce_sum
from vit.layout import ParallelLayout
from vit.model import freeze_parameters, load_model, pad_classifier
from vit.modules import load_weights, with_first_names
from vit.parallel import boost as boosting
from vit.parallel.boost import boost
from vit.parallel.reduction import GradientReduction
from vit.patches import colossalai_zero
from vit.patches.colossalai_gemini import GradientCollector
from vit.patches.torch_kernels import release_model_memory
from vit.schedule import BatchPlan
from vit.settings import Settings
from vit.step import Mixup, TrainStep
from vit.step import evaluate as evaluate_step

RANK, WORLD = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
FOLDER = Path(sys.argv[1])

EPOCHS, GLOBAL_BATCH = 2, 8  # of the training described in helpers.py
BASE = dict(
    plugin="torch_ddp",
    precision="fp32",
    zero_stage=0,
    offload_optim_frac=0.0,
    num_microbatches=1,
    grad_checkpoint=False,
    weight_decay=WEIGHT_DECAY,
    learning_rate=1e-3,
    seed=0,
)
RECIPE = dict(layer_decay=LAYER_DECAY, ema=EMA, label_smoothing=LABEL_SMOOTHING)


def build(model, tp=1, pp=1, recipe=False, class_weights=None, **changes) -> tuple[TrainStep, Settings]:
    """A model under a plugin. ``recipe``: layer decay, weight average, label smoothing."""
    # Colossal-AI remembers how to gather a tensor by its shape alone; these processes had other groups before
    layout_converter.cached_solution.clear()
    layout = ParallelLayout(WORLD, tp, pp, RANK)
    options = BASE | (RECIPE if recipe else {}) | changes
    settings = Settings(layout=layout, tp_size=tp, pp_size=pp, **options)
    normalize = Normalize((0.5,) * 3, (0.5,) * 3)
    freeze_parameters(model, settings.freeze)
    boosted = boost(model, settings)
    step = TrainStep(boosted, 3, normalize, settings.label_smoothing, class_weights=class_weights)
    return step, settings


def initial_model():
    torch.manual_seed(0)
    return helpers.tiny_vit(3)


def meta_of(step: int, epoch: int) -> dict:
    progress = dict(loss_sum=0.0, images=0, steps=0, seconds=0.0)
    meta = dict(step=step, epoch=epoch, progress=progress, best_epoch=None, processes=WORLD)
    return meta | dict(rows=[], settings={})


def checkpoint_of(folder: Path, step: int) -> Path:
    """The checkpoint after ``step`` steps; the later one if the epoch's evaluation made two of it."""
    metas = [(path, json.loads(path.read_text())) for path in folder.glob("*/meta.json")]
    found = [(meta.get("epoch", 0), path.parent) for path, meta in metas if meta["step"] == step]
    return max(found)[1]


def train(tp=1, pp=1, k=1, save=None, load=None, mixed=False, **changes) -> dict:
    """Losses of every step and of an evaluation after each epoch.

    save, load: a folder of checkpoints, written to or read after the first epoch.
    mixed: with MixUp and CutMix.
    """
    step, settings = build(initial_model(), tp, pp, gradient_accumulation_steps=k, **changes)
    layout = settings.layout
    if mixed:
        step.mixup = Mixup(0.8, 1.0, 3, seed=7, group=layout.data_parallel_rank)
    plan = BatchPlan(22, GLOBAL_BATCH // layout.data_parallel_size // k, k, layout, seed=5)
    images = BatchDataset(in_memory_images(22), Resize(16))
    held_out = BatchDataset(in_memory_images(13, seed=2), Resize(16))
    losses, evaluations = [], []
    for epoch in range(EPOCHS):
        if load and epoch == 0:
            path = checkpoint_of(load, plan.steps_per_epoch)
            load_checkpoint(path, step.boosted, read_meta(path))
            continue
        step.model.train()
        order = plan.batches(epoch)
        for i, count in enumerate(plan.real_images_per_step):
            batches = [images.__getitems__(next(order)) for _ in range(plan.micro_batches_per_step)]
            number = epoch * plan.steps_per_epoch + i
            share = step(batches, count, LEARNING_RATES[number], number)
            losses.append(all_reduce_sum(share.double()).item())
        batches = map(held_out.__getitems__, plan.evaluation_batches(13))
        evaluations.append(evaluate_step(step, batches, 13))
        if save and epoch == 0:
            CheckpointFolder(save, 1).save(step.boosted, meta_of(plan.steps_per_epoch, epoch=1))
    result = {"losses": losses, "evaluations": evaluations}
    if step.boosted.ema:
        state = step.boosted.gather_state_dict(FOLDER)
        result["exported"] = exported_loss(state, step, tp, held_out) if state else None
    if settings.trains_a_part:  # with an average, too
        result["unchanged"] = unchanged(state) if state else None
        states = step.boosted.optimizer.optim.state_dict()["state"].values()
        moments = torch.tensor(sum(state["exp_avg"].numel() for state in states))
        result["moments"] = all_reduce_sum(moments).item()
    return result


def has_ddp(**case) -> bool:
    """Whether a boosted model is inside DistributedDataParallel."""
    step, _ = build(initial_model(), **case)
    wrapper = torch.nn.parallel.DistributedDataParallel
    return any(isinstance(module, wrapper) for module in step.model.modules())


def as_the_library_steps(**case) -> dict:
    """`train` without the patches of Colossal-AI's optimizers."""
    patches = (
        "fused_zero_updates,reduce_during_backward,share_during_update,fused_mixed_updates,clip_on_device"
    )
    with mock.patch.dict(os.environ, VIT_DISABLE_PATCHES=patches):
        return train(**case)


def reduced_early() -> dict:
    """`train` by ZeRO 1 with small buckets; how many a backward pass and an update sent; whether an optimizer
    is freed.
    """
    sent, finish = [], GradientReduction.finish
    shared, update = [], colossalai_zero._update_and_share

    def count(self) -> None:
        sent.append(len(self.sent))
        finish(self)

    def update_small_buckets(self, masters) -> None:
        self._reduce_bucket_size = 1000
        gather = mock.Mock(wraps=colossalai_zero._gather_weights)
        with mock.patch.object(colossalai_zero, "_gather_weights", gather):
            update(self, masters)
        shared.append(gather.call_count)

    case = dict(plugin="low_level_zero", zero_stage=1)
    with (
        mock.patch.multiple(GradientReduction, BUCKET=1000, finish=count),
        mock.patch.object(colossalai_zero, "_update_and_share", update_small_buckets),
    ):
        result = train(**case)
    return result | {"sent": sent, "shared": shared, "freed": is_freed(**case)}


def is_freed(**case) -> bool:
    """Whether a model and its optimizer go when nothing but their own hooks refers to them."""
    step, _ = build(initial_model(), **case)
    kept = [weakref.ref(step.optimizer), *(weakref.ref(param) for param in step.model.parameters())]
    del step
    release_model_memory()
    return all(ref() is None for ref in kept)


def hooks_of_gemini() -> dict:
    """`train` on one process, how often Gemini's hooks of operations ran in the training steps, and how many
    gradients were copied into a chunk by themselves.
    """
    found = {}
    for name, patches in (("usual", ""), ("switched off", "operations_without_hooks")):
        ran, pre_op = [], GeminiZeROHook.pre_op
        copied, copy = [], Chunk.copy_tensor_to_chunk_slice

        def count(self, params, ran=ran, pre_op=pre_op) -> None:
            ran.append(torch.is_grad_enabled())
            pre_op(self, params)

        def count_copy(self, *args, copied=copied, copy=copy, **options) -> None:
            copied.append(1)
            copy(self, *args, **options)

        with (
            mock.patch.dict(os.environ, VIT_DISABLE_PATCHES=patches),
            mock.patch.object(GeminiZeROHook, "pre_op", count),
            mock.patch.object(Chunk, "copy_tensor_to_chunk_slice", count_copy),
            mock.patch.object(GradientCollector, "ELEMENTS", 300),  # several copies for some chunks
            small_chunks(),
        ):
            found[name] = train(plugin="gemini", precision="fp16", grad_checkpoint=True)
            found[name]["freed"] = is_freed(plugin="gemini", precision="fp16")
        found[name] |= {"hooks": sum(ran), "copied alone": len(copied)}
    return found


def overflowed(k: int, **case) -> dict:
    """Losses of steps of ``k`` micro-batches: of all, and of all but the first, whose gradients overflow."""
    images, losses = BatchDataset(in_memory_images(8), Resize(16)), {}
    firsts = range(RANK, k * WORLD, WORLD)
    parts = [images.__getitems__([(0, i) for i in range(first, 8, k * WORLD)]) for first in firsts]
    for name, numbers in (("with", range(5)), ("without", range(1, 5))):
        step, _ = build(initial_model(), precision="fp16", gradient_accumulation_steps=k, **case)
        scaler = step.boosted.loss_scaler()
        usual = scaler.scale.item()
        step.model.train()
        losses[name] = []
        for number in numbers:
            scaler._scale.fill_(usual if number else 2.0**60)
            losses[name].append(all_reduce_sum(step(parts, 8, 1e-2, number)).item())
    return losses


def steady_gemini() -> dict:
    """Losses of Gemini whose chunks keep their memory, as recorded steps need it, and of Gemini as it is."""
    patch = boosting.steady_chunks
    images, found = BatchDataset(in_memory_images(8), Resize(16)), {}
    batch = images.__getitems__([(0, i) for i in range(RANK, 8, WORLD)])
    for name, used in (("steady", lambda model, recorded: patch(model, True)), ("usual", mock.Mock())):
        with small_chunks(), mock.patch.object(boosting, "steady_chunks", used):
            step, _ = build(initial_model(), plugin="gemini", precision="bf16")
            chunks = step.boosted.chunks()
            losses, first, kept = [], [chunk.payload for chunk in chunks], True
            for number in range(5):
                step.model.train()
                losses.append(all_reduce_sum(step([batch], 8, 1e-2, number)).item())
                losses.append(evaluate_step(step, [batch], 8)["average_loss"])
                kept &= all(chunk.payload is tensor for chunk, tensor in zip(chunks, first))
            kinds = sorted({type(chunk).__name__ for chunk in chunks})
            found[name] = {"losses": losses, "kept": kept, "kinds": kinds}
    return found


def unchanged(state: dict[str, torch.Tensor]) -> list[str]:
    """Names of the tensors that are those of the initial model, to the last bit."""
    initial = with_first_names(initial_model().state_dict())
    return [name for name, tensor in state.items() if torch.equal(tensor, initial[name])]


def exported_loss(state: dict, step: TrainStep, tp: int, held_out) -> float:
    """Of the weights that an export has, in a model of their own."""
    model = initial_model().eval()
    pad_classifier(model, tp)
    load_weights(model, {name: tensor.float() for name, tensor in state.items()})
    batch = held_out.__getitems__([(0, i) for i in range(13)])
    with torch.no_grad():
        logits = model(pixel_values=step.normalize(batch["pixel_values"])).logits[:, :3]
    return torch.nn.functional.cross_entropy(logits, batch["labels"]).item()


def evaluate(tp=1, pp=1, **changes) -> dict:
    """The validation folder, read as a run does, by a model whose true logits are far below the padding."""
    settings = helpers.settings("--dataset", FOLDER / "images")
    dataset = load_dataset(settings)
    loaded = load_model(str(FOLDER / "model"), dataset.label_names)
    labels = len(dataset.label_names)
    torch.manual_seed(9)
    with torch.no_grad():
        loaded.model.classifier.weight[:labels] = torch.randn(labels, 32) * 0.5
        loaded.model.classifier.bias[:labels] = -100
    resize = Resize(16, int(loaded.processor.resample))
    dataset = plan_decoding(dataset, resize, None, settings).run()
    step, settings = build(loaded.model, tp, pp, **changes)
    step.normalize = Normalize(tuple(loaded.processor.image_mean), tuple(loaded.processor.image_std))
    batches, count = BatchDataset(dataset.validation, resize), len(dataset.validation)
    order = BatchPlan(count, 4, 1, settings.layout, seed=0).evaluation_batches(count)
    result = evaluate_step(step, map(batches.__getitems__, order), count)
    try:
        evaluate_step(step, map(batches.__getitems__, order), count + 1)
    except RuntimeError as error:
        result["wrong_count"] = str(error)
    return result
