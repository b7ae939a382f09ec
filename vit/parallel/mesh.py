"""A ViT in 2D, 2.5D and 3D tensor parallelism, of layers of `colossalai.legacy` (without its engine).

    init_mesh("2d", size=4)                    # on every process; world size = data parallel x size
    model = load_mesh_vit(config, state_dict)  # this process's shards of a HuggingFace state dict
    logits = model(pixel_values).logits        # of the full batch, on every process of the group
    (F.cross_entropy(logits, labels, reduction="sum") * scale).backward()
    sync_gradients(model)                      # once per step, after the last micro-step
    norm = clip_grad_norm_(model, 1.0)
    optimizer.step()
    state_dict = gather_state_dict(model)      # the full model, on rank 0

Matrices and activations are sharded over a mesh with q processes per dimension (2.5D: d layers of such
meshes). For B images per data-parallel rank, hidden size h and s tokens, each process holds

    2d     q x q        activations (B/q,    s, h/q)   matrices 1/q^2   Xu et al., 2021, arXiv:2104.05343
    2.5d   d x q x q    activations (B/(dq), s, h/q)   matrices 1/q^2   Wang et al., 2021, arXiv:2105.14500
    3d     q x q x q    activations (B/q^2,  s, h/q)   matrices 1/q^3   Bian et al., 2021, arXiv:2105.14450

No activation is held twice, so each process draws its own dropout masks; which images drop a path is drawn
once for all slices of an image. Some small parameters are held by several processes: `sync_gradients` keeps
the copies equal, and `grad_norm` counts them once. The classifier is sharded along the hidden size alone, so
any number of classes fits without padding.
"""

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from vit.distributed import init_distributed
from vit.layout import MESH_SHARDINGS, MeshLayout, mesh_problems
from vit.patches.colossalai_legacy import patch_legacy_layers

_mesh: MeshLayout | None = None  # of this process, after `init_mesh`


def process_group(name: str):
    """Process group of colossalai.legacy by its name, such as TENSOR, DATA or PARALLEL_2D_COL."""
    from colossalai.legacy.context import ParallelMode
    from colossalai.legacy.core import global_context

    return global_context.get_group(ParallelMode[name])


def init_mesh(mode: str, size: int, depth: int = 1, seed: int = 0) -> None:
    """Form the process groups of data parallel x ``mode`` mesh, data parallel outermost. Collective.

    Joins the process group of the launch if needed. Afterwards each process is seeded with ``seed`` + rank,
    for dropout. A process can do this once, because colossalai.legacy never frees its groups; later calls
    only seed.

    Raises:
        ValueError: size and depth do not fit the mode, or size does not divide the number of processes.
        RuntimeError: called before with other sizes.
    """
    global _mesh
    mesh = MeshLayout(mode, size, depth)
    if found := mesh.problems():
        raise ValueError("; ".join(found))
    if not dist.is_initialized():
        init_distributed(seed)
    rank, world = dist.get_rank(), dist.get_world_size()
    if world % size:
        raise ValueError(f"tensor parallel size {size} does not divide the {world} process(es)")
    if _mesh not in (None, mesh):
        raise RuntimeError(f"this process is part of {_mesh} already")
    patch_legacy_layers()
    torch.manual_seed(seed + rank)
    if _mesh == mesh:
        return
    from colossalai.legacy.context import ParallelMode
    from colossalai.legacy.core import global_context as gpc

    ranks = list(range(world))
    cpu_group = dist.group.WORLD if dist.get_backend() == "gloo" else dist.new_group(ranks, backend="gloo")
    gpc._register_dist(rank, world, dist.group.WORLD, cpu_group, ranks, ParallelMode.GLOBAL)
    gpc.add_global_rank(ParallelMode.GLOBAL, rank)
    tensor = {"mode": mode, "size": size, **({"depth": depth} if mode == "2.5d" else {})}
    gpc.load_config({"parallel": {"pipeline": 1, "tensor": tensor}})
    gpc.init_parallel_groups()
    _mesh = mesh


