"""Measure training speed and memory of a plugin on synthetic images. `bash run_benchmark.sh` launches it.

One JSON row per case (one batch size) is appended to --results as soon as the case ends; report.py makes
tables and charts of them. A case that runs out of memory ends this program; benchmark.py starts another one
for the rest.
"""

import os
import statistics
import time
from pathlib import Path

from vit.console import silence_libraries

silence_libraries()  # before anything imports colossalai or transformers

from args import Case, parse_benchmark
from vit.console import print_rank0, rank
from vit.watch import watch_launcher


def measure_case(case: Case) -> dict:
    """Build, warm up and time one case. -> the measured part of its row. Collective."""
    import torch

    from vit.distributed import reset_peak_memory

    reset_peak_memory()
    # by earlier cases, if anything
    before = torch.cuda.memory_allocated() / 2**30 if torch.cuda.is_available() else 0.0
    torch.manual_seed(case.settings.seed)
    step, config, compiled = build_step(case)
    try:
        figures = measure_step(case, step, config)
    finally:
        step.graph = None  # before the plugin is freed, see `StepGraph`
    return figures | {"allocated_before_gib": before, "compiled": compiled}


def measure_step(case: Case, step, config) -> dict:
    """Speed, memory and losses of ``step``, a train step as `build_step` returns it. Collective."""
    import torch

    from vit.distributed import all_reduce_max, all_reduce_sum, device, peak_memory_gib
    from vit.flops import time_on_device
    from vit.schedule import BatchPlan
    from vit.step_graph import StepGraph

    settings, layout = case.settings, case.settings.layout
    # the images are on the device before the clock starts
    plan = BatchPlan(0, settings.batch_size, settings.gradient_accumulation_steps, layout, settings.seed)
    generator = torch.Generator().manual_seed(settings.seed + layout.data_parallel_rank)
    shape = (plan.local_batch_size, 3, config.image_size, config.image_size)
    pixels = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
    label_ids = torch.randint(0, case.num_labels, shape[:1], generator=generator)
    batch = {"pixel_values": pixels.to(device()), "labels": label_ids.to(device())}

    def train() -> torch.Tensor:
        return step([batch] * plan.micro_batches_per_step, plan.images_per_step, settings.learning_rate)

    step.model.train()
    losses = [train()]
    # a step is recorded before the clock starts
    warmup = max(case.warmup_steps, StepGraph.WARM_UP + 1 if step.graph else 0)
    for _ in range(warmup - 1):
        train()

    def window() -> None:
        for _ in range(case.window_steps):
            losses[1:] = [train()]

    windows = [time_on_device(window) / case.window_steps for _ in range(case.windows)]
    # the slowest rank decides when a step is over
    windows = all_reduce_max(torch.tensor(windows, dtype=torch.float64, device=device())).tolist()
    first, last = all_reduce_sum(torch.stack(losses)).tolist()
    # read before the peak of the device is measured, which takes memory too
    memory = {"peak_memory_gib": peak_memory_gib()}
    if torch.cuda.is_available():
        reserved = torch.tensor(torch.cuda.max_memory_reserved() / 2**30, device="cuda")
        memory["peak_reserved_gib"] = all_reduce_max(reserved).item()
    speed = speed_figures(case, plan.images_per_step, windows, config)
    return memory | speed | {"first_loss": first, "last_loss": last}


def build_step(case: Case) -> tuple:
    """-> (a train step of the plugin or peer, the HuggingFace config, what of the model is compiled)"""
    from vit.data.processor import Normalize
    from vit.model import load_model
    from vit.parallel.boost import boost, compiled_part
    from vit.parallel.plugins import PEERS
    from vit.peers import PeerStep, peer_config
    from vit.presets import preset_name
    from vit.step import TrainStep

    settings, normalize = case.settings, Normalize((0.5,) * 3, (0.5,) * 3)
    if settings.plugin in PEERS:
        step = PeerStep(settings, case.num_labels, normalize)
        return step, peer_config(settings, case.num_labels), "the model" if settings.compile else ""
    labels = [str(i) for i in range(case.num_labels)]
    model = load_model(preset_name(settings.model_name_or_path), labels, settings.image_size).model
    step = TrainStep(boost(model, settings), case.num_labels, normalize)
    return step, model.config, compiled_part(settings)


