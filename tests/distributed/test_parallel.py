"""Every plugin and layout trains, evaluates and accumulates as a plain PyTorch loop does."""

import copy
import functools

import cases
import peft
import pytest
import torch
import torch.nn.functional as F
from helpers import (
    CLASS_WEIGHTS,
    EMA,
    LABEL_SMOOTHING,
    LAYER_DECAY,
    LEARNING_RATES,
    LORA,
    MAX_NORM,
    WEIGHT_DECAY,
    in_memory_images,
    tiny_vit,
)

from vit.layout import ParallelLayout
from vit.modules import with_first_names
from vit.schedule import BatchPlan

# Largest difference of a loss (values near 1) over six steps, measured: fp32 1e-6, fp16 1.5e-4, bf16 1.2e-3.
# A wrong learning rate, clip or average moves the losses by 1e-2 or more.
BOUNDS = {"fp32": 2e-5, "fp16": 5e-4, "bf16": 2.5e-3}

LORA_TARGETS = ["query", "value", "q_proj", "v_proj"]  # the latter since transformers 5.9

NAMES = {processes: cases.names(processes) for processes in (1, 2, 4)}
EVERY = [(processes, name) for processes, names in NAMES.items() for name in names]


def is_frozen(name: str, freeze: str | None) -> bool:
    """``freeze``: "backbone", or "1": the embeddings and the first layer."""
    if freeze == "backbone":
        return not name.startswith("classifier.")
    first = ("vit.embeddings.", "vit.encoder.layer.0.", "vit.layers.0.")
    return freeze == "1" and name.startswith(first)


def parameter_groups(model, recipe: bool) -> list[dict]:
    """For AdamW; with ``recipe`` a group for each parameter, with the ``scale`` of its learning rate."""
    decayed = [p for n, p in model.named_parameters() if n.endswith("weight") and "layernorm" not in n]
    others = [p for p in model.parameters() if all(p is not q for q in decayed)]
    if not recipe:
        return [{"params": decayed, "weight_decay": WEIGHT_DECAY}, {"params": others, "weight_decay": 0.0}]
    below = {"classifier": 0, "vit.layernorm": 0, "vit.embeddings": 5} | {
        f"vit.{layers}.{i}.": 4 - i for layers in ("encoder.layer", "layers") for i in range(4)
    }
    groups = [
        {
            "params": [p],
            "weight_decay": WEIGHT_DECAY * any(p is q for q in decayed),
            "scale": LAYER_DECAY**count,
        }
        for n, p in model.named_parameters()
        for prefix, count in below.items()
        if n.startswith(prefix)
    ]
    assert len(groups) == len(list(model.parameters()))
    return groups


@functools.cache
def plain_training(
    max_norm: float, recipe: bool = False, weighted: bool = False, freeze=None, lora=False
) -> dict:
    """The same training without Colossal-AI and without our engine: batches of up to 8 images, AdamW,
    clipping.

    ``recipe``: label smoothing, learning rates that fall from layer to layer, and evaluation of averaged
    weights. ``weighted``: label smoothing and class weights. ``freeze``: what gets no gradient. ``lora``: by
    PEFT alone.
    """
    smoothing = LABEL_SMOOTHING * (recipe or weighted)
    weights = torch.tensor(CLASS_WEIGHTS if weighted else [1.0] * 3)
    train, held_out = in_memory_images(22), in_memory_images(13, seed=2)

    def batch(split, chosen):
        pixels = torch.stack([torch.from_numpy(split.cached_pixels[i]) for i in chosen]).float() / 255
        return (pixels - 0.5) / 0.5, torch.from_numpy(split.labels[chosen])

    torch.manual_seed(0)
    model = tiny_vit(3)
    for n, p in model.named_parameters():
        p.requires_grad_(not is_frozen(n, freeze))
    if lora:
        torch.manual_seed(0)
        peft.get_peft_model(model, peft.LoraConfig(**LORA, target_modules=LORA_TARGETS))  # in place
        model.classifier.requires_grad_(True)
    optimizer, average = torch.optim.AdamW(parameter_groups(model, recipe)), copy.deepcopy(model)
    rates, losses, evaluations, norms = iter(LEARNING_RATES), [], [], []
    for epoch in range(2):
        order = [
            image
            for step in BatchPlan(22, 8, 1, ParallelLayout(1), 5).batches(epoch)
            for _, image in step
            if image >= 0
        ]
        for start in (0, 8, 16):
            x, y = batch(train, order[start : start + 8])
            rate = next(rates)
            for group in optimizer.param_groups:
                group["lr"] = rate * group.get("scale", 1)
            logits = model(pixel_values=x).logits
            loss = F.cross_entropy(logits, y, weights, reduction="sum", label_smoothing=smoothing) / len(y)
            optimizer.zero_grad()
            loss.backward()
            norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm or float("inf")).item())
            optimizer.step()
            losses.append(loss.item())
            with torch.no_grad():
                for mean, now in zip(average.parameters(), model.parameters()):
                    mean.copy_(EMA * mean + (1 - EMA) * now if recipe else now)
        with torch.no_grad():
            x, y = batch(held_out, list(range(13)))
            logits = average(pixel_values=x).logits
        accuracy = (logits.argmax(-1) == y).float().mean().item()
        evaluations.append((F.cross_entropy(logits, y).item(), accuracy))
    return {"losses": losses, "evaluations": evaluations, "norms": norms}


