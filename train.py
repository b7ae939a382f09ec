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
from pathlib import Path

from vit.console import silence_libraries

silence_libraries()  # before anything imports colossalai or transformers

from args import parse_scratch
from vit.config import vit_config  # noqa: E402
from vit.console import exit_with_errors, print_rank0, rank  # noqa: E402
from vit.run_folder import (
    predict_command,  # noqa: E402
    recorded_command,  # noqa: E402
)
from vit.settings import MESH_MODES


def build_boosted(args, labels: list[str]):
    """The config's model in its form of parallelism. -> (Boosted, HuggingFace config). Collective."""
    import torch

    from vit.model import build_vit, pad_classifier
    from vit.model_variants import add_drop_path, mimetic_init, sincos_position_embeddings_
    from vit.parallel.mesh import init_mesh, load_mesh_vit
    from vit.parallel.plugins import boost, boost_mesh

    values, layout = args.values, args.layout
    config = vit_config(values, labels)
    torch.manual_seed(values["SEED"])  # the same weights on every process and in every mode
    model = build_vit(config)
    if values["POSITIONS"] == "sincos":
        sincos_position_embeddings_(model)
    if values["INITIAL_WEIGHTS"] == "mimetic":
        mimetic_init(model)
    if args.plugin in MESH_MODES:
        init_mesh(values["mode"], values["tp"], values["depth"], values["SEED"])  # seeds dropout by rank
        return boost_mesh(load_mesh_vit(config, model.state_dict()), args, layout), config
    pad_classifier(model, layout.tp)
    boosted = boost(model, args, layout)
    if values["DROP_PATH"]:
        add_drop_path(boosted.model, values["DROP_PATH"], values["DEPTH"])
    torch.manual_seed(values["SEED"] + layout.dp_rank)  # of dropout: other images, other masks
    return boosted, config