class GatherBatch(torch.autograd.Function):
    """Gathers logits (B / shards, classes) to (B, classes) on every process.

    Every process computes the same loss from them, so its own rows of the gradient are complete: the backward
    pass sums nothing.
    """

    @staticmethod
    def forward(ctx, rows, names):
        ctx.groups = [process_group(name) for name in names]
        for group in ctx.groups:
            pieces = [torch.empty_like(rows) for _ in range(group.size())]
            dist.all_gather(pieces, rows.contiguous(), group=group)
            rows = torch.cat(pieces)
        return rows

    @staticmethod
    def backward(ctx, grad):
        for group in reversed(ctx.groups):
            grad = grad.chunk(group.size())[group.rank()]
        return grad.contiguous(), None


class _Block(nn.Module):
    """Pre-LayerNorm transformer block; each process has heads / q attention heads."""

    def __init__(self, config, linear, norm, heads: int):
        super().__init__()
        width, eps = config.hidden_size, config.layer_norm_eps
        self.heads = heads
        self.dropout, self.attention_dropout = config.hidden_dropout_prob, config.attention_probs_dropout_prob
        # The order matters: Linear3D layers alternate between two roles in the order of construction.
        self.layernorm_before = norm(width, eps=eps)
        self.qkv = linear(width, 3 * width)  # one product and one communication instead of three
        self.projection = linear(width, width)
        self.layernorm_after = norm(width, eps=eps)
        self.fc1 = linear(width, config.intermediate_size)
        self.fc2 = linear(config.intermediate_size, width)

    def forward(self, x: torch.Tensor, kept: torch.Tensor | None, tokens: int | None) -> torch.Tensor:
        """(images, all tokens, hidden / q) -> (images, the first ``tokens``, hidden / q); None: all

        ``kept`` (2, images, 1, 1): factors of the images' attention and MLP branches; None: all are 1.
        """
        attention, mlp = (1, 1) if kept is None else kept
        qkv = self.qkv(_in_fp32(self.layernorm_before, x)).unflatten(-1, (3, self.heads, -1))
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each (images, heads, tokens, head size)
        p = self.attention_dropout if self.training else 0.0
        attended = F.scaled_dot_product_attention(q[:, :, :tokens], k, v, dropout_p=p)
        attended = attended.transpose(1, 2).flatten(2)
        x = x[:, :tokens] + attention * F.dropout(self.projection(attended), self.dropout, self.training)
        hidden = F.gelu(self.fc1(_in_fp32(self.layernorm_after, x)))
        return x + mlp * F.dropout(self.fc2(hidden), self.dropout, self.training)