def bound(name: str) -> float:
    return BOUNDS[name.split()[-1]] if name.split()[-1] in BOUNDS else BOUNDS["fp32"]


def assert_same(result: dict, expected: dict, tolerance: float) -> None:
    assert result["losses"] == pytest.approx(expected["losses"], abs=tolerance)
    for evaluation, (loss, _) in zip(result["evaluations"], expected["evaluations"], strict=True):
        assert evaluation["average_loss"] == pytest.approx(loss, abs=tolerance)
        assert evaluation["images"] == 13


def test_the_clipping_compared_below_is_active_in_some_steps_only():
    clipped = [norm > MAX_NORM for norm in plain_training(MAX_NORM)["norms"]]
    assert any(clipped) and not all(clipped)
    difference = [abs(a - b) for a, b in zip(plain_training(0)["losses"], plain_training(MAX_NORM)["losses"])]
    assert max(difference) > 4 * BOUNDS["bf16"]


@pytest.mark.parametrize(
    "processes, name", [(n, c) for n, c in EVERY if n < 4 and (c[-2:] != "16" or "gemini" in c)]
)
def test_losses_equal_plain_pytorch(launched, processes, name):
    assert_same(launched(processes)[f"train {name}"], plain_training(0), bound(name))


@pytest.mark.parametrize("processes, name", EVERY)
def test_losses_with_clipping_equal_plain_pytorch(launched, processes, name):
    assert_same(launched(processes)[f"train {name}, clipped"], plain_training(MAX_NORM), bound(name))


@pytest.mark.parametrize("processes, name", EVERY)
def test_two_micro_steps_of_half_the_batch_equal_one_step(launched, processes, name):
    assert_same(launched(processes)[f"train {name}, accumulated"], plain_training(MAX_NORM), bound(name))


@pytest.mark.parametrize(
    "processes, name", [case for case in EVERY if "pp2 zero1" not in case[1]]
)  # refused: args.py
def test_layer_decay_weight_average_and_label_smoothing_equal_plain_pytorch(launched, processes, name):
    expected = plain_training(MAX_NORM, recipe=True)
    # that each of the three is seen: none of these losses is the plain training's
    assert min(
        abs(a - b) for a, b in zip(expected["losses"], plain_training(MAX_NORM)["losses"])
    ) > 2 * bound(name)
    result = launched(processes)[f"train {name}, recipe"]
    assert_same(result, expected, bound(name))
    # what is exported is what was evaluated; 16-bit weights round the same averages on their way
    assert result["exported"] == pytest.approx(result["evaluations"][-1]["average_loss"], abs=bound(name))


@pytest.mark.parametrize("processes, name", EVERY)
def test_class_weights_with_label_smoothing_equal_plain_pytorch_divided_by_images(launched, processes, name):
    """Accumulated over two micro-steps; the last step of an epoch has 6 of 8 images."""
    expected, tolerance = plain_training(MAX_NORM, weighted=True), 1.5 * bound(name)  # losses are larger
    plain = plain_training(MAX_NORM)["losses"]
    assert min(abs(a - b) for a, b in zip(expected["losses"], plain)) > 2 * tolerance
    assert_same(launched(processes)[f"options {name}, weighted"], expected, tolerance)


WITH_LORA = [(n, name) for n in NAMES for name, case in cases.plain_cases(n).items() if cases.has_lora(case)]


