"""Measure training speed and memory of a plugin on synthetic images. `bash run_benchmark.sh` launches it.

One JSON row per case (one batch size) is appended to --results as soon as the case ends; report.py makes
tables
and charts of them. A case that runs out of memory ends this program with status `OUT_OF_MEMORY` after its
row is
written; started again, it goes on with the next case in a fresh process.
"""

import json
import os
import re
import statistics
import time
from pathlib import Path

import console

console.silence_libraries()  # before anything imports colossalai or transformers

from args import command_line, parse_benchmark  # noqa: E402
from console import fail, rank, say  # noqa: E402

OUT_OF_MEMORY = 75  # exit status: a case did not fit; started again, the rest may
NOTHING_TO_DO = 76  # exit status of --check: every case is measured, or impossible here

# Dense (not sparse) peak of the matrix units, TFLOP/s, from the vendor's data sheets: (16-bit, fp32
# without TF32).
PEAK_TFLOPS = {
    "H200": (989, 67),
    "H100 PCIe": (756, 51),
    "H100 NVL": (835, 60),
    "H100": (989, 67),
    "A100": (312, 19.5),
    "A10G": (70, 35),
    "A10": (125, 31.2),
    "L40S": (362, 91.6),
    "L40": (181, 90.5),
    "L4": (121, 30.3),
    "T4": (65, 8.1),
    "V100": (125, 15.7),
    "RTX 4090": (165, 82.6),
    "RTX 3090": (71, 35.6),
}


