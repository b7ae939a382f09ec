"""The flags that several programs share, in the groups in which they stand."""

from __future__ import annotations

from vit.parallel.plugins import PLUGINS
from vit.parser import Parser
from vit.validate import Number, OneOf, fraction, positive

ZERO_HELP = (
    "what is sharded: 1 optimizer states, 2 gradients too (default: low_level_zero 1, hybrid_parallel 0)"
)
PRESET_HELP = (
    "precision and memory. published: as the published runs, with gradient checkpointing and "
    "gemini's offload; fast: 16 bit without either; cpu: 32 bit without either "
    "(default: published with a GPU; without, fast if the CPU has bf16 instructions, else cpu)"
)
PRESET_CHOICES = OneOf(("published", "fast", "cpu"))
SEED = Number(int, low=0, high=2**31 - 1)


def add_plugin_flags(add, others: tuple[str, ...] = ()) -> None:
    text = "training strategy (default: gemini with a GPU, else torch_ddp)"
    add("--plugin", OneOf((*PLUGINS, *others)), text, auto=True)
    add("--preset", PRESET_CHOICES, PRESET_HELP, auto=True)


def add_parallel_flags(parser: Parser) -> None:
    """Precision, layout and memory: the same for training and for the benchmark."""
    add = parser.add
    formats = OneOf(("fp32", "fp16", "bf16"))
    add("--precision", formats, "number format (default: by preset and plugin)", auto=True)
    add("--tp_size", positive(), "tensor-parallel size: ranks that share each layer (hybrid_parallel)")
    add("--pp_size", positive(), "pipeline-parallel size: stages of layers (hybrid_parallel)")
    add("--num_microbatches", positive(), "of a pipeline's batch (default: at most 4 per stage)", auto=True)
    add("--zero_stage", Number(int, low=0, high=2), ZERO_HELP, auto=True)
    add("--placement_policy", OneOf(("static", "auto")), "gemini's placement of parameters")
    add("--offload_optim_frac", fraction(1), "optimizer states in CPU memory (default: by preset)", auto=True)
    add("--offload_param_frac", fraction(1), "gemini's parameters in CPU memory")
    add("--grad_checkpoint", bool, "recompute activations in the backward pass (default: by preset)")
    add("--compile", bool, "torch.compile each transformer layer (default: by preset)")
    add("--cuda_graphs", bool, "replay steps as CUDA graphs (default: by preset)")


def add_optimizer_flags(parser: Parser) -> None:
    add = parser.add
    add("--gradient_accumulation_steps", positive(), "batches added up into one optimizer step")
    add("--max_norm", Number(float, low=0), "clip gradients to this norm; 0: no clipping")
    optimizers = OneOf(("adamw", "hybrid_adam", "muon"))
    text = "torch's AdamW, Colossal-AI's (compiles at first use), or Muon for the layers' matrices"
    add("--optimizer", optimizers, text)


DATA_FLAGS = (  # of `add_data_flags`
    "image_column label_column dataset_config pixel_range allow_external_images skip_bad_images "
    "check_duplicates data_cache"
).split()


def add_data_flags(add) -> None:
    """How the data set is read: the same for fine-tuning and for training from scratch."""
    add("--image_column", str, "column of the images (default: found by its name and type)")
    add("--label_column", str, "column of the labels (default: found by its name and type)")
    add("--dataset_config", str, "configuration, of a data set that has several")
    text = "values of black and white in images of more than 8 bits (default: found)"
    add("--pixel_range", Number(float), text, nargs=2)
    add("--allow_external_images", bool, "tables may name images outside of their folder")
    add("--skip_bad_images", bool, "leave out unreadable images, named and counted")
    add("--check_duplicates", bool, "compare the contents of all images of equal size, however many")
    text = "GiB of disk for decoded images of this and later runs; 0: none"
    add("--data_cache", Number(float, low=0), text)


def add_launch_flags(parser: Parser) -> None:
    text = "ranks this will run on (default: those of the launch)"
    parser.add("--world_size", positive(), text, default=None)
    parser.add_check()
