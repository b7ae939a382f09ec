"""Train a Vision Transformer from scratch by a config file, data parallel or 1d, 2d, 2.5d or 3d tensor parallel.

    DATA=/path/to/cifar-10-batches-py torchrun --nproc_per_node=4 train.py --config=configs/cifar10/vit_lite_7_4_2d.py
    DATA=... python train.py --world_size=W --rank=R --local_rank=L --host=HOST --port=PORT --config=...    each process by itself
    DATA=... CONFIG=... bash run_accuracy.sh

In order: check config and settings, join the processes, read the images onto the device, build the model in its form
of parallelism, then epoch by epoch train, evaluate and save; at the end the last epoch is exported.
"""

import os
import sys
import time
from argparse import Namespace
from pathlib import Path

import console

console.silence_libraries()  # before anything imports colossalai or transformers

import config as configs  # noqa: E402
from args import Parser, check_hub, check_output, command_line, gpu_count  # noqa: E402
from console import fail, rank, say  # noqa: E402

MESHES = ("2d", "2.5d", "3d")  # built by tensor_parallel.py; the rest by plugins.boost


def parse(argv: list[str] | None = None) -> Namespace:
    """The settings and the config, resolved and checked; ends the program with every problem otherwise."""
    parser = Parser(prog="train.py", description="Train a ViT from scratch by a config file. DATA (environment) is the data set.")
    parser.text("--config", help="a Python file, such as configs/cifar10/vit_lite_7_4_vanilla.py; config.py lists the names")
    parser.add_argument("--set", nargs="+", action="extend", default=[], metavar="NAME=VALUE", help="override values of the config")
    parser.text("--output_path", auto=True, help="folder of the result (default: the config's LOG_PATH, or ./runs/<its name>)")
    parser.text("--resume", help="`auto` (the newest checkpoint in the output folder, if any) or a checkpoint's path")
    parser.switch("--overwrite_output", default=False, help="replace a finished or interrupted run in the output folder")
    parser.switch("--skip_bad_images", default=False, help="leave out unreadable images, named and counted")
    parser.add_argument("--check", action="store_true", help="check the settings and stop (used before a launch)")
    for flag, what in (("--world_size", "processes in all"), ("--rank", "this one's number"), ("--local_rank", "its number on its machine")):
        parser.number(flag, int, low=0, help=f"{what}, where no launcher says so")
    parser.text("--host", help="machine of rank 0, where no launcher says so")
    parser.number("--port", int, low=1, high=65535, help="a port that is free there")
    args = parser.parse(argv)
    problems = parser.problems
    join_by_hand(args, problems)
    launched = "WORLD_SIZE" in os.environ
    world = int(os.environ["WORLD_SIZE"]) if launched else (args.world_size or 1)
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
        problems.append("DATA: set this environment variable to the data set: cifar-10-batches-py, an image folder or a parquet copy")
    else:
        import cifar

        try:
            args.dataset_kind = cifar.locate(args.dataset)
            args.model_name_or_path, args.notes = Path(args.config).stem, []
            check_hub(args, problems)
        except cifar.DataError as error:
            problems.append(str(error))
    args.output_path = args.output_path or config["LOG_PATH"] or f"./runs/{Path(args.config).stem}"
    args.eval_only = args.dry_run = False
    check_output(args, problems)
    if problems:
        fail(*problems)
    if args.check:
        raise SystemExit(0)

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
    args.grad_checkpoint = args.compile = args.cuda_graphs = False
    args.values = config
    args.settings = {"dataset": args.dataset} | configs.settings(config)
    return args


def join_by_hand(args, problems: list[str]) -> None:
    """--world_size, --rank, --local_rank, --host and --port as the environment that torchrun would have set."""
    given = {"WORLD_SIZE": args.world_size, "RANK": args.rank, "LOCAL_RANK": args.local_rank, "MASTER_ADDR": args.host, "MASTER_PORT": args.port}
    by_hand = any(value is not None for name, value in given.items() if name != "WORLD_SIZE")
    if args.check or "WORLD_SIZE" in os.environ:
        return
    if args.world_size is None and not by_hand:
        return  # one process
    if missing := [name for name in ("world_size", "rank", "local_rank", "host", "port") if getattr(args, name) is None]:
        problems.append(f"{', '.join('--' + name for name in missing)}: missing; one process at a time needs --world_size, --rank, --local_rank, --host and --port")
    elif args.world_size < 1 or args.rank >= args.world_size or args.local_rank > args.rank:
        problems.append(f"--rank {args.rank} --local_rank {args.local_rank}: must be below --world_size {args.world_size}, the local rank at most the rank")
    else:
        os.environ.update({name: str(value) for name, value in given.items()})


