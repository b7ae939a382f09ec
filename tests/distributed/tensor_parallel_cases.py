"""Runs the cases of test_tensor_parallel.py: forks the processes of each, and writes what they saw as JSON.

    python tests/distributed/tensor_parallel_cases.py OUT.json [--steps 20] [--only NAME ...]

The libraries are imported once, before the forks: eight imports would take longer than all the steps. Every
case
has new processes, as the library keeps its process groups for good.
"""

import argparse
import copy
import json
import os
import socket
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parents[2]), str(Path(__file__).resolve().parents[1])]
os.environ["CUDA_VISIBLE_DEVICES"] = ""
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = "1"  # its helper process does not survive a fork

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from transformers import ViTConfig

from vit.distributed import destroy_distributed, init_distributed
from vit.initial_weights import build_vit
from vit.layout import MESH_SHARDINGS
from vit.modules import branch_dropouts, numbered_layers, with_first_names
from vit.parallel.mesh import GatherBatch, gather_state_dict, init_mesh, load_mesh_vit, process_group
from vit.parallel.mesh_train import MeshOptimizer, clip_grad_norm_, sync_gradients
from vit.patches.colossalai_legacy import patch_legacy_layers

torch.set_num_threads(1)


@dataclass(frozen=True)
class Case:
    mode: str
    size: int
    depth: int = 1
    processes: int = 4
    side: int = 2  # of the mesh

    @property
    def images(self) -> int:
        return 16 if self.side == 2 else 18


CASES = {
    "2d": Case("2d", 4),
    "2.5d": Case("2.5d", 4),
    "2.5d depth 2": Case("2.5d", 8, 2, 8),
    "3d": Case("3d", 8, 1, 8),
    "2d x data parallel": Case("2d", 4, 1, 8),
    "2d of 9": Case("2d", 9, 1, 9, 3),  # a side of 2 would hide a wrong turn of SUMMA's buffers
}
QUICK = [name for name, case in CASES.items() if case.side == 2]
CLASSES, LR, WEIGHT_DECAY = 5, 1e-3, 0.05  # 5 classes: no mode divides them
BF16_STEPS = 5


def config(side: int, dropout: float = 0.0) -> ViTConfig:
    width, heads = (32, 4) if side == 2 else (36, 6)
    return ViTConfig(
        image_size=16,
        patch_size=4,
        hidden_size=width,
        num_hidden_layers=2,
        num_attention_heads=heads,
        intermediate_size=2 * width,
        num_labels=CLASSES,
        hidden_dropout_prob=dropout,
        attention_probs_dropout_prob=dropout,
    )


def weights_of(model) -> dict[str, torch.Tensor]:
    return with_first_names(model.state_dict())


def serial_model(side: int) -> torch.nn.Module:
    """The same on every process.

    Biases and LayerNorms are moved off 0 and 1, where a wrong slice would not show.
    """
    generator = torch.Generator().manual_seed(0)
    model = build_vit(config(side))
    with torch.no_grad():
        for name, param in sorted(with_first_names(dict(model.named_parameters())).items()):
            noise = torch.randn(param.shape, generator=generator)
            if "layernorm" in name and name.endswith("weight"):
                param.copy_(1 + 0.1 * noise)
            else:
                param.copy_(noise * (0.02 if param.ndim == 1 else 0.1))
    return model