def speed_figures(case: Case, images: int, windows: list[float], config) -> dict:
    """The row's figures of speed, from the images of a step and the seconds per step of each window."""
    from vit.flops import device_peak_tflops, training_flops
    from vit.parallel.plugins import PEERS

    settings, world_size = case.settings, case.settings.layout.world_size
    seconds = statistics.median(windows)
    speed = images / seconds
    peak, source = device_peak_tflops(settings.precision)
    flops = training_flops(config, case.num_labels, every_token=settings.plugin in PEERS)
    tflops = flops * speed / world_size / 1e12
    return {
        "step_ms": 1e3 * seconds,
        "step_ms_min": 1e3 * min(windows),
        "step_ms_max": 1e3 * max(windows),
        "steps_per_second": 1 / seconds,
        "images_per_second": speed,
        "images_per_second_per_device": speed / world_size,
        "model_tflops_per_device": tflops,
        "mfu": tflops / peak,
        "peak_tflops": peak,
        "peak_source": source,
    }


def main() -> None:
    watch_launcher()
    cases, args = parse_benchmark()
    import torch

    from vit.benchmark import ResultRows, case_title
    from vit.distributed import destroy_distributed, import_libraries, init_distributed
    from vit.patches.torch_kernels import release_model_memory

    rows = ResultRows(Path(args.results), world_size=cases[0].settings.layout.world_size)
    todo = rows.unmeasured(cases, again=args.remeasure)
    if len(todo) < len(cases):
        print_rank0(f"{len(cases) - len(todo)} of {len(cases)} cases were measured before")
    for case in [case for case in todo if case.problem]:
        rows.add(case, status="impossible", reason=case.problem)
        print_rank0(f"{case_title(case)}: not supported: {case.problem}")
    todo = [case for case in todo if not case.problem]
    if not todo:
        return
    import_libraries()
    init_distributed(cases[0].settings.seed)
    if args.mem_cap and torch.cuda.is_available():
        total = torch.cuda.get_device_properties(0).total_memory / 2**30
        torch.cuda.set_per_process_memory_fraction(min(1.0, args.mem_cap / total))
    for note in dict.fromkeys(note for case in todo for note in case.settings.notes):
        print_rank0(f"  note      {note}")
    failed = [
        number for number, case in enumerate(todo, 1) if not run_case(case, rows, f"{number} of {len(todo)}")
    ]
    release_model_memory()
    destroy_distributed()
    raise SystemExit(1 if failed else 0)


def run_case(case: Case, rows, number: str) -> bool:
    """Measure a case and write its row. -> whether it ran"""
    import torch

    from vit.benchmark import case_title
    from vit.patches.torch_kernels import release_model_memory

    started, title = time.perf_counter(), case_title(case)
    try:
        row = measure_case(case)
    except torch.cuda.OutOfMemoryError as error:
        rows.add(case, every_rank=True, status="out of memory", reason=str(error).split(". ")[0])
        print(f"{title}: out of memory", flush=True)
        os._exit(1)  # at once: other ranks wait in a collective, and this one's memory is in pieces
    except Exception as error:
        reason = f"{type(error).__name__}: {error}"[:500]
        if case.settings.layout.world_size > 1:
            # the rank that ran out of memory, which made the others fail, writes first
            time.sleep(1 + rank())
            if rows.missing([case], rows.read()):
                rows.add(case, every_rank=True, status="failed", reason=reason)
            raise
        rows.add(case, status="failed", reason=reason)
        print_rank0(f"{title}: FAILED: {reason.splitlines()[0]}")
        return False
    finally:
        release_model_memory()
        torch.cuda.empty_cache()
    rows.add(case, status="ok", reason="", seconds=time.perf_counter() - started, **row)
    print_rank0(
        f"{number}  {title}: {row['images_per_second']:.1f} images/s, {row['steps_per_second']:.2f} it/s, "
        f"step {row['step_ms']:.1f} ms ({row['step_ms_min']:.1f}-{row['step_ms_max']:.1f}), "
        f"peak {row['peak_memory_gib']:.2f} GiB, MFU {row['mfu']:.1%}, "
        f"loss {row['first_loss']:.3f} -> {row['last_loss']:.3f}"
    )
    return True


if __name__ == "__main__":
    main()