def build(args, labels: list[str]):
    """The config's model in its form of parallelism. -> (Boosted, HuggingFace config). Collective."""
    import torch
    from transformers import ViTForImageClassification

    import plugins
    import tensor_parallel
    from model import pad_labels

    values, layout = args.values, args.layout
    vit_config = configs.model_config(values, labels)
    torch.manual_seed(values["SEED"])  # the same weights on every process and in every mode
    model = ViTForImageClassification(vit_config)
    if args.plugin in MESHES:
        tensor_parallel.start(values["mode"], values["tp"], values["depth"], values["SEED"])  # seeds dropout by rank
        return plugins.boost_mesh(tensor_parallel.build(vit_config, model.state_dict()), args, layout), vit_config
    pad_labels(model, layout.tp)
    boosted = plugins.boost(model, args, layout)
    torch.manual_seed(values["SEED"] + layout.dp_rank)  # of dropout: other images, other masks
    return boosted, vit_config


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)  # bad settings end here, before the slow imports

    from transformers import ViTImageProcessor

    import checkpoint as ckpt
    import cifar
    import data
    import model as vit
    import report
    from engine import Engine, EpochProgress, NonFiniteLoss, Normalize, SignalFlag, Stopped, learning_rate
    from plugins import device, import_libraries, local_processes, peak_memory, start_distributed, stop_distributed

    values, layout, output = args.values, args.layout, Path(args.output_path)
    seed, size, epochs = values["SEED"], values["IMG_SIZE"], values["NUM_EPOCHS"]
    with SignalFlag() as stop:
        import_libraries()
        started = time.perf_counter()
        start_distributed(seed)

        # ---- images, onto the device
        try:
            images = cifar.read(args.dataset, size, seed, local_processes(), args.skip_bad_images)
        except (ValueError, OSError) as error:
            fail(str(error).replace("--dataset ", "DATA="))
        if len(images.label_names) != values["NUM_CLASSES"]:
            fail(f"NUM_CLASSES {values['NUM_CLASSES']}: DATA={args.dataset} has {len(images.label_names)} classes")
        held = images.test or images.validation
        if images.test is None:
            images.notes.append(f"no test split: evaluating the validation split ({len(held)} images)")
        train, evaluated = cifar.Resident(images.train, device()), cifar.Resident(held, device())
        mean, std = (values["MEAN"], values["STD"]) if values["MEAN"] else train.mean_and_std()
        augment = cifar.Augment(seed, size, values["RANDOM_CROP_PADDING"], values["RANDOM_FLIP"], values["AUTO_AUGMENT"])

        # ---- plan and model
        schedule = data.Schedule(len(train), values["BATCH_SIZE"] // layout.dp, values["gradient_accumulation"], layout, seed)
        total_steps, warmup_steps = schedule.steps * epochs, round(schedule.steps * values["WARMUP_EPOCHS"])
        boosted, vit_config = build(args, images.label_names)
        engine = Engine(boosted, len(images.label_names), Normalize(tuple(mean), tuple(std)), values["LABEL_SMOOTHING"])
        say(f"\n{args.config} on {args.dataset}")
        say(f"  layout    {layout}; {values['mode']}, {args.precision}" + f", depth {values['depth']}" * (values["depth"] > 1)
            + f", {args.num_microbatches} micro-batches" * (layout.pp > 1))  # fmt: skip
        say(f"  data      train {len(train)}, {held.name} {len(held)} images of {len(images.label_names)} classes, {size} px, on {device().type}; "
            f"mean {', '.join(f'{v:.3f}' for v in mean)}, std {', '.join(f'{v:.3f}' for v in std)}")  # fmt: skip
        say(f"  schedule  {epochs} epochs x {schedule.steps} steps of {schedule.per_step} images "
            f"(batch {schedule.batch_size} x accumulation {schedule.accumulation} x dp {layout.dp})")  # fmt: skip
        say(f"  learning  rate {args.learning_rate:.3g}, warm-up {warmup_steps} steps, weight decay {args.weight_decay:g}, seed {seed}")
        for note in args.notes + images.notes:
            say(f"  note      {note}")

        # ---- output folder, or the run to go on with
        checkpoints = ckpt.Checkpoints(output / "checkpoints", keep=1)
        rows = [{"kind": "run", **report.environment(), "layout": str(layout), "command": command_line(), "settings": args.settings}]
        progress, first_epoch, first_step = EpochProgress(), 0, 0
        try:
            if resumed := ckpt.resume(checkpoints, args, boosted):
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
                step=epoch * schedule.steps + -(-progress.images // schedule.per_step), epoch=epoch, progress=vars(progress),
                rows=rows[1:], best_epoch=None, processes=layout.world, settings=args.settings,
            )  # fmt: skip
            checkpoints.save(boosted, meta)

        def steps_of(epoch: int, first: int):
            dealt = schedule.batches(epoch, first)
            for _ in range(first, schedule.steps):
                yield [train.batch(next(dealt), augment) for _ in range(schedule.batches_per_step)]

        order = data.evaluation_order(len(held), schedule.rows, layout)
        say(f"  ready     {time.perf_counter() - started:.1f} s from the imports to the first step\n")

        # ---- train
        try:
            for epoch in range(first_epoch, epochs):
                done = epoch * schedule.steps
                engine.train_epoch(
                    steps_of(epoch, first_step), schedule.images_per_step[first_step:], lr_at, first_step=done + first_step,
                    progress=progress, label=f"epoch {epoch + 1}/{epochs}", stop=stop,
                )  # fmt: skip
                evaluated_at = time.perf_counter()
                result = engine.evaluate((evaluated.batch(pairs) for pairs in order), len(held))
                last_lr, took = lr_at(done + schedule.steps - 1), time.perf_counter() - evaluated_at
                row = report.epoch_row(epoch + 1, result, progress, last_lr, took, peak_memory())
                row["best"] = epoch + 1 == epochs  # the one exported: none is chosen by the split that it is judged by
                rows.append(row)
                progress, first_step = EpochProgress(), 0
                if (epoch + 1) % values["CHECKPOINT_EPOCHS"] == 0 or epoch + 1 == epochs:
                    save(epoch + 1)
                if rank() == 0:
                    report.write_rows(output / "metrics.jsonl", rows)
                say(f"Evaluation result for epoch {epoch + 1}: average_loss={row['average_loss']:.4f}, accuracy={row['accuracy']:.4f}."
                    f"  (train loss {row['train_loss']:.4f}, {row['images_per_second']:.0f} images/s, {row['seconds']:.1f} s, "
                    f"peak memory {row['peak_memory_gib']:.2f} GiB)")  # fmt: skip
        except Stopped as stopped:
            save(epoch)
            say(f"stopped by signal {stopped.signum}; checkpoint saved: continue with --resume auto")
            stop_distributed()
            sys.exit(128 + stopped.signum)
        except NonFiniteLoss as error:
            stop_distributed()
            fail(f"{error}".replace("--learning_rate", "LEARNING_RATE").replace("--max_norm 1", "clip_grad_norm = 1").replace("--precision ", ""), code=1)

        # ---- export
        weights = ckpt.full_weights(boosted, output)
        trained = sum(row["seconds"] for row in rows if row["kind"] == "epoch")
        rows.append({"kind": "end", "seconds": time.perf_counter() - started, "training_seconds": trained})
        if rank() == 0:
            processor = ViTImageProcessor(size={"height": size, "width": size}, image_mean=list(mean), image_std=list(std), resample=2)
            vit.export(weights, vit_config, processor, output)
            report.write_rows(output / "metrics.jsonl", rows)
            report.epoch_chart(rows, output / "metrics.png", f"{args.model_name_or_path} on {Path(args.dataset).name}, {values['mode']} {args.precision}", held.name)
            settings = {"model_name_or_path": args.model_name_or_path} | args.settings
            report.write_atomically(output / "README.md", report.model_card(rows, settings, images.label_names, from_scratch=held.name))
        last = rows[-2]
        say(f"\n{held.name} accuracy {last['accuracy']:.4f} after {epochs} epochs, {trained:.0f} s of training ({time.perf_counter() - started:.0f} s in all)")
        say(f"the model is in {output}/: python vit_predict.py --model {output} IMAGE_OR_FOLDER")
        stop_distributed()


if __name__ == "__main__":
    main()