@pytest.mark.parametrize("processes, name", WITH_LORA)
def test_lora_equals_plain_pytorch_with_peft_and_is_exported_merged(launched, processes, name):
    """With layer decay, weight average and label smoothing, in two micro-steps."""
    expected = plain_training(0, True, lora=True)
    probe = plain_training(0, True, freeze="backbone")["losses"]  # LoRA's part is seen
    assert max(abs(a - b) for a, b in zip(expected["losses"], probe)) > 4 * bound(name)
    result = launched(processes)[f"options {name}, lora"]
    assert_same(result, expected, bound(name))
    # what is exported has no LoRA, and is what was evaluated
    assert result["exported"] == pytest.approx(result["evaluations"][-1]["average_loss"], abs=bound(name))
    names = with_first_names(tiny_vit(3).state_dict())
    trained = {n for n in names if n.endswith(("query.weight", "value.weight")) or "classifier" in n}
    assert set(result["unchanged"]) == names.keys() - trained  # to the last bit, also in 16 bit
    count = 3 * 32 + 3 + 2 * 4 * LORA["r"] * (32 + 32)
    assert count <= result["moments"] <= (count + 64) * processes


FROZEN = [(processes, name, freeze) for processes, name in EVERY for freeze in cases.freezes(name)]


@pytest.mark.parametrize("processes, name, freeze", FROZEN)
def test_frozen_parameters_keep_every_bit_and_the_others_train_as_in_plain_pytorch(
    launched, processes, name, freeze
):
    """With layer decay, weight average, label smoothing and clipping."""
    expected, whole = (plain_training(MAX_NORM, True, freeze=what)["losses"] for what in (freeze, None))
    assert max(abs(a - b) for a, b in zip(expected, whole)) > 2 * bound(name)
    result = launched(processes)[f"options {name}, frozen {freeze}"]
    assert_same(result, plain_training(MAX_NORM, True, freeze=freeze), bound(name))
    assert result["exported"] == pytest.approx(result["evaluations"][-1]["average_loss"], abs=bound(name))
    model = tiny_vit(3)
    names = with_first_names(model.state_dict())  # as exported
    frozen, unchanged = {n for n in names if is_frozen(n, freeze)}, set(result["unchanged"])
    assert frozen <= unchanged
    # in bf16 a LayerNorm's ones are rounded to ones again
    assert all("bf16" in name and "layernorm" in tensor for tensor in unchanged - frozen)
    # no optimizer state for what is frozen; some plugins pad what they cut
    trained = sum(p.numel() for n, p in model.named_parameters() if not is_frozen(n, freeze))
    assert trained <= result["moments"] <= (trained + 64) * processes
    assert result["moments"] == trained * processes or not name.startswith("ddp")


@pytest.mark.parametrize(
    "processes, name",
    [
        (1, "ddp"),
        (1, "zero1"),
        (1, "gemini bf16"),
        (1, "hybrid"),
        (2, "ddp"),
        (2, "zero1"),
        (2, "gemini bf16"),
        (2, "tp2"),
        (2, "pp2"),
    ],
)
def test_gradient_checkpointing_changes_nothing(launched, processes, name):
    plain, recomputed = launched(processes)[f"train {name}"], launched(processes)[f"train {name}, recomputed"]
    assert recomputed["losses"] == pytest.approx(plain["losses"], abs=1e-6)


@pytest.mark.parametrize("processes, name", [(n, name) for n in (1, 2) for name in cases.PATCHED[n]])
def test_patched_steps_of_the_optimizers_are_those_of_the_library(launched, processes, name):
    """With clipping. Norms are added up in another order, so that 16-bit weights may be rounded otherwise."""
    patched, library = (launched(processes)[case] for case in (f"train {name}, clipped", f"library {name}"))
    assert patched["losses"] == pytest.approx(library["losses"], abs=1e-6 if "16" not in name else 1e-3)


@pytest.mark.parametrize("processes", [1])
def test_gemini_needs_no_hooks_of_operations(launched, processes):
    found = launched(processes)["hooks of gemini"]
    assert found["usual"]["hooks"] == 0
    assert found["switched off"]["hooks"] > 100
    assert found["usual"]["copied alone"] < found["switched off"]["copied alone"] / 2
    assert found["usual"]["freed"], "the hooks keep the weights alive"
    assert found["usual"]["losses"] == found["switched off"]["losses"]
    assert found["usual"]["evaluations"] == found["switched off"]["evaluations"]


@pytest.mark.parametrize("processes", [2, 4])
def test_zero_sends_during_the_backward_pass_and_the_update(launched, processes):
    result = launched(processes)["reduced early"]
    assert_same(result, plain_training(0), BOUNDS["fp32"])
    assert min(result["sent"]) > 3, "buckets, before the end of a backward pass"
    assert min(result["shared"]) > 3, "buckets, before the end of an update"
    assert result["freed"], "the hooks keep the optimizer, and with it the gradients, alive"


