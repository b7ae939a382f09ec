"""Train a Vision Transformer from scratch by a config file, data parallel or 1d, 2d, 2.5d or 3d tensor
parallel.

    DATA=/path/to/cifar-10-batches-py torchrun --nproc_per_node=4 train.py
    --config=configs/cifar10/vit_lite_7_4_2d.py
    DATA=... python train.py --world_size=W --rank=R --local_rank=L --host=HOST --port=PORT --config=...
    each process by itself
    DATA=... CONFIG=... bash run_accuracy.sh

In order: check config and settings, join the processes, open the images, build the model in its form of
parallelism, then
epoch by epoch train, evaluate and save; at the end the last epoch is exported.
"""

import itertools
import os
import sys
import time
from argparse import Namespace
from pathlib import Path

import console

console.silence_libraries()  # before anything imports colossalai or transformers

import config as configs  # noqa: E402
from args import Parser, check_hub, check_output, command_line, gpu_count  # noqa: E402
from console import fail, predict_command, rank, say  # noqa: E402
from launch import resolves  # noqa: E402

MESHES = ("2d", "2.5d", "3d")  # built by tensor_parallel.py; the rest by plugins.boost


def parse(argv: list[str] | None = None) -> Namespace:
    """The settings and the config, resolved and checked; ends the program with every problem otherwise."""
    parser = Parser(
        prog="train.py",
        description="Train a ViT from scratch by a config file. DATA (environment) is the data set.",
    )
    parser.text(
        "--config",
        help="a Python file, such as configs/cifar10/vit_lite_7_4_vanilla.py; config.py lists the names",
    )
    parser.add_argument(
        "--set",
        nargs="+",
        action="extend",
        default=[],
        metavar="NAME=VALUE",
        help="override values of the config",
    )
    parser.text(
        "--output_path",
        auto=True,
        help="folder of the result (default: the config's LOG_PATH, or ./runs/<its name>)",
    )
    parser.text(
        "--resume", help="`auto` (the newest checkpoint in the output folder, if any) or a checkpoint's path"
    )
    parser.switch(
        "--overwrite_output", default=False, help="replace a finished or interrupted run in the output folder"
    )
    parser.switch("--skip_bad_images", default=False, help="leave out unreadable images, named and counted")
    parser.add_argument(
        "--check", action="store_true", help="check the settings and stop (used before a launch)"
    )
    for flag, what in (
        ("--world_size", "processes in all"),
        ("--rank", "this one's number"),
        ("--local_rank", "its number on its machine"),
    ):
        parser.number(flag, int, low=0, help=f"{what}, where no launcher says so")
    parser.text("--host", help="machine of rank 0, where no launcher says so")
    parser.number("--port", int, low=1, high=65535, help="a port that is free there")
    args = parser.parse(argv)
    problems = parser.problems
    launched = "WORLD_SIZE" in os.environ
    join_by_hand(args, problems)
    world = int(os.environ.get("WORLD_SIZE", args.world_size or 1))
    gpus = gpu_count()
    if launched and gpus and int(os.environ.get("LOCAL_WORLD_SIZE", 1)) > gpus:
        problems.append(f"{os.environ['LOCAL_WORLD_SIZE']} processes on a machine with {gpus} GPU(s)")
    if args.config is None:
        fail(*problems, "--config: name a config file, such as configs/cifar10/vit_lite_7_4_vanilla.py")
    try:
        config, found = configs.load(args.config, args.set)
    except configs.ConfigError as error:
        fail(*problems, str(error))
    problems += found + configs.check(config, world)
    args.dataset = os.environ.get("DATA")
    if not args.dataset:
        problems.append(
            "DATA: set this environment variable to the data set: cifar-10-batches-py, an image "
            "folder, a prepared folder, a parquet copy, or synthetic"
        )
    else:
        import feed

        try:
            args.dataset_kind = feed.locate(args.dataset, config["NUM_CLASSES"], config["IMG_SIZE"])
            args.model_name_or_path, args.notes = Path(args.config).stem, []
            check_hub(args, problems)
            if args.dataset_kind == feed.cifar.FOLDER and config["RANDOM_RESIZED_CROP"] is not None:
                problems.append(
                    f"RANDOM_RESIZED_CROP {config['RANDOM_RESIZED_CROP']}: is for image files; "
                    f"DATA={args.dataset} has pixels of one size: use RANDOM_CROP_PADDING"
                )
        except feed.DataError as error:
            problems.append(str(error))
    args.output_path = args.output_path or config["LOG_PATH"] or f"./runs/{Path(args.config).stem}"
    args.eval_only = args.dry_run = False
    check_output(args, problems, sources=("dataset",))
    if problems:
        fail(*problems)
    if args.check:
        raise SystemExit(0)
    if not launched and args.world_size:
        print(
            f"rank {rank()} of {args.world_size}: waiting for the others at {args.host}:{args.port}",
            flush=True,
        )

    # the names that plugins.py and checkpoint.py know
    args.layout = configs.layout(config, world, rank())
    args.precision, args.max_norm = config["precision"], config["clip_grad_norm"]
    if config["mode"] in MESHES:
        args.plugin = config["mode"]
    elif config["tp"] * config["pp"] > 1:
        args.plugin = "hybrid_parallel"
    else:
        args.plugin = "torch_ddp_fp16" if args.precision == "fp16" else "torch_ddp"
    args.learning_rate, args.weight_decay = config["LEARNING_RATE"], config["WEIGHT_DECAY"]
    args.gradient_accumulation_steps = config["gradient_accumulation"]
    args.num_microbatches = config["NUM_MICRO_BATCHES"] if config["pp"] > 1 else 1
    args.optimizer, args.zero_stage, args.offload_optim_frac = "adamw", 0, 0.0
    args.grad_checkpoint, args.compile, args.cuda_graphs = False, config["COMPILE"], config["CUDA_GRAPHS"]
    args.values = config
    args.settings = {"dataset": args.dataset} | configs.settings(config)
    return args


