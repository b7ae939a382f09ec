"""Fine-tune a Vision Transformer with a Colossal-AI plugin chosen by name. `bash run_demo.sh` launches it.

In order: check the settings, join the processes, read the images, build and boost the model, then epoch by
epoch
train, evaluate and save; at the end the best (or the last) epoch is tested and exported.
"""

import itertools
import os
import sys
import time
from pathlib import Path

from vit.console import silence_libraries

silence_libraries()  # before anything imports colossalai or transformers

from args import parse_finetune  # noqa: E402
from vit.console import exit_with_errors, print_rank0, rank  # noqa: E402
from vit.run_folder import (
    predict_command,  # noqa: E402
    recorded_command,  # noqa: E402
)
from vit.settings import augmentation_flags  # noqa: E402


def main() -> None:
    args = parse_finetune()  # bad settings end here, before the slow imports

    import torch

    from data import load_dataset
    from vit.checkpoint import (
        CheckpointError,
        CheckpointFolder,
        gather_weights,
        load_checkpoint,
        read_meta,
        resume_run,
        settings_of,
    )
    from vit.data.dataset import DataError, Split
    from vit.data.decode import decode_dataset
    from vit.data.loaders import BatchDataset, default_num_workers, eval_batches, make_loader
    from vit.data.transforms import RandomResizedCrop, transform_of_processor
    from vit.distributed import destroy_distributed, import_libraries, init_distributed, peak_memory_gib
    from vit.engine import Engine
    from vit.files import remove_folder, write_atomically, write_jsonl
    from vit.hub import upload
    from vit.model import export_model, load_model
    from vit.model_variants import add_drop_path
    from vit.parallel.plugins import boost
    from vit.report.card import model_card
    from vit.report.charts import epoch_chart
    from vit.report.tables import ranking_key
    from vit.run_folder import (
        count_skipped,
        environment,
        epoch_row,
        log_epoch,
        open_run_folder,
        tensorboard_writer,
    )
    from vit.schedule import BatchPlan, cosine_with_warmup
    from vit.step import Mixup, Normalize
    from vit.system import local_world_size
    from vit.trainer import EpochProgress, Interrupted, NonFiniteLoss, SignalHandler

    with SignalHandler() as stop:
        import_libraries()
        stop.end_if_set()
        started = time.perf_counter()
        init_distributed(args.seed)
        layout = args.layout
        output = Path(args.output_path)

        # ---- data and model
        try:
            images = load_dataset(args)
            torch.manual_seed(args.seed)
            loaded = load_model(args.model_name_or_path, images.label_names, layout.tp, args.image_size)
            resize = transform_of_processor(loaded.processor)
            augment = (
                RandomResizedCrop(resize.size, args.seed, resize.resample, policy=args.auto_augment)
                if args.augment
                else None
            )
            images, decoded_bytes = decode_dataset(images, resize, augment, args, local_world_size())
            if args.eval_only and loaded.untrained:
                raise ValueError(
                    f"--eval_only: {args.model_name_or_path} was not trained on the labels of "
                    f"{args.dataset} ({', '.join(images.label_names[:5])}, ...)"
                )
        except (ValueError, OSError) as error:
            exit_with_errors(str(error))
        args.notes += images.notes + loaded.notes
        config = loaded.model.config

        # ---- plan
        schedule = BatchPlan(
            len(images.train), args.batch_size, args.gradient_accumulation_steps, layout, args.seed
        )
        total_steps = schedule.steps * args.num_epoch
        warmup_steps = round(total_steps * args.warmup_ratio)
        peak_lr = args.learning_rate * (layout.dp if args.scale_lr else 1)
        if len(images.train) < schedule.per_step:
            args.notes.append(
                f"{len(images.train)} training images are fewer than a step's {schedule.per_step}: "
                "every step sees all of them"
            )
        parameters = sum(p.numel() for p in loaded.model.parameters())
        print_plan(args, schedule, images, resize.size, decoded_bytes, parameters, peak_lr, warmup_steps)
        if args.dry_run:
            print_rank0("dry run: nothing was trained or written")
            return destroy_distributed()

        # ---- boost
        boosted = boost(loaded.model, args, layout, args.layer_decay)
        if args.drop_path:
            add_drop_path(boosted.model, args.drop_path, config.num_hidden_layers)
            torch.manual_seed(args.seed + layout.dp_rank)  # other images, other draws
        if args.ema:
            boosted.keep_average(args.ema)
        labels = len(images.label_names)
        normalize = Normalize(tuple(loaded.processor.image_mean), tuple(loaded.processor.image_std))
        mix = (
            Mixup(args.mixup, args.cutmix, labels, args.seed, layout.dp_rank)
            if args.mixup or args.cutmix
            else None
        )
        engine = Engine(boosted, labels, normalize, args.label_smoothing, mix)
        workers = (
            args.num_workers
            if args.num_workers is not None
            else default_num_workers(images, augment, local_world_size())
        )

        def evaluate(split: Split, stop: SignalHandler | None = None) -> dict:
            order = eval_batches(len(split), schedule.rows, layout)
            plain = BatchDataset(split, resize, None, args.skip_bad_images)
            return engine.evaluate(
                iter(make_loader(plain, order, 0 if split.resized is not None else workers)), len(split), stop
            )

        if args.eval_only:
            for split in (images.validation, images.test):
                if split is not None:
                    try:
                        result = evaluate(split, stop)
                    except Interrupted as stopped:
                        destroy_distributed()
                        sys.exit(128 + stopped.signum)
                    print_rank0(
                        f"{split.name}: average_loss={result['average_loss']:.4f}, "
                        f"accuracy={result['accuracy']:.4f} ({result['images']} images)"
                    )
            return destroy_distributed()

        # ---- output folder, or the run to go on with
        checkpoints, trained_on = (
            CheckpointFolder(output / "checkpoints", args.keep_checkpoints),
            [len(images.train), images.label_names],
        )
        rows = [
            {
                "kind": "run",
                **environment(),
                "layout": str(layout),
                "command": recorded_command(),
                "settings": settings_of(args),
                "held_out": images.held_out,
            }
        ]
        progress, first_epoch, first_step = EpochProgress(), 0, 0
        try:
            if resumed := resume_run(checkpoints, args, boosted, trained_on):
                found, meta = resumed
                rows += meta["rows"]
                if meta["best_epoch"]:
                    checkpoints.adopt_best(meta["best_epoch"], found)
                progress = EpochProgress(**meta["progress"])
                first_epoch = meta["epoch"]
                # the position is kept in images, so that another number of processes finds its place
                first_step = -(-progress.images // schedule.per_step)
                print_rank0(
                    f"  resumed   {found}, epoch {first_epoch + 1}, step {first_step} of {schedule.steps}"
                )
        except CheckpointError as error:
            exit_with_errors(str(error))
        if rank() == 0:
            open_run_folder(output, args.overwrite_output)
            write_jsonl(output / "metrics.jsonl", rows)
        writer = tensorboard_writer(output) if args.tensorboard and rank() == 0 else None

        def lr_at(step: int) -> float:
            return cosine_with_warmup(step, total_steps, warmup_steps, peak_lr)

        def save(step: int, epoch: int) -> None:
            meta = dict(
                step=step,
                epoch=epoch,
                progress=vars(progress),
                rows=rows[1:],
                best_epoch=best and best["epoch"],
                processes=layout.world,
                settings=settings_of(args),
                data=trained_on,
            )
            checkpoints.save(boosted, meta)

        # ---- train
        # a list: drawn from later, when first_step has changed
        starts = [
            (epoch, first_step if epoch == first_epoch else 0) for epoch in range(first_epoch, args.num_epoch)
        ]
        order = itertools.chain.from_iterable(itertools.starmap(schedule.batches, starts))
        training_set = BatchDataset(images.train, resize, augment, args.skip_bad_images)
        skipped: list[str] = []  # by this process in this epoch

        def read_batches():
            for batch in make_loader(training_set, order, workers):
                skipped.extend(batch.pop("skipped"))
                yield batch

        batches = read_batches()
        print_rank0(f"  ready     {time.perf_counter() - started:.1f} s from the imports to the first step\n")
        best = next((row for row in rows if row["kind"] == "epoch" and row["best"]), None)
        try:
            for epoch in range(first_epoch, args.num_epoch):
                done = epoch * schedule.steps
                engine.train_epoch(
                    (list(itertools.islice(batches, schedule.batches_per_step)) for _ in itertools.count()),
                    schedule.images_per_step[first_step:],
                    lr_at,
                    first_step=done + first_step,
                    progress=progress,
                    label=f"epoch {epoch + 1}/{args.num_epoch}",
                    stop=stop,
                    save_every=args.checkpoint_steps,
                    save=lambda step: save(step, epoch),
                )
                evaluated_at = time.perf_counter()
                result = evaluate(images.validation, stop)
                last_lr, took = lr_at(done + schedule.steps - 1), time.perf_counter() - evaluated_at
                row = epoch_row(epoch + 1, result, progress, last_lr, took, peak_memory_gib())
                if args.skip_bad_images:
                    count_skipped(row, skipped, images.train.unreadable)
                    skipped.clear()
                row["best"] = best is None or args.keep == "last" or ranking_key(row) > ranking_key(best)
                rows.append(row)
                if row["best"]:
                    if best is not None:
                        best["best"] = False
                    best = row
                progress, first_step = EpochProgress(), 0
                save(done + schedule.steps, epoch + 1)
                if rank() == 0:
                    write_jsonl(output / "metrics.jsonl", rows)
                    log_epoch(writer, row)
                # the published form, then what it does not say
                print_rank0(
                    f"Evaluation result for epoch {epoch + 1}: average_loss={row['average_loss']:.4f}, "
                    f"accuracy={row['accuracy']:.4f}."
                    f"  (train loss {row['train_loss']:.4f}, {row['steps_per_second']:.2f} it/s, "
                    f"{row['images_per_second']:.0f} images/s, "
                    f"{row['seconds']:.1f} s, peak memory {row['peak_memory_gib']:.2f} GiB)"
                )
        except Interrupted as stopped:
            step = epoch * schedule.steps - (-progress.images // schedule.per_step)
            save(step, epoch)
            print_rank0(f"stopped after step {step}; checkpoint saved: continue with --resume auto")
            destroy_distributed()
            sys.exit(128 + stopped.signum)
        except NonFiniteLoss as error:
            kept = f" The last checkpoint in {checkpoints.root} is from before." if checkpoints.all() else ""
            destroy_distributed()
            exit_with_errors(f"{error.mend(args, '--learning_rate', '--max_norm 1')}.{kept}", code=1)
        except DataError as error:  # in the middle of an epoch, on one process: torchrun ends the others
            print(f"error: {str(error).strip().splitlines()[-1]}", file=sys.stderr, flush=True)
            os._exit(1)

        # ---- the epoch to keep: test it once, export it
        if best["epoch"] != args.num_epoch:
            path = checkpoints.end_of(best["epoch"])
            load_checkpoint(path, boosted, read_meta(path))
        if images.test is not None:
            result = evaluate(images.test)
            rows.append({"kind": "test", "epoch": best["epoch"], **result})
            print_rank0(
                f"Test result of epoch {best['epoch']}: average_loss={result['average_loss']:.4f}, "
                f"accuracy={result['accuracy']:.4f} ({result['images']} images)"
            )
        weights = gather_weights(boosted, output)
        rows.append({"kind": "end", "seconds": time.perf_counter() - started})
        if rank() == 0:
            export_model(weights, config, loaded.processor, output)
            write_jsonl(output / "metrics.jsonl", rows)
            epoch_chart(
                rows,
                output / "metrics.png",
                f"{Path(args.model_name_or_path).name} on {Path(args.dataset).name}, {args.plugin} "
                f"{args.precision}",
            )
            settings = settings_of(args) | {"preset": args.preset}
            write_atomically(output / "README.md", model_card(rows, settings, images.label_names))
            if args.keep_checkpoints == 0:
                remove_folder(checkpoints.root)
            if writer is not None:
                writer.close()
        print_rank0(
            f"\n{args.keep} epoch {best['epoch']} is in {output}/ "
            f"({time.perf_counter() - started:.0f} s since the imports): {predict_command(output)}"
        )
        destroy_distributed()
        if args.push_to_hub and rank() == 0:
            upload(output, args.push_to_hub)


def print_plan(
    args, schedule, images, size: int, decoded: int, parameters: int, peak_lr: float, warmup_steps: int
) -> None:
    """What this run will do, before it does it. ``size`` in pixels, ``decoded`` in bytes."""
    layout = args.layout
    memory = [
        "gradient checkpointing" * args.grad_checkpoint,
        f"{args.offload_optim_frac:.0%} of optimizer states offloaded" * (args.offload_optim_frac > 0),
        f"{args.num_microbatches} micro-batches" * (layout.pp > 1),
    ]
    counts = ", ".join(f"{split.name} {len(split)}" for split in images.splits())
    kept = (
        f"{decoded / 2**20:.0f} MiB decoded in each process"
        if decoded
        else "decoded as they are used (--data_memory)"
    )
    scaled = (
        f" ({args.learning_rate:.3g} x dp {layout.dp}; --no-scale_lr keeps it)"
        if args.scale_lr and layout.dp > 1
        else ""
    )
    print_rank0(f"\n{args.model_name_or_path} on {args.dataset}")
    print_rank0(
        f"  layout    {', '.join(filter(None, [f'{layout}; plugin {args.plugin}', args.precision, f'preset {args.preset}', *memory]))}"
    )
    print_rank0(f"  data      {counts} images of {len(images.label_names)} classes, {size} px; {kept}")
    print_rank0(f"  schedule  {args.num_epoch} epochs x {schedule.steps} steps of {schedule.per_step} images")
    print_rank0(
        f"            = batch {args.batch_size} x accumulation "
        f"{args.gradient_accumulation_steps} x dp {layout.dp}"
    )
    print_rank0(
        f"  learning  rate {peak_lr:.3g}{scaled}, warm-up {warmup_steps} steps, weight decay "
        f"{args.weight_decay:g}, seed {args.seed}"
    )
    if (recipe := augmentation_flags(vars(args))) != "none":
        print_rank0(f"  recipe    {recipe}")
    print_rank0(f"  model     {parameters / 1e6:.1f} M parameters")
    for note in args.notes:
        print_rank0(f"  note      {note}")


if __name__ == "__main__":
    main()