@pytest.mark.parametrize("processes, name", [(n, name) for n in (1, 2) for name in cases.WRAPPED[n]])
def test_ddp_wraps_a_model_only_where_there_are_gradients_to_reduce(launched, processes, name):
    assert launched(processes)[f"wrapped {name}"] is cases.WRAPPED[processes][name]


@pytest.mark.parametrize("processes, kind", [(1, "WholeChunk"), (2, "SteadyShard")])
def test_gemini_trains_the_same_with_chunks_that_keep_their_memory(launched, processes, kind):
    result = launched(processes)["steady gemini"]
    steady, usual = result["steady"], result["usual"]
    assert (steady["kinds"], steady["kept"]) == ([kind], True)
    assert (usual["kinds"], usual["kept"]) == (["Chunk"], False)
    assert steady["losses"] == usual["losses"] and steady["losses"][-1] < steady["losses"][0]


@pytest.mark.parametrize("k", [1, 2])
@pytest.mark.parametrize("processes, name", [(n, name) for n in (1, 2) for name in ("gemini", "zero1")])
def test_a_step_that_overflowed_changes_nothing(launched, processes, name, k):
    """In fp16, with k micro-batches a step."""
    found = launched(processes)[f"overflowed {name} k{k}"]
    assert found["with"][1:] == pytest.approx(found["without"], abs=1e-6)
    assert found["without"][-1] < found["without"][0] - 0.1, "later steps are not skipped"


EVALUATIONS = [
    (1, "ddp"),
    (1, "zero1"),
    (1, "hybrid"),
    (2, "ddp"),
    (2, "zero1"),
    (2, "tp2"),
    (2, "pp2"),
    (4, "ddp"),
    (4, "tp4"),
    (4, "pp4"),
    (4, "tp2 pp2"),
    (4, "dp2 pp2"),
]


@pytest.fixture(scope="module")
def plain_evaluation(shared):
    """Loss, accuracy and count over the 13 validation files, by transformers alone."""
    from PIL import Image
    from transformers import AutoImageProcessor, ViTForImageClassification

    files = sorted((shared / "images" / "validation").glob("*/*.png"))
    classes = sorted({path.parent.name for path in files})
    model = ViTForImageClassification.from_pretrained(
        shared / "model", num_labels=3, ignore_mismatched_sizes=True
    ).eval()
    torch.manual_seed(9)
    with torch.no_grad():
        model.classifier.weight[:] = torch.randn(3, 32) * 0.5
        model.classifier.bias[:] = -100
    processor = AutoImageProcessor.from_pretrained(shared / "model", use_fast=False)
    inputs = processor([Image.open(path).convert("RGB") for path in files], return_tensors="pt")
    labels = torch.tensor([classes.index(path.parent.name) for path in files])
    with torch.no_grad():
        logits = model(**inputs).logits
    return F.cross_entropy(logits, labels).item(), (logits.argmax(-1) == labels).sum().item(), len(files)


@pytest.mark.parametrize("processes, name", EVALUATIONS)
def test_evaluation_equals_transformers_and_never_predicts_padding(
    launched, plain_evaluation, processes, name
):
    loss, correct, count = plain_evaluation
    result = launched(processes)[f"evaluate {name}"]
    assert result["images"] == count == 13
    # with tp 2 and 4 there is a padding logit of 0 beside true ones near -100: it must not win, nor enter
    # the loss
    assert result["accuracy"] == correct / count and 0 < correct < count
    assert result["average_loss"] == pytest.approx(loss, abs=1e-4)


@pytest.mark.parametrize("processes, name", EVALUATIONS)
def test_evaluation_that_misses_an_image_is_an_error(launched, processes, name):
    assert (
        launched(processes)[f"evaluate {name}"]["wrong_count"] == "evaluation counted 13 images instead of 14"
    )


def test_muon_trains_alike_on_two_processes_in_fp16_and_from_a_checkpoint(one, two):
    """It is compared with its papers in test_muon.py."""
    expected = one["options muon"]
    assert_same(two["options muon"], as_pairs(expected), BOUNDS["fp32"])
    assert_same(one["options muon fp16"], as_pairs(expected), BOUNDS["fp16"])
    loaded = two["options muon, loaded"]
    assert loaded["losses"] == pytest.approx(expected["losses"][3:], abs=BOUNDS["fp32"])
    by_adamw = one["train ddp, recipe"]["losses"]
    assert abs(expected["losses"][-1] - by_adamw[-1]) > 10 * BOUNDS["fp16"]  # or AdamW trained both


def as_pairs(result: dict) -> dict:
    """A result of `train` as `plain_training` returns it."""
    evaluations = [(row["average_loss"], row["accuracy"]) for row in result["evaluations"]]
    return {"losses": result["losses"], "evaluations": evaluations}