def _in_fp32(norm: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """LayerNorm in fp32, also under autocast: colossalai.legacy computes the variance as E[x^2] - E[x]^2."""
    with torch.autocast(x.device.type, enabled=False):
        return norm(x.float())


class MeshViT(nn.Module):
    """HuggingFace's ViTForImageClassification, of which this process holds its shards. See `load_mesh_vit`.

    ``state_dict()`` and ``load_state_dict()`` are of the shards: equal across data parallelism, different
    across the mesh, and sufficient to resume exactly.

    Args:
        drop_path: chance that an image skips a branch of the last block; it falls linearly to 0 in the first.
    """

    def __init__(self, config, mesh: MeshLayout, drop_path: float = 0.0):
        super().__init__()
        self.config, self.mesh = config, mesh
        self.dropout, self.drop_path = config.hidden_dropout_prob, drop_path
        patch_embedding, linear, norm, classifier = _legacy_layers(mesh.mode)
        self.embeddings = patch_embedding(
            config.image_size, config.patch_size, config.num_channels, config.hidden_size
        )
        heads = config.num_attention_heads // mesh.side
        self.blocks = nn.ModuleList(
            _Block(config, linear, norm, heads) for _ in range(config.num_hidden_layers)
        )
        self.layernorm = norm(config.hidden_size, eps=config.layer_norm_eps)
        self.classifier = classifier(config.hidden_size, config.num_labels)

    def forward(self, pixel_values: torch.Tensor):
        """Classify the images of a data-parallel rank.

        Args:
            pixel_values: (B, channels, H, W), the same on every process of the tensor-parallel group.

        Returns:
            ImageClassifierOutput with ``logits`` (B, classes), the same on every process of the group.

        Raises:
            ValueError: B is no multiple of the number of batch shards.
        """
        from transformers.modeling_outputs import ImageClassifierOutput

        if len(pixel_values) % self.mesh.batch_parts:
            raise ValueError(
                f"{len(pixel_values)} images cannot be sharded over {self.mesh.batch_parts} for {self.mesh}"
            )
        if self.mesh.depth > 1:  # the 2.5D layers shard the batch themselves, but not over the depth
            depth = process_group("PARALLEL_2P5D_DEP")
            pixel_values = pixel_values.chunk(depth.size())[depth.rank()]
        x = F.dropout(self.embeddings(pixel_values), self.dropout, self.training)
        drops = self.drop_path and self.training
        kept = self.draw_kept_branches(x) if drops else [None] * len(self.blocks)
        for number, (block, branches) in enumerate(zip(self.blocks, kept), start=1):
            # the classifier reads the class token alone: see `class_token_alone` in vit/patches
            x = block(x, branches, tokens=1 if number == len(self.blocks) else None)
        logits = self.classifier(_in_fp32(self.layernorm, x[:, 0]))
        return ImageClassifierOutput(logits=GatherBatch.apply(logits, MESH_SHARDINGS[self.mesh.mode].batch))

    @torch.no_grad()
    def draw_kept_branches(self, x: torch.Tensor) -> torch.Tensor:
        """Factors of each image's branches: 0, or 1 / the chance that it is kept. Collective.

        Args:
            x: this process's slice (images, tokens, hidden / q) of the embeddings.

        Returns:
            (blocks, 2, images, 1, 1), the same on all processes that hold slices of these images.
        """
        chances = 1 - torch.linspace(0, self.drop_path, len(self.blocks), device=x.device)
        chances = chances.view(-1, 1, 1, 1, 1).expand(-1, 2, len(x), 1, 1)
        kept = torch.bernoulli(chances) / chances
        group = process_group(MESH_SHARDINGS[self.mesh.mode].same_images)
        dist.broadcast(kept, dist.get_global_rank(group, 0), group)
        return kept


def _legacy_layers(mode: str) -> tuple[type[nn.Module], ...]:
    """Patch embedding, linear layer, LayerNorm and classifier of colossalai.legacy for a mode."""
    from colossalai.legacy.nn.layer import parallel_2d, parallel_2p5d, parallel_3d

    module = {"2d": parallel_2d, "2.5d": parallel_2p5d, "3d": parallel_3d}[mode]
    suffix = mode.upper().replace(".", "p")
    return tuple(
        getattr(module, name + suffix) for name in ("PatchEmbedding", "Linear", "LayerNorm", "Classifier")
    )


def sharding_of(mode: str, name: str) -> tuple[str, ...]:
    """The mesh dimensions over which each dimension of a parameter is sharded; "": not sharded."""
    cut, (*_, layer, kind) = MESH_SHARDINGS[mode], name.split(".")
    if layer in ("qkv", "fc1"):
        return cut.up if kind == "weight" else (cut.up_bias,)
    if layer in ("projection", "fc2"):
        return cut.down if kind == "weight" else (cut.down_bias,)
    if layer.startswith("layernorm"):
        return (cut.norm,)
    if layer == "classifier":
        return ("", cut.hidden) if kind == "weight" else ("",)
    return {"weight": (cut.hidden, "", "", ""), "bias": (cut.hidden,)}.get(kind, ("", "", cut.hidden))


def huggingface_names(name: str) -> tuple[str, ...]:
    """The HuggingFace names of a parameter of `MeshViT`: one, or three for the fused qkv."""
    parts = name.split(".")
    if parts[0] == "embeddings":
        there = {"cls_token": "cls_token", "pos_embed": "position_embeddings"}
        return ("vit.embeddings." + there.get(parts[1], f"patch_embeddings.projection.{parts[1]}"),)
    if parts[0] == "blocks":
        _, i, layer, kind = parts
        modules: dict[str, tuple[str, ...]] = {
            "qkv": ("attention.attention.query", "attention.attention.key", "attention.attention.value"),
            "projection": ("attention.output.dense",),
            "fc1": ("intermediate.dense",),
            "fc2": ("output.dense",),
        }
        return tuple(f"vit.encoder.layer.{i}.{module}.{kind}" for module in modules.get(layer, (layer,)))
    return (name if parts[0] == "classifier" else f"vit.{name}",)


def _is_linear(name: str) -> bool:
    return name.startswith("blocks.") and name.endswith(".weight") and "layernorm" not in name


def _to_library(name: str, tensors: list[torch.Tensor], q: int) -> torch.Tensor:
    """HuggingFace's tensors of a parameter as colossalai.legacy stores it: weights (in, out), qkv fused.

    The fused tensor has q parts, each with query, key and value of the same heads, so that all three are
    sharded alike.
    """
    if len(tensors) == 3:
        whole = torch.stack([t.unflatten(0, (q, -1)) for t in tensors], dim=1).flatten(0, 2)
    else:
        whole = tensors[0]
    return whole.t() if _is_linear(name) else whole


def _to_huggingface(name: str, whole: torch.Tensor, q: int) -> list[torch.Tensor]:
    """Inverse of `_to_library`."""
    whole = whole.t() if _is_linear(name) else whole
    if ".qkv." in name:
        return [t.flatten(0, 1) for t in whole.unflatten(0, (q, 3, -1)).unbind(1)]
    return [whole]


@torch.no_grad()
def load_mesh_vit(config, state_dict: dict[str, torch.Tensor], drop_path: float = 0.0) -> MeshViT:
    """Build a model of this process's shards, on its device. Collective, after `init_mesh`.

    Args:
        config: HuggingFace ViTConfig; its dropout probabilities are used, ``num_labels`` must fit
            ``state_dict``.
        state_dict: full, fp32, of ViTForImageClassification. All processes get the values of rank 0.
        drop_path: see `MeshViT`.

    Raises:
        ValueError: a size does not fit the mode (`mesh_problems`), or names or shapes differ from ``config``.
        RuntimeError: `init_mesh` has not been called.
    """
    if _mesh is None:
        raise RuntimeError("call init_mesh before load_mesh_vit")
    if found := mesh_problems(_mesh.mode, _mesh.size, _mesh.depth, config):
        raise ValueError("; ".join(found))
    model, rank = MeshViT(config, _mesh, drop_path), process_group("TENSOR").rank()
    expected = {there for name, _ in model.named_parameters() for there in huggingface_names(name)}
    if different := expected.symmetric_difference(state_dict):
        raise ValueError(f"the state dict is of another architecture: {', '.join(sorted(different)[:4])} ...")
    for name, param in model.named_parameters():
        tensors = [state_dict[there].to(param, copy=True).contiguous() for there in huggingface_names(name)]
        for tensor in tensors:
            dist.broadcast(tensor, src=0)
        piece = _mesh.piece(_to_library(name, tensors, _mesh.side), sharding_of(_mesh.mode, name), rank)
        if piece.shape != param.shape:
            raise ValueError(
                f"{name}: the state dict's slice is {tuple(piece.shape)}, config's {tuple(param.shape)}"
            )
        param.copy_(piece)
    return model


@torch.no_grad()
def gather_state_dict(
    model: MeshViT, values: dict[str, torch.Tensor] | None = None
) -> dict[str, torch.Tensor] | None:
    """Gather full tensors. Collective.

    Args:
        values: local tensors by this model's parameter names (gradients, averages); default: the parameters.

    Returns:
        Full tensors by HuggingFace's names, in CPU memory, on rank 0; None on other ranks.
    """
    mesh, group, whole_model = model.mesh, process_group("TENSOR"), {}
    first = dist.get_rank() == 0
    for name, value in (values or dict(model.named_parameters())).items():
        cut = sharding_of(mesh.mode, name)
        pieces = [torch.empty_like(value) for _ in range(mesh.size)]
        dist.all_gather(pieces, value.detach().contiguous(), group=group)
        if not first:
            continue
        whole = torch.empty(
            [n * mesh.side ** len(sides) for n, sides in zip(value.shape, cut)], dtype=value.dtype
        )
        for rank, piece in enumerate(pieces):
            mesh.piece(whole, cut, rank).copy_(piece)
        tensors = [t.contiguous() for t in _to_huggingface(name, whole, mesh.side)]
        whole_model.update(zip(huggingface_names(name), tensors))
    return whole_model if first else None