def main(argv: list[str] | None = None) -> None:
    args = parse_scratch(argv)  # bad settings end here, before the slow imports

    from data import build_scratch_loaders
    from vit.checkpoint import CheckpointError, CheckpointFolder, gather_weights, resume_run
    from vit.data.dataset import DataError
    from vit.data.gpu_augment import BatchAugment
    from vit.data.loaders import eval_batches
    from vit.distributed import (
        destroy_distributed,
        device,
        import_libraries,
        init_distributed,
        peak_memory_gib,
    )
    from vit.engine import Engine
    from vit.files import write_atomically, write_jsonl
    from vit.model import export_model
    from vit.report.card import model_card
    from vit.report.charts import epoch_chart
    from vit.report.tables import plural
    from vit.run_folder import count_skipped, environment, epoch_row, open_run_folder
    from vit.schedule import BatchPlan, cosine_with_warmup
    from vit.step import Mixup, Normalize
    from vit.system import local_world_size
    from vit.trainer import EpochProgress, Interrupted, NonFiniteLoss, SignalHandler

    values, layout, output = args.values, args.layout, Path(args.output_path)
    seed, size, epochs = values["SEED"], values["IMG_SIZE"], values["NUM_EPOCHS"]
    with SignalHandler() as stop:
        import_libraries()
        stop.end_if_set()
        started = time.perf_counter()
        init_distributed(seed)

        # ---- images
        try:
            images = build_scratch_loaders(
                args.dataset, values, device(), local_world_size(), args.skip_bad_images
            )
        except (ValueError, OSError) as error:
            exit_with_errors(str(error).replace("--dataset ", "DATA="))
        train, evaluated, labels = images.train, images.evaluated, images.label_names
        flip = values["RANDOM_FLIP"] and not values["RANDOM_RESIZED_CROP"]  # which flips on the CPU
        augment = BatchAugment(
            seed, size, values["RANDOM_CROP_PADDING"], flip, values["AUTO_AUGMENT"], values["RAND_AUGMENT"]
        )

        # ---- plan and model
        schedule = BatchPlan(
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
        boosted, hf_config = build_boosted(args, labels)
        if values["EMA"]:
            boosted.keep_average(values["EMA"])
        mix = (
            Mixup(values["MIXUP"], values["CUTMIX"], len(labels), seed, layout.dp_rank)
            if values["MIXUP"] or values["CUTMIX"]
            else None
        )
        engine = Engine(boosted, len(labels), Normalize(*images.normal), values["LABEL_SMOOTHING"])
        print_rank0(f"\n{args.config} on {args.dataset}")
        print_rank0(
            f"  layout    {layout}; {values['mode']}, {args.precision}"
            + f", depth {values['depth']}" * (values["depth"] > 1)
            + f", {args.num_microbatches} micro-batches" * (layout.pp > 1)
        )
        mean, std = (", ".join(f"{v:.3f}" for v in numbers) for numbers in images.normal)
        print_rank0(
            f"  data      train {len(train)}, {evaluated.name} {len(evaluated)} images of "
            f"{len(labels)} classes, {size} px, {images.where}; mean {mean}, std {std}"
        )
        print_rank0(
            f"  schedule  {epochs} epochs x {schedule.steps} steps of {schedule.per_step} images "
            f"(batch {schedule.batch_size} x accumulation {schedule.accumulation} x dp {layout.dp})"
        )
        print_rank0(
            f"  learning  rate {args.learning_rate:.3g}, warm-up {warmup_steps} steps, weight "
            f"decay {args.weight_decay:g}, seed {seed}"
        )
        for note in args.notes + images.notes:
            print_rank0(f"  note      {note}")

        # ---- output folder, or the run to go on with
        checkpoints, trained_on = CheckpointFolder(output / "checkpoints", keep=1), [len(train), labels]
        rows = [
            {
                "kind": "run",
                **environment(),
                "layout": str(layout),
                "command": recorded_command(),
                "settings": args.settings,
                "held_out": images.held_out,
            }
        ]
        progress, first_epoch, first_step = EpochProgress(), 0, 0
        try:
            if resumed := resume_run(checkpoints, args, boosted, trained_on):
                found, meta = resumed
                rows += meta["rows"]
                progress, first_epoch = EpochProgress(**meta["progress"]), meta["epoch"]
                first_step = -(-progress.images // schedule.per_step)
                print_rank0(
                    f"  resumed   {found}, epoch {first_epoch + 1}, step {first_step} of {schedule.steps}"
                )
        except CheckpointError as error:
            exit_with_errors(str(error))
        if rank() == 0:
            open_run_folder(output, args.overwrite_output)
            write_jsonl(output / "metrics.jsonl", rows)

        def lr_at(step: int) -> float:
            return cosine_with_warmup(step, total_steps, warmup_steps, args.learning_rate)

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
            order = eval_batches(len(split), schedule.rows, layout)
            return engine.evaluate(split.batches(order), len(split), stop)

        # a list: drawn from later, when first_step has changed
        starts = [(epoch, first_step if epoch == first_epoch else 0) for epoch in range(first_epoch, epochs)]
        batches = train.batches(
            itertools.chain.from_iterable(itertools.starmap(schedule.batches, starts)), augment
        )
        print_rank0(f"  ready     {time.perf_counter() - started:.1f} s from the imports to the first step\n")

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
                row = epoch_row(epoch + 1, result, progress, last_lr, took, peak_memory_gib())
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
                    write_jsonl(output / "metrics.jsonl", rows)
                print_rank0(
                    f"Evaluation result for epoch {epoch + 1}: average_loss={row['average_loss']:.4f}, "
                    f"accuracy={row['accuracy']:.4f}."
                    f"  (train loss {row['train_loss']:.4f}, {row['images_per_second']:.0f} images/s, "
                    f"{row['seconds']:.1f} s, "
                    f"peak memory {row['peak_memory_gib']:.2f} GiB"
                    + (f", minival accuracy {row['minival_accuracy']:.4f})" if images.minival else ")")
                )
        except Interrupted as stopped:
            save(epoch)
            print_rank0("stopped; checkpoint saved: continue with --resume auto")
            destroy_distributed()
            sys.exit(128 + stopped.signum)
        except NonFiniteLoss as error:
            destroy_distributed()
            exit_with_errors(error.mend(args, "LEARNING_RATE", "clip_grad_norm = 1"), code=1)

        except DataError as error:  # in the middle of an epoch, on one process: torchrun ends the others
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
        weights = gather_weights(boosted, output)
        trained = sum(row["seconds"] for row in rows if row["kind"] == "epoch")
        rows.append({"kind": "end", "seconds": time.perf_counter() - started, "training_seconds": trained})
        if rank() == 0:
            export_model(weights, hf_config, images.processor, output)
            write_jsonl(output / "metrics.jsonl", rows)
            epoch_chart(
                rows,
                output / "metrics.png",
                f"{args.model_name_or_path} on {Path(args.dataset).name}, {values['mode']} {args.precision}",
                evaluated.name,
            )
            settings = {"model_name_or_path": args.model_name_or_path} | args.settings
            write_atomically(
                output / "README.md", model_card(rows, settings, labels, from_scratch=evaluated.name)
            )
        last = rows[-2]
        print_rank0(
            f"\n{evaluated.name} accuracy {last['accuracy']:.4f} after "
            f"{plural(epochs, 'epoch')}, {trained:.0f} s of training "
            f"({time.perf_counter() - started:.0f} s "
            f"{'since it resumed' if resumed else 'in all'})"
        )
        print_rank0(f"the model is in {output}/: {predict_command(output)}")
        destroy_distributed()


if __name__ == "__main__":
    main()