def training_flops(image_size: int, patch: int, hidden: int, layers: int, mlp: int, labels: int) -> float:
    """Floating-point operations to train a ViT on one image: forward, and twice that backward.

    Counts the matrix products (2 per multiply-add), not recomputation: gradient checkpointing does not make a
    model bigger, so it lowers the model FLOPs utilisation (Chowdhery et al., 2022, appendix B).
    """
    patches = (image_size // patch) ** 2
    tokens = patches + 1
    embed = 2 * patches * (3 * patch * patch) * hidden
    attention = 2 * tokens * hidden * (4 * hidden) + 2 * (2 * tokens * tokens * hidden)
    layer = attention + 2 * tokens * hidden * (2 * mlp)
    return 3.0 * (embed + layers * layer + 2 * hidden * labels)


def throughput(dp: int, batch_size: int, accumulation: int, step_seconds: float) -> float:
    """Images per second of the whole run.

    Each of the dp groups takes its own images, tp and pp share them.
    """
    return dp * batch_size * accumulation / step_seconds


def peak_tflops(precision: str) -> tuple[float, str]:
    """(peak of one device, where the number comes from)."""
    import torch

    if torch.cuda.is_available():
        name = torch.cuda.get_device_name()
        for known, (half, single) in PEAK_TFLOPS.items():
            if re.search(rf"\b{known}\b", name):
                return (single if precision == "fp32" else half), f"data sheet of {known}"
    return measured_tflops(precision), "measured matrix product"


def measured_tflops(precision: str) -> float:
    """TFLOP/s of a large matrix product on this device, on random data."""
    import torch

    from plugins import device

    on_gpu = torch.cuda.is_available()
    n = 8192 if on_gpu else 1024
    dtype = (
        {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[precision]
        if on_gpu
        else torch.float32
    )
    a, b = torch.randn(2, n, n, device=device(), dtype=dtype)
    for _ in range(2):
        a @ b
    seconds = min(timed(lambda: a @ b) for _ in range(5))
    return 2 * n**3 / seconds / 1e12


def timed(work) -> float:
    """Seconds of ``work``, by device events on a GPU, else by the clock."""
    import torch

    if not torch.cuda.is_available():
        start = time.perf_counter()
        work()
        return time.perf_counter() - start
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    work()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


def measure(case, layout) -> dict:
    """Build, warm up and time one case. -> the measured part of its row. Collective."""
    import torch

    import plugins
    from engine import Engine, Normalize
    from data import Schedule
    from model import load_model, preset_name

    plugins.reset_peak_memory()
    before = (
        torch.cuda.memory_allocated() / 2**30 if torch.cuda.is_available() else 0.0
    )  # by earlier cases, if they left something
    torch.manual_seed(case.seed)
    loaded = load_model(
        preset_name(case.model_name_or_path),
        [str(i) for i in range(case.num_labels)],
        layout.tp,
        case.image_size,
    )
    size = loaded.model.config.image_size
    config = loaded.model.config
    boosted = plugins.boost(loaded.model, case, layout)
    del loaded
    engine = Engine(boosted, case.num_labels, Normalize((0.5,) * 3, (0.5,) * 3))

    # the images are on the device before the clock starts
    schedule = Schedule(0, case.batch_size, case.gradient_accumulation_steps, layout, case.seed)
    generator = torch.Generator().manual_seed(case.seed + layout.dp_rank)
    batch = {
        "pixel_values": torch.randint(
            0, 256, (schedule.rows, 3, size, size), dtype=torch.uint8, generator=generator
        ).to(plugins.device()),
        "labels": torch.randint(0, case.num_labels, (schedule.rows,), generator=generator).to(
            plugins.device()
        ),
    }

    def step() -> torch.Tensor:
        return engine.train_step([batch] * schedule.batches_per_step, schedule.per_step, case.learning_rate)

    engine.model.train()
    losses = [step()]
    for _ in range(
        max(case.warmup_steps, engine.graph.WARM_UP + 1 if engine.graph else 0) - 1
    ):  # a step is recorded before the clock starts
        step()
    windows = []
    for _ in range(case.windows):

        def window():
            for _ in range(case.window_steps):
                losses[1:] = [step()]

        windows.append(timed(window) / case.window_steps)
    # the slowest process decides when a step is over
    windows = plugins.all_max(torch.tensor(windows, dtype=torch.float64, device=plugins.device())).tolist()
    first, last = plugins.all_sum(torch.stack(losses)).tolist()
    median = statistics.median(windows)
    memory = {
        "peak_memory_gib": plugins.peak_memory(),
        "allocated_before_gib": before,
    }  # before the peak is measured, which takes memory too
    if torch.cuda.is_available():
        reserved = torch.tensor(torch.cuda.max_memory_reserved() / 2**30, device="cuda")
        memory["peak_reserved_gib"] = plugins.all_max(reserved).item()
    peak, source = peak_tflops(case.precision)
    flops = training_flops(
        size,
        config.patch_size,
        config.hidden_size,
        config.num_hidden_layers,
        config.intermediate_size,
        case.num_labels,
    )
    speed = throughput(layout.dp, case.batch_size, case.gradient_accumulation_steps, median)
    return memory | {
        "step_ms": 1e3 * median,
        "step_ms_min": 1e3 * min(windows),
        "step_ms_max": 1e3 * max(windows),
        "steps_per_second": 1 / median,
        "images_per_second": speed,
        "images_per_second_per_device": speed / layout.world,
        "model_tflops_per_device": flops * speed / layout.world / 1e12,
        "mfu": flops * speed / layout.world / 1e12 / peak,
        "peak_tflops": peak,
        "peak_source": source,
        "first_loss": first,
        "last_loss": last,
    }


def main() -> None:
    args = parse_benchmark()
    import torch

    import report

    results, same = Path(args.results), report.SAME_CASE + report.SAME_WAY
    world = args.cases[0].layout.world
    # --known_from is of one call of run_benchmark.sh
    common = {
        "kind": "case",
        **report.environment(world),
        "command": command_line(without="--known_from"),
        "world": world,
    }

    def settings(case) -> dict:
        return {name: common[name] if name in common else getattr(case, name) for name in same} | {
            "dp": case.layout.dp
        }

    def key(row: dict) -> str:
        return report.case_key(row, same)

    def rows() -> list[dict]:
        try:
            return report.read_rows(results) if results.exists() else []
        except report.DamagedRows as error:
            fail(str(error))

    written = rows()
    start = len(written) if args.known_from is None else args.known_from  # rows from here on are of this call
    finished = {
        key(row)
        for i, row in enumerate(written)
        if i >= start or row["status"] != "failed" and not args.remeasure
    }
    todo = [case for case in args.cases if key(settings(case)) not in finished]
    impossible = [case for case in todo if case.batch_size in args.impossible]
    todo = [case for case in todo if case.batch_size not in args.impossible]

    def record(case, **outcome) -> None:
        results.parent.mkdir(parents=True, exist_ok=True)
        with open(results, "a") as file:  # one write of one line: whole, or not there
            file.write(json.dumps(common | settings(case) | outcome) + "\n")

    if args.record_failure:  # one process, after a launch whose processes could not say it themselves
        if todo:
            record(todo[0], status="failed", reason=args.record_failure)
            say(f"{_title(todo[0])}: FAILED: {args.record_failure}")
        raise SystemExit(0)
    if args.check:  # one process, before the launch
        for case in impossible:
            record(case, status="impossible", reason=args.impossible[case.batch_size])
            say(f"{_title(case)}: impossible here: {args.impossible[case.batch_size]}")
        again = len(written) > start  # a fresh process for the rest of this call's cases
        if not again and (before := len(args.cases) - len(todo) - len(impossible)):
            say(f"{before} of {len(args.cases)} cases were measured before")
        raise SystemExit(0 if todo else NOTHING_TO_DO)

    import plugins
    import speedups

    plugins.import_libraries()
    plugins.start_distributed(args.seed)
    if args.mem_cap and torch.cuda.is_available():
        total = torch.cuda.get_device_properties(0).total_memory / 2**30
        torch.cuda.set_per_process_memory_fraction(min(1.0, args.mem_cap / total))
    for note in dict.fromkeys(note for case in todo for note in case.notes):
        say(f"  note      {note}")
    failed = False
    for number, case in enumerate(todo, 1):
        started = time.perf_counter()
        try:
            row = measure(case, case.layout)
        except torch.cuda.OutOfMemoryError as error:
            record(case, status="out of memory", reason=str(error).split(". ")[0])
            print(f"{_title(case)}: out of memory", flush=True)
            os._exit(
                OUT_OF_MEMORY
            )  # at once: other processes wait in a collective, and this one's memory is in pieces
        except Exception as error:
            if world > 1:
                time.sleep(
                    1 + rank()
                    # one process says it; and the one that ran out of memory, which made the others fail,
                    # first
                )
                if key(settings(case)) not in map(key, rows()[start:]):
                    record(case, status="failed", reason=f"{type(error).__name__}: {error}"[:500])
                raise
            record(case, status="failed", reason=f"{type(error).__name__}: {error}"[:500])
            say(f"{_title(case)}: FAILED: {type(error).__name__}: {error}")
            failed = True
            continue
        finally:
            speedups.forget_models()
            torch.cuda.empty_cache()
        if rank() == 0:
            record(case, status="ok", reason="", seconds=time.perf_counter() - started, **row)
        say(
            f"{number} of {len(todo)}  {_title(case)}: {row['images_per_second']:.1f} images/s, "
            f"{row['steps_per_second']:.2f} it/s, step {row['step_ms']:.1f} ms "
            f"({row['step_ms_min']:.1f}-{row['step_ms_max']:.1f}), peak "
            f"{row['peak_memory_gib']:.2f} GiB, MFU {row['mfu']:.1%}, "
            f"loss {row['first_loss']:.3f} -> {row['last_loss']:.3f}"
        )
    plugins.stop_distributed()
    raise SystemExit(1 if failed else 0)


def _title(case) -> str:
    parts = [case.plugin, case.precision, f"batch {case.batch_size}"]
    parts += [f"tp {case.tp_size}"] * (case.tp_size > 1) + [f"pp {case.pp_size}"] * (case.pp_size > 1)
    parts += ["compiled"] * case.compile + ["CUDA graphs"] * case.cuda_graphs
    return " ".join(parts)


if __name__ == "__main__":
    main()
