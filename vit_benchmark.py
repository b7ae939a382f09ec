"""Measure training speed and memory of a plugin on synthetic images. `bash run_benchmark.sh` launches it.

One JSON row per case (one batch size) is appended to --results as soon as the case ends; report.py makes
tables
and charts of them. A case that runs out of memory ends this program with status `OUT_OF_MEMORY` after its
row is
written; started again, it goes on with the next case in a fresh process.
"""

import json
import os
import statistics
import time
from pathlib import Path

from vit.console import silence_libraries

silence_libraries()  # before anything imports colossalai or transformers

from args import parse_benchmark  # noqa: E402
from vit.console import exit_with_errors, print_rank0, rank  # noqa: E402
from vit.flops import device_peak_tflops, throughput, time_on_device, training_flops
from vit.run_folder import recorded_command  # noqa: E402

OUT_OF_MEMORY = 75  # exit status: a case did not fit; started again, the rest may
NOTHING_TO_DO = 76  # exit status of --check: every case is measured, or impossible here


def measure_case(case, layout) -> dict:
    """Build, warm up and time one case. -> the measured part of its row. Collective."""
    import torch

    from vit.distributed import all_reduce_max, all_reduce_sum, device, peak_memory_gib, reset_peak_memory
    from vit.engine import Engine
    from vit.model import load_model, preset_name
    from vit.parallel.plugins import boost
    from vit.schedule import BatchPlan
    from vit.step import Normalize

    reset_peak_memory()
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
    boosted = boost(loaded.model, case, layout)
    del loaded
    engine = Engine(boosted, case.num_labels, Normalize((0.5,) * 3, (0.5,) * 3))

    # the images are on the device before the clock starts
    schedule = BatchPlan(0, case.batch_size, case.gradient_accumulation_steps, layout, case.seed)
    generator = torch.Generator().manual_seed(case.seed + layout.dp_rank)
    batch = {
        "pixel_values": torch.randint(
            0, 256, (schedule.rows, 3, size, size), dtype=torch.uint8, generator=generator
        ).to(device()),
        "labels": torch.randint(0, case.num_labels, (schedule.rows,), generator=generator).to(device()),
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

        windows.append(time_on_device(window) / case.window_steps)
    # the slowest process decides when a step is over
    windows = all_reduce_max(torch.tensor(windows, dtype=torch.float64, device=device())).tolist()
    first, last = all_reduce_sum(torch.stack(losses)).tolist()
    median = statistics.median(windows)
    memory = {
        "peak_memory_gib": peak_memory_gib(),
        "allocated_before_gib": before,
    }  # before the peak is measured, which takes memory too
    if torch.cuda.is_available():
        reserved = torch.tensor(torch.cuda.max_memory_reserved() / 2**30, device="cuda")
        memory["peak_reserved_gib"] = all_reduce_max(reserved).item()
    peak, source = device_peak_tflops(case.precision)
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

    from vit.files import DamagedRows, read_jsonl
    from vit.report.benchmark import CASE_KEYS, METHOD_KEYS, case_key
    from vit.run_folder import environment

    results, same = Path(args.results), CASE_KEYS + METHOD_KEYS
    world = args.cases[0].layout.world
    # --known_from is of one call of run_benchmark.sh
    common = {
        "kind": "case",
        **environment(world),
        "command": recorded_command(without="--known_from"),
        "world": world,
    }

    def settings(case) -> dict:
        return {name: common[name] if name in common else getattr(case, name) for name in same} | {
            "dp": case.layout.dp
        }

    def key(row: dict) -> str:
        return case_key(row, same)

    def rows() -> list[dict]:
        try:
            return read_jsonl(results) if results.exists() else []
        except DamagedRows as error:
            exit_with_errors(str(error))

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
            print_rank0(f"{_title(todo[0])}: FAILED: {args.record_failure}")
        raise SystemExit(0)
    if args.check:  # one process, before the launch
        for case in impossible:
            record(case, status="impossible", reason=args.impossible[case.batch_size])
            print_rank0(f"{_title(case)}: impossible here: {args.impossible[case.batch_size]}")
        again = len(written) > start  # a fresh process for the rest of this call's cases
        if not again and (before := len(args.cases) - len(todo) - len(impossible)):
            print_rank0(f"{before} of {len(args.cases)} cases were measured before")
        raise SystemExit(0 if todo else NOTHING_TO_DO)

    from vit.distributed import destroy_distributed, import_libraries, init_distributed
    from vit.patches.torch_kernels import release_model_memory

    import_libraries()
    init_distributed(args.seed)
    if args.mem_cap and torch.cuda.is_available():
        total = torch.cuda.get_device_properties(0).total_memory / 2**30
        torch.cuda.set_per_process_memory_fraction(min(1.0, args.mem_cap / total))
    for note in dict.fromkeys(note for case in todo for note in case.notes):
        print_rank0(f"  note      {note}")
    failed = False
    for number, case in enumerate(todo, 1):
        started = time.perf_counter()
        try:
            row = measure_case(case, case.layout)
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
            print_rank0(f"{_title(case)}: FAILED: {type(error).__name__}: {error}")
            failed = True
            continue
        finally:
            release_model_memory()
            torch.cuda.empty_cache()
        if rank() == 0:
            record(case, status="ok", reason="", seconds=time.perf_counter() - started, **row)
        print_rank0(
            f"{number} of {len(todo)}  {_title(case)}: {row['images_per_second']:.1f} images/s, "
            f"{row['steps_per_second']:.2f} it/s, step {row['step_ms']:.1f} ms "
            f"({row['step_ms_min']:.1f}-{row['step_ms_max']:.1f}), peak "
            f"{row['peak_memory_gib']:.2f} GiB, MFU {row['mfu']:.1%}, "
            f"loss {row['first_loss']:.3f} -> {row['last_loss']:.3f}"
        )
    destroy_distributed()
    raise SystemExit(1 if failed else 0)


def _title(case) -> str:
    parts = [case.plugin, case.precision, f"batch {case.batch_size}"]
    parts += [f"tp {case.tp_size}"] * (case.tp_size > 1) + [f"pp {case.pp_size}"] * (case.pp_size > 1)
    parts += ["compiled"] * case.compile + ["CUDA graphs"] * case.cuda_graphs
    return " ".join(parts)


if __name__ == "__main__":
    main()