def join_by_hand(args, problems: list[str]) -> None:
    """--world_size, --rank, --local_rank, --host and --port as the environment that torchrun would have
    set.
    """
    given = {
        "WORLD_SIZE": args.world_size,
        "RANK": args.rank,
        "LOCAL_RANK": args.local_rank,
        "MASTER_ADDR": args.host,
        "MASTER_PORT": args.port,
    }
    by_hand = any(value is not None for name, value in given.items() if name != "WORLD_SIZE")
    if args.check or "WORLD_SIZE" in os.environ:
        return
    if args.world_size is None and not by_hand:
        return  # one process
    if missing := [
        name for name in ("world_size", "rank", "local_rank", "host", "port") if getattr(args, name) is None
    ]:
        problems.append(
            f"{', '.join('--' + name for name in missing)}: missing; one process at a time needs "
            "--world_size, --rank, --local_rank, --host and --port"
        )
    elif args.world_size < 1 or args.rank >= args.world_size or args.local_rank > args.rank:
        problems.append(
            f"--rank {args.rank} --local_rank {args.local_rank}: must be below --world_size "
            f"{args.world_size}, the local rank at most the rank"
        )
    elif (gpus := gpu_count()) and args.local_rank >= gpus:
        problems.append(f"--local_rank {args.local_rank}: this machine has {gpus} GPU(s), numbered from 0")
    elif not resolves(args.host):
        problems.append(
            f"--host {args.host}: there is no machine of that name; give rank 0's name or address"
        )
    else:
        os.environ.update({name: str(value) for name, value in given.items()})