def batch(step: int, images: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Four batches in turn, so that the loss falls."""
    generator = torch.Generator().manual_seed(1 + step % 4)
    return torch.randn(images, 3, 16, 16, generator=generator), torch.randint(
        CLASSES, (images,), generator=generator
    )


def autocast(dtype):
    return torch.autocast("cpu", dtype=dtype, enabled=dtype is not None)


def lists(state: dict[str, torch.Tensor]) -> dict[str, list[float]]:
    return {name: tensor.flatten().tolist() for name, tensor in state.items()}


def run_serial(case: Case, steps: int, dtype=None) -> dict:
    """What every mode is measured against: HuggingFace's model, torch's AdamW and clipping, one process."""
    model = serial_model(case.side)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, weight_decay=WEIGHT_DECAY)
    seen = {"loss": [], "norm": []}
    model.eval()
    with torch.no_grad():
        seen["logits"] = model(batch(99, case.images)[0]).logits.tolist()
    model.train()
    for step in range(steps):
        images, labels = batch(step, case.images)
        with autocast(dtype):
            logits = model(images).logits
        loss = F.cross_entropy(logits.float(), labels, reduction="sum") / case.images
        loss.backward()
        if step == 0:
            seen["grads"] = lists(
                with_first_names({name: param.grad for name, param in model.named_parameters()})
            )
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        seen["loss"].append(loss.item())
        seen["norm"].append(norm.item())
        if step == 0:
            seen["weights"] = lists(weights_of(model))
    return seen


class Run:
    """One case, from the same weights and data as `run_serial`."""

    def __init__(self, case: Case, dropout: float = 0.0, drop_path: float = 0.0):
        init_mesh(case.mode, case.size, case.depth, seed=3)
        self.case = case
        self.dp, self.dp_rank = dist.get_world_size() // case.size, dist.get_rank() // case.size
        state = weights_of(serial_model(case.side))
        self.model = load_mesh_vit(config(case.side, dropout), state, drop_path)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=LR, weight_decay=WEIGHT_DECAY)

    def mine(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.chunk(self.dp)[self.dp_rank]

    def backward(self, step: int, dtype=None, pieces: int = 1) -> float:
        """The loss over all images; each gradient is a slice of the serial one afterwards."""
        images, labels = batch(step, self.case.images)
        total = torch.zeros(())
        for some, theirs in zip(self.mine(images).chunk(pieces), self.mine(labels).chunk(pieces)):
            with autocast(dtype):
                logits = self.model(pixel_values=some).logits
            loss = F.cross_entropy(logits.float(), theirs, reduction="sum") * (self.dp / self.case.images)
            loss.backward()
            total += loss.detach() / self.dp
        sync_gradients(self.model)
        dist.all_reduce(total, group=process_group("DATA"))
        return total.item()

    def step(self, step: int, dtype=None, pieces: int = 1) -> tuple[float, float]:
        loss = self.backward(step, dtype, pieces)
        norm = clip_grad_norm_(self.model, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss, norm.item()

    def logits(self) -> torch.Tensor:
        self.model.eval()
        with torch.no_grad():
            mine = self.model(pixel_values=self.mine(batch(99, self.case.images)[0])).logits
        self.model.train()
        everyone = [torch.empty_like(mine) for _ in range(self.dp)]
        dist.all_gather(everyone, mine, group=process_group("DATA"))
        return torch.cat(everyone)

    def copies_differ(self) -> float:
        """The most by which any process's slice differs from that of the gathered whole."""
        whole = [gather_state_dict(self.model)]
        dist.broadcast_object_list(whole, src=0)
        mine = {name: param.detach().clone() for name, param in self.model.named_parameters()}
        fresh = load_mesh_vit(self.model.config, whole[0])
        gaps = [(param.detach() - mine[name]).abs().max() for name, param in fresh.named_parameters()]
        worst = torch.stack(gaps).max()
        dist.all_reduce(worst, op=dist.ReduceOp.MAX)
        return worst.item()


class Factors(torch.nn.Module):
    """Multiplies by the next of ``factors`` in each call."""

    def __init__(self, factors):
        super().__init__()
        self.factors = iter(factors)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * next(self.factors)


def dropped_paths(case: Case) -> dict:
    """How far the logits are from those of the serial model that drops the same paths of the same images."""
    run, drawn = Run(case, drop_path=0.6), []
    draw = run.model.draw_kept_branches
    run.model.draw_kept_branches = lambda x: drawn.append(draw(x)) or drawn[-1]
    images = run.mine(batch(0, case.images)[0])
    logits = run.model(pixel_values=images).logits
    per_image = drawn[0].movedim(2, 0)  # (images, layers, 2, 1, 1)
    per_image = GatherBatch.apply(per_image, MESH_SHARDINGS[case.mode].batch)
    serial = serial_model(case.side)
    for number, layer in numbered_layers(serial).items():
        factors = Factors(per_image[:, number].unbind(1))
        for module in branch_dropouts(layer):
            module.dropout = factors
    return {
        "gap": (logits - serial(images).logits).abs().max().item(),
        "factors": sorted(set(per_image.flatten().tolist())),
    }


def agree(value) -> bool:
    """Whether all processes have the same."""
    everyone = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, value)
    return all(other == everyone[0] for other in everyone)


def refusal(error: type[Exception], call) -> str | None:
    """The message with which ``call`` raises ``error``."""
    try:
        call()
    except error as e:
        return str(e)


def overflow(case: Case) -> list | None:
    """[loss scale, whether the weights moved] after a step in which one slice overflows, then after one in
    which none does.

    None: not the same on every process.
    """
    run, seen = Run(case), []
    optimizer = MeshOptimizer(run.optimizer, fp16=True, model=run.model)
    weight = run.model.blocks[0].fc1.weight
    images, labels = (run.mine(tensor) for tensor in batch(0, case.images))
    for step in range(2):
        before = weight.detach().clone()
        optimizer.backward(F.cross_entropy(run.model(pixel_values=images).logits, labels))
        if step == 0 and dist.get_rank() == case.processes - 1:
            weight.grad[0, 0] = torch.inf
        optimizer.clip_grad_by_norm(1.0)
        optimizer.step()
        optimizer.zero_grad()
        seen.append([optimizer.scaler.get_scale(), not torch.equal(weight, before)])
    return seen if agree(seen) else None


