"""Train a Vision Transformer from scratch by a config file, with data or tensor parallelism (1d to 3d).

    DATA=/path/to/cifar-10-batches-py CONFIG=configs/cifar10/vit_lite_7_4_2d.py bash run_accuracy.sh
    DATA=... torchrun --nproc_per_node=4 train.py --config=configs/cifar10/vit_lite_7_4_2d.py

Each process by itself, without a launcher:

    DATA=... python train.py --world_size=W --rank=R --local_rank=L --host=HOST --port=PORT --config=...

In order: check config and settings, join the processes, find the images, build the model, print the plan,
decode the images, boost the model, then epoch by epoch train, evaluate and save; at the end the last epoch is
exported.
"""

import time

from vit.console import silence_libraries

silence_libraries()  # before anything imports colossalai or transformers

from args import parse_scratch
from vit.watch import watch_launcher


def main(argv: list[str] | None = None) -> None:
    watch_launcher()
    settings = parse_scratch(argv)  # wrong settings end the program here, before the slow imports

    from vit.distributed import destroy_distributed, import_libraries, init_distributed
    from vit.run_lock import RunLock
    from vit.signals import SignalHandler

    with SignalHandler() as stop, RunLock(settings.output_path) as lock:
        import_libraries()
        started = time.perf_counter()
        init_distributed(settings.seed)
        lock.acquire()
        train(settings, stop, started)
        destroy_distributed()


def train(settings, stop, started: float) -> None:
    """The run that ``settings`` describe. Collective: every process of the launch calls it."""
    import torch

    from data import build_scratch_loaders
    from vit.checkpoint import CheckpointFolder
    from vit.config_settings import vit_config
    from vit.console import print_rank0
    from vit.data.dataset import one_line_errors
    from vit.data.processor import Normalize
    from vit.distributed import device
    from vit.initial_weights import build_vit
    from vit.model_variants import initialise
    from vit.parallel.boost import boost
    from vit.run_folder import RunFolder
    from vit.schedule import plan_schedule
    from vit.step import TrainStep
    from vit.trainer import Trainer, exits_in_one_line

    # --- data
    config = settings.config
    if torch.cuda.is_available():
        torch.set_num_threads(1)  # the CPU's tensors are small: waking other cores takes longer
    with one_line_errors("DATA="):
        loaders = build_scratch_loaders(settings, device())  # nothing is decoded yet
    labels = loaders.label_names
    plan, learning_rate, notes = plan_schedule(settings, len(loaders.train))
    loaders.notes.extend(notes)

    # --- model, in the config's form of parallelism
    torch.manual_seed(settings.seed)  # the same initial weights on every rank and in every mode
    model = build_vit(vit_config(config, labels))
    initialise(model, positions=config["POSITIONS"], weights=config["INITIAL_WEIGHTS"])
    run = RunFolder(settings, loaders, started)
    run.print_plan(plan, learning_rate, model)
    if loaders.decode:  # not synthetic
        with one_line_errors("DATA="):
            loaders = loaders.decode()
        plan, learning_rate, _ = plan_schedule(settings, len(loaders.train))
        run.replace_loaders(loaders, plan)
    normalize = Normalize.of(loaders.processor)
    print_rank0(f"  pixels    {normalize}")
    boosted = boost(model, settings)
    step = TrainStep.of(boosted, settings, len(labels), normalize, plan.steps_per_epoch)

    # --- train, and export the last epoch
    checkpoints = CheckpointFolder(run.path / "checkpoints", keep=1)
    trainer = Trainer(step, loaders, plan, learning_rate, run, checkpoints, stop)
    with exits_in_one_line(settings, checkpoints):
        if checkpoint := run.find_checkpoint(checkpoints):
            trainer.resume(checkpoint)
        run.open()
        trainer.fit()
        trainer.finish()
        run.export(boosted, model.config)


if __name__ == "__main__":
    main()