def build(args, labels: list[str]):
    """The config's model in its form of parallelism. -> (Boosted, HuggingFace config). Collective."""
    import torch

    import plugins
    import tensor_parallel
    from model import add_drop_path, build_vit, fix_positions, imitate_trained_attention, pad_labels

    values, layout = args.values, args.layout
    vit_config = configs.model_config(values, labels)
    torch.manual_seed(values["SEED"])  # the same weights on every process and in every mode
    model = build_vit(vit_config)
    if values["POSITIONS"] == "sincos":
        fix_positions(model)
    if values["INITIAL_WEIGHTS"] == "mimetic":
        imitate_trained_attention(model)
    if args.plugin in MESHES:
        tensor_parallel.start(
            values["mode"], values["tp"], values["depth"], values["SEED"]
        )  # seeds dropout by rank
        return plugins.boost_mesh(
            tensor_parallel.build(vit_config, model.state_dict()), args, layout
        ), vit_config
    pad_labels(model, layout.tp)
    boosted = plugins.boost(model, args, layout)
    if values["DROP_PATH"]:
        add_drop_path(boosted.model, values["DROP_PATH"], values["DEPTH"])
    torch.manual_seed(values["SEED"] + layout.dp_rank)  # of dropout: other images, other masks
    return boosted, vit_config


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)  # bad settings end here, before the slow imports

    import checkpoint as ckpt
    import data
    import feed
    import model as vit
    import report
    from cifar import Augment
    from engine import (
        Engine,
        EpochProgress,
        Mix,
        NonFiniteLoss,
        Normalize,
        SignalFlag,
        Stopped,
        count_skipped,
        learning_rate,
    )
    from plugins import (
        device,
        import_libraries,
        local_processes,
        peak_memory,
        start_distributed,
        stop_distributed,
    )

    values, layout, output = args.values, args.layout, Path(args.output_path)
    seed, size, epochs = values["SEED"], values["IMG_SIZE"], values["NUM_EPOCHS"]
    with SignalFlag() as stop:
        import_libraries()
        stop.end_if_set()
        started = time.perf_counter()
        start_distributed(seed)

        # ---- images
        try:
            images = feed.open_feeds(args.dataset, values, device(), local_processes(), args.skip_bad_images)
        except (ValueError, OSError) as error:
            fail(str(error).replace("--dataset ", "DATA="))
        train, evaluated, labels = images.train, images.evaluated, images.label_names
        flip = values["RANDOM_FLIP"] and not values["RANDOM_RESIZED_CROP"]  # which flips on the CPU
        augment = Augment(
            seed, size, values["RANDOM_CROP_PADDING"], flip, values["AUTO_AUGMENT"], values["RAND_AUGMENT"]
        )

        # ---- plan and model
        schedule = data.Schedule(
            len(train), values["BATCH_SIZE"] // layout.dp, values["gradient_accumulation"], layout, seed
        )
        total_steps = schedule.steps * epochs
        warmup_steps = (
            round(schedule.steps * values["WARMUP_EPOCHS"])
            if values["WARMUP_STEPS"] is None
            else values["WARMUP_STEPS"]
        )
        if warmup_steps >= total_steps:
            images.notes.append(
                f"a warm-up of {warmup_steps} steps does not fit a training of {total_steps}: it has "
                f"a fifth of them, {total_steps // 5}"
            )
            warmup_steps = total_steps // 5
        boosted, vit_config = build(args, labels)
        if values["EMA"]:
            boosted.keep_average(values["EMA"])
        mix = (
            Mix(values["MIXUP"], values["CUTMIX"], len(labels), seed, layout.dp_rank)
            if values["MIXUP"] or values["CUTMIX"]
            else None
        )
        engine = Engine(boosted, len(labels), Normalize(*images.normal), values["LABEL_SMOOTHING"])
        say(f"\n{args.config} on {args.dataset}")
        say(
            f"  layout    {layout}; {values['mode']}, {args.precision}"
            + f", depth {values['depth']}" * (values["depth"] > 1)
            + f", {args.num_microbatches} micro-batches" * (layout.pp > 1)
        )
        mean, std = (", ".join(f"{v:.3f}" for v in numbers) for numbers in images.normal)
        say(
            f"  data      train {len(train)}, {evaluated.name} {len(evaluated)} images of "
            f"{len(labels)} classes, {size} px, {images.where}; mean {mean}, std {std}"
        )
        say(
            f"  schedule  {epochs} epochs x {schedule.steps} steps of {schedule.per_step} images "
            f"(batch {schedule.batch_size} x accumulation {schedule.accumulation} x dp {layout.dp})"
        )
        say(
            f"  learning  rate {args.learning_rate:.3g}, warm-up {warmup_steps} steps, weight "
            f"decay {args.weight_decay:g}, seed {seed}"
        )
        for note in args.notes + images.notes:
            say(f"  note      {note}")

        # ---- output folder, or the run to go on with
        checkpoints, trained_on = ckpt.Checkpoints(output / "checkpoints", keep=1), [len(train), labels]
        rows = [
            {
                "kind": "run",
                **report.environment(),
                "layout": str(layout),
                "command": command_line(),
                "settings": args.settings,
                "held_out": images.held_out,
            }
        ]
        progress, first_epoch, first_step = EpochProgress(), 0, 0
        try:
            if resumed := ckpt.resume(checkpoints, args, boosted, trained_on):
                found, meta = resumed
                rows += meta["rows"]
                progress, first_epoch = EpochProgress(**meta["progress"]), meta["epoch"]
                first_step = -(-progress.images // schedule.per_step)
                say(f"  resumed   {found}, epoch {first_epoch + 1}, step {first_step} of {schedule.steps}")
        except ckpt.CheckpointError as error:
            fail(str(error))
        if rank() == 0:
            ckpt.open_run_folder(output, args.overwrite_output)
            report.write_rows(output / "metrics.jsonl", rows)

        def lr_at(step: int) -> float:
            return learning_rate(step, total_steps, warmup_steps, args.learning_rate)

        def save(epoch: int) -> None:
            meta = dict(
                step=epoch * schedule.steps + -(-progress.images // schedule.per_step),
                epoch=epoch,
                progress=vars(progress),
                rows=rows[1:],
                best_epoch=None,
                processes=layout.world,
                settings=args.settings,
                data=trained_on,
            )
            checkpoints.save(boosted, meta)

        def evaluate(split) -> dict:
            order = data.evaluation_order(len(split), schedule.rows, layout)
            return engine.evaluate(split.batches(order), len(split), stop)

        # a list: drawn from later, when first_step has changed
        starts = [(epoch, first_step if epoch == first_epoch else 0) for epoch in range(first_epoch, epochs)]
        batches = train.batches(
            itertools.chain.from_iterable(itertools.starmap(schedule.batches, starts)), augment
        )
        say(f"  ready     {time.perf_counter() - started:.1f} s from the imports to the first step\n")

        # ---- train
        try:
            for epoch in range(first_epoch, epochs):
                done = epoch * schedule.steps
                engine.mix = mix if values["MIX_EPOCHS"] is None or epoch < values["MIX_EPOCHS"] else None
                engine.train_epoch(
                    (list(itertools.islice(batches, schedule.batches_per_step)) for _ in itertools.count()),
                    schedule.images_per_step[first_step:],
                    lr_at,
                    first_step=done + first_step,
                    progress=progress,
                    label=f"epoch {epoch + 1}/{epochs}",
                    stop=stop,
                )
                evaluated_at = time.perf_counter()
                result = evaluate(evaluated)
                if images.minival:
                    result |= {f"minival_{name}": value for name, value in evaluate(images.minival).items()}
                last_lr, took = lr_at(done + schedule.steps - 1), time.perf_counter() - evaluated_at
                row = report.epoch_row(epoch + 1, result, progress, last_lr, took, peak_memory())
                if args.skip_bad_images:
                    count_skipped(row, train.skipped, train.missing)
                    train.skipped = []
                row["best"] = (
                    epoch + 1 == epochs
                )  # the one exported: none is chosen by the split that it is judged by
                rows.append(row)
                progress, first_step = EpochProgress(), 0
                if (epoch + 1) % values["CHECKPOINT_EPOCHS"] == 0 or epoch + 1 == epochs:
                    save(epoch + 1)
                if rank() == 0:
                    report.write_rows(output / "metrics.jsonl", rows)
                say(
                    f"Evaluation result for epoch {epoch + 1}: average_loss={row['average_loss']:.4f}, "
                    f"accuracy={row['accuracy']:.4f}."
                    f"  (train loss {row['train_loss']:.4f}, {row['images_per_second']:.0f} images/s, "
                    f"{row['seconds']:.1f} s, "
                    f"peak memory {row['peak_memory_gib']:.2f} GiB"
                    + (f", minival accuracy {row['minival_accuracy']:.4f})" if images.minival else ")")
                )
        except Stopped as stopped:
            save(epoch)
            say("stopped; checkpoint saved: continue with --resume auto")
            stop_distributed()
            sys.exit(128 + stopped.signum)
        except NonFiniteLoss as error:
            stop_distributed()
            fail(error.mend(args, "LEARNING_RATE", "clip_grad_norm = 1"), code=1)

        except data.DataError as error:  # in the middle of an epoch, on one process: torchrun ends the others
            kept = (
                (f". The last checkpoint stays, {checkpoints.all()[-1]}: --resume auto goes on from there")
                if checkpoints.all()
                else ""
            )
            print(
                f"error: {str(error).strip().rpartition('DataError: ')[2]}{kept}", file=sys.stderr, flush=True
            )
            os._exit(1)

        # ---- export
        weights = ckpt.full_weights(boosted, output)
        trained = sum(row["seconds"] for row in rows if row["kind"] == "epoch")
        rows.append({"kind": "end", "seconds": time.perf_counter() - started, "training_seconds": trained})
        if rank() == 0:
            vit.export(weights, vit_config, images.processor, output)
            report.write_rows(output / "metrics.jsonl", rows)
            report.epoch_chart(
                rows,
                output / "metrics.png",
                f"{args.model_name_or_path} on {Path(args.dataset).name}, {values['mode']} {args.precision}",
                evaluated.name,
            )
            settings = {"model_name_or_path": args.model_name_or_path} | args.settings
            report.write_atomically(
                output / "README.md", report.model_card(rows, settings, labels, from_scratch=evaluated.name)
            )
        last = rows[-2]
        say(
            f"\n{evaluated.name} accuracy {last['accuracy']:.4f} after "
            f"{report.counted(epochs, 'epoch')}, {trained:.0f} s of training "
            f"({time.perf_counter() - started:.0f} s "
            f"{'since it resumed' if resumed else 'in all'})"
        )
        say(f"the model is in {output}/: {predict_command(output)}")
        stop_distributed()


if __name__ == "__main__":
    main()