def run_case(case: Case, steps: int) -> dict:
    run, seen = Run(case), {"loss": [], "norm": []}
    serial, start = weights_of(serial_model(case.side)), gather_state_dict(run.model)
    if start is not None:
        seen["round trip"] = start.keys() == serial.keys() and all(
            torch.equal(start[k], serial[k]) for k in serial
        )
    logits = run.logits().tolist()
    run.backward(0)
    grads = gather_state_dict(run.model, {name: param.grad for name, param in run.model.named_parameters()})
    run.optimizer.zero_grad()
    for step in range(steps):
        loss, norm = run.step(step)
        seen["loss"].append(loss)
        seen["norm"].append(norm)
        if step == 0:
            weights = gather_state_dict(run.model)
    seen["same everywhere"] = agree((seen["loss"], seen["norm"], logits))
    seen["copies differ"] = run.copies_differ()
    seen["logits"] = logits
    if grads is not None:
        seen["grads"], seen["weights"] = lists(grads), lists(weights)

    seen["accumulated"] = Run(case).step(0, pieces=2)  # two micro-steps are one step

    # resume: slices, optimizer and random state give the same steps again, bit for bit, with draws
    run = Run(case, dropout=0.1, drop_path=0.3)
    run.step(0)
    saved = copy.deepcopy((run.model.state_dict(), run.optimizer.state_dict(), torch.get_rng_state()))
    ahead = [run.step(1), run.step(2)]
    run = Run(case, dropout=0.1, drop_path=0.3)
    run.model.load_state_dict(saved[0])
    run.optimizer.load_state_dict(saved[1])
    torch.set_rng_state(saved[2])
    again = [run.step(1), run.step(2)]
    seen["resumed"] = agree(again == ahead) and again == ahead
    run = Run(case, dropout=0.1)
    seen["dropout"] = [run.backward(0), run.backward(0)]
    seen["dropped paths"] = dropped_paths(case)

    run = Run(case)
    bf16 = [run.step(step, torch.bfloat16) for step in range(BF16_STEPS)]
    seen["bf16"] = {"loss": [loss for loss, _ in bf16], "norm": [norm for _, norm in bf16]}

    seen["overflow"] = overflow(case)

    lacking = {name: tensor for name, tensor in serial.items() if name != "vit.layernorm.bias"}
    seen["refusals"] = [
        refusal(ValueError, lambda: load_mesh_vit(run.model.config, lacking)),
        refusal(ValueError, lambda: run.model(torch.zeros(3, 3, 16, 16))),
        refusal(
            RuntimeError,
            lambda: init_mesh(*("2.5d" if case.mode == "2d" else "2d", 4 if case.side == 2 else 9)),
        ),
        refusal(ValueError, lambda: init_mesh("2d", 100)),
    ]
    return seen


def worker(rank: int, port: int, name: str, steps: int, out: Path) -> None:
    case = CASES[name]
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(case.processes))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    init_distributed(0)
    seen = run_case(case, steps)
    if rank == 0:
        out.write_text(json.dumps(seen))
    destroy_distributed()


def serial_worker(rank: int, name: str, steps: int, out: Path) -> None:
    case = CASES[name]
    out.write_text(json.dumps([run_serial(case, steps), run_serial(case, BF16_STEPS, torch.bfloat16)]))


def fork(run, processes: int, *args) -> object:
    """What the first of the processes wrote to its last argument."""
    mp.start_processes(run, args, nprocs=processes, start_method="fork")
    return json.loads(args[-1].read_text())


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("out", type=Path)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--only", nargs="+", default=QUICK, choices=list(CASES))
    args = parser.parse_args()
    patch_legacy_layers()
    part, seen, serial = args.out.with_suffix(".part"), {}, {}
    for name in args.only:
        side = CASES[name].side
        if side not in serial:  # in a process of its own too: autograd's threads do not survive a fork
            serial[side] = fork(serial_worker, 1, name, args.steps, part)
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        seen[name] = fork(worker, CASES[name].processes, port, name, args.steps, part)
        seen[name]["serial"], seen[name]["serial bf16"] = serial[side]
    part.unlink()
    args.out.write_text(json.dumps(seen))


if __name__ == "__main__":
    main()
