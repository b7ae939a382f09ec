"""Parallel layouts: how ranks form data-, tensor- and pipeline-parallel groups. Arithmetic only, no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class ParallelLayout:
    """``world_size`` processes as data parallel x pipeline parallel x tensor parallel.

    Ranks are ordered as in Colossal-AI's hybrid_parallel: data parallel outermost, then pipeline, then
    tensor, so that the ranks of a tensor-parallel group are neighbours.
    """

    world_size: int
    tensor_size: int = 1
    pipeline_size: int = 1
    rank: int = 0

    @property
    def data_parallel_size(self) -> int:
        """Number of data-parallel ranks; each trains on other images."""
        return self.world_size // (self.tensor_size * self.pipeline_size)

    @property
    def tensor_rank(self) -> int:
        return self.rank % self.tensor_size

    @property
    def pipeline_rank(self) -> int:
        return self.rank // self.tensor_size % self.pipeline_size

    @property
    def data_parallel_rank(self) -> int:
        return self.rank // (self.tensor_size * self.pipeline_size)

    @property
    def reports_loss(self) -> bool:
        """Whether this rank adds to global sums of losses: tensor rank 0 of the last stage has the logits."""
        return self.tensor_rank == 0 and self.pipeline_rank == self.pipeline_size - 1

    def problems(self) -> list[str]:
        """Why this layout is impossible, and how to fix it; empty if it is possible."""
        group = self.tensor_size * self.pipeline_size
        if self.world_size % group == 0:
            return []
        return [
            f"--tp_size {self.tensor_size} x --pp_size {self.pipeline_size} = {group} does not divide the "
            f"{self.world_size} process(es): set GPUNUM to a multiple of {group}, or lower TP_SIZE or PP_SIZE"
        ]

    def __str__(self) -> str:
        processes = f"{self.world_size} process{'es' * (self.world_size > 1)}"
        return f"{processes} = dp {self.data_parallel_size} x tp {self.tensor_size} x pp {self.pipeline_size}"


@dataclass(frozen=True)
class MeshSharding:
    """How colossalai.legacy shards parameters in one mode.

    A letter is a dimension of the mesh; "cr" shards a tensor dimension over c, then over r. ``up`` and
    ``down`` are the two linear layers of a pair (qkv and projection, fc1 and fc2), stored as (in, out). In 3D
    two dimensions of the mesh change roles between them.
    """

    mesh: str  # dimensions of the mesh, outermost first
    up: tuple[str, str]
    up_bias: str
    down: tuple[str, str]
    down_bias: str
    norm: str  # LayerNorm weight and bias
    hidden: str  # hidden dimension of the embeddings and the classifier
    batch: tuple[str, ...]  # process groups over which the batch is sharded, innermost first
    same_images: str  # process group of those that hold slices of the same images


MESH_SHARDINGS = {
    "2d": MeshSharding(
        mesh="rc",
        up=("r", "c"),
        up_bias="cr",
        down=("r", "c"),
        down_bias="cr",
        norm="cr",
        hidden="cr",
        batch=("PARALLEL_2D_COL",),
        same_images="PARALLEL_2D_ROW",
    ),
    "2.5d": MeshSharding(
        mesh="drc",
        up=("r", "c"),
        up_bias="c",
        down=("r", "c"),
        down_bias="c",
        norm="c",
        hidden="cr",
        batch=("PARALLEL_2P5D_COL", "PARALLEL_2P5D_DEP"),
        same_images="PARALLEL_2P5D_ROW",
    ),
    "3d": MeshSharding(
        mesh="kji",
        up=("ki", "j"),
        up_bias="j",
        down=("ji", "k"),
        down_bias="k",
        norm="k",
        hidden="k",
        batch=("PARALLEL_3D_INPUT", "PARALLEL_3D_WEIGHT"),
        same_images="PARALLEL_3D_OUTPUT",
    ),
}


@dataclass(frozen=True)
class MeshLayout:
    """``size`` processes as a mesh of ``side`` (q) processes per dimension, in 2.5D ``depth`` times."""

    mode: str
    size: int
    depth: int = 1

    @property
    def side(self) -> int:
        """q, the number of processes per dimension."""
        return round((self.size / self.depth) ** (1 / 3 if self.mode == "3d" else 1 / 2))

    @property
    def batch_parts(self) -> int:
        """Number of shards of the batch of a data-parallel rank."""
        return self.side * (self.side if self.mode == "3d" else self.depth)

    def problems(self) -> list[str]:
        """Why this mesh is impossible, and how to fix it; empty if it is possible."""
        sizes = f"{self.mode} tensor parallelism of size {self.size}"
        if self.mode not in MESH_SHARDINGS:
            return [f"tensor parallel mode {self.mode!r} is none of {', '.join(MESH_SHARDINGS)}"]
        if self.mode != "2.5d" and self.depth != 1:
            return [f"{sizes}: depth {self.depth} is for 2.5d alone: leave it out"]
        fits = self.size > 0 and self.depth > 0 and self.side > 1  # colossalai's SUMMA fails with q = 1
        if self.mode == "2d" and not (fits and self.size == self.side**2):
            return [f"{sizes}: the size must be a square: 4, 9 or 16"]
        if self.mode == "2.5d" and not (fits and self.size == self.depth * self.side**2):
            return [
                f"{sizes} and depth {self.depth}: the size must be depth x a square: depth x 4, depth x 9"
            ]
        if self.mode == "3d" and not (fits and self.size == self.side**3):
            return [f"{sizes}: the size must be a cube: 8, 27 or 64"]
        return []

    def coordinates(self, rank: int) -> dict[str, int]:
        """Coordinate of ``rank`` (within its tensor-parallel group) in each dimension of the mesh."""
        found = {}
        for side in reversed(MESH_SHARDINGS[self.mode].mesh):
            rank, found[side] = divmod(rank, self.depth if side == "d" else self.side)
        return found

    def piece(self, whole: torch.Tensor, cut: tuple[str, ...], rank: int) -> torch.Tensor:
        """View of the shard of the full tensor ``whole`` that ``rank`` holds.

        Args:
            cut: for each tensor dimension, the mesh dimensions over which it is sharded; "": not sharded.
        """
        at = self.coordinates(rank)
        for dim, sides in enumerate(cut):
            index = 0
            for side in sides:
                index = index * self.side + at[side]
            whole = whole.chunk(self.side ** len(sides), dim)[index]
        return whole


def mesh_problems(mode: str, size: int, depth: int, config, batch: int | None = None) -> list[str]:
    """Why a model cannot be sharded over such a mesh, with fixes; empty if it can. Needs no process group.

    Args:
        mode: "2d", "2.5d" or "3d".
        size: processes of a tensor-parallel group.
        depth: layers of the mesh in 2.5D; 1 otherwise.
        config: HuggingFace ViTConfig. Any number of classes is possible.
        batch: images of a data-parallel rank in a micro-step; None: not checked.
    """
    mesh = MeshLayout(mode, size, depth)
    if found := mesh.problems():
        return found
    q = mesh.side
    needs = {
        "hidden size": (config.hidden_size, q * q),
        "MLP size": (config.intermediate_size, q if mode == "2.5d" else q * q),
        "number of heads": (config.num_attention_heads, q),
        "batch of a data-parallel rank": (batch or 0, mesh.batch_parts),
    }
    found = [
        f"{mode} tensor parallelism of size {size}: the {what} {value} is no multiple of {multiple}: "
        f"use {nearest_multiples(value, multiple)}"
        for what, (value, multiple) in needs.items()
        if value % multiple
    ]
    if config.hidden_act != "gelu" or not config.qkv_bias:
        found.append(f"{mode} tensor parallelism supports only ViTs with hidden_act='gelu' and qkv_bias=True")
    return found


def nearest_multiples(value: int, multiple: int) -> str:
    """The multiples of ``multiple`` below and above ``value``, as text for a message."""
    below = value // multiple * multiple
    return f"{below} or {below + multiple}" if below else str(multiple)


def first_stage(layers: int, stages: int) -> int:
    """The layers of the first pipeline stage, as Colossal-AI distributes them: the middle ones get more.

    (colossalai/pipeline/stage_manager.py, distribute_layers, 0.5.0)
    """
    each, more = divmod(layers, stages)
    return each + (0 < more and stages // 2 == more // 2)


def freeze_problem(freeze: str | None, stages: int, layers: int | None) -> str:
    """Why --freeze does not fit a model of so many layers; empty if it does. None: they are not known yet."""
    if freeze is None or not (freeze == "backbone" or freeze.isdecimal()):
        return ""
    if freeze != "backbone" and layers is not None and int(freeze) > layers:
        return f"--freeze {freeze}: the model has {layers} layers; use at most {layers}, or backbone"
    first = first_stage(layers, stages) if layers is not None else 0
    if stages == 1 or freeze != "backbone" and (layers is None or int(freeze) < first):
        return ""
    # the backward pass sends it no gradient, and it waits for one
    reason = f"the first of {stages} pipeline stages would have nothing to train"
    most = f"--freeze {first - 1} or less, or " if first else ""
    return f"--freeze {freeze}: {reason}; use {most}PP_SIZE=1"
