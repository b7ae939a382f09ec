"""Fine-tune a Vision Transformer with a Colossal-AI plugin chosen by name. `bash run_demo.sh` launches it.

In order: check the settings, join the processes, find the images, load the model, print the plan, decode the
images, boost the model, then epoch by epoch train, evaluate and save; at the end the best (or the last) epoch
is tested and exported.
"""

import time
from pathlib import Path

from vit.console import silence_libraries

silence_libraries()  # before anything imports colossalai or transformers

from args import parse_finetune
from vit.watch import watch_launcher


def main() -> None:
    watch_launcher()
    settings = parse_finetune()  # wrong settings end the program here, before the slow imports

    from vit import hub
    from vit.console import rank
    from vit.distributed import destroy_distributed, import_libraries, init_distributed
    from vit.run_lock import RunLock
    from vit.signals import SignalHandler

    writes = not (settings.eval_only or settings.dry_run)
    with SignalHandler() as stop, RunLock(settings.output_path) as lock:
        import_libraries(lora=settings.lora_rank > 0)
        started = time.perf_counter()
        init_distributed(settings.seed)
        if writes:
            lock.acquire()
        fine_tune(settings, stop, started)
        destroy_distributed()
    if writes and settings.push_to_hub and rank() == 0:  # a signal may interrupt it: nothing is lost
        hub.upload(Path(settings.output_path), settings.push_to_hub)


def fine_tune(settings, stop, started: float) -> None:
    """The run that ``settings`` describe. Collective: every process of the launch calls it."""
    import torch

    from data import build_loaders, load_dataset
    from vit.checkpoint import CheckpointFolder
    from vit.console import exit_with_errors, print_rank0
    from vit.data.dataset import one_line_errors
    from vit.data.processor import Normalize
    from vit.distributed import device
    from vit.model import freeze_parameters, load_model
    from vit.parallel.boost import boost, decide_compilation
    from vit.run_folder import RunFolder, result_text
    from vit.schedule import plan_schedule
    from vit.step import TrainStep
    from vit.trainer import Trainer, exits_in_one_line

    # --- data and model
    with one_line_errors("--dataset "):
        dataset = load_dataset(settings)
        torch.manual_seed(settings.seed)
        loaded = load_model(settings.model_name_or_path, dataset.label_names, settings.image_size)
        freeze_parameters(loaded.model, settings.freeze, settings.pp_size)
        dataset.notes.extend(loaded.notes)
        loaders = build_loaders(dataset, settings, loaded.processor, device())  # nothing is decoded yet
    model, processor, labels = loaded.model, loaded.processor, len(dataset.label_names)
    plan, learning_rate, notes = plan_schedule(settings, len(loaders.train))
    loaders.notes.extend(notes)
    settings = decide_compilation(settings, model.config, labels, plan)
    run = RunFolder(settings, loaders, started)
    run.print_plan(plan, learning_rate, model)
    if settings.dry_run:
        return print_rank0("dry run: nothing was trained or written")
    if settings.eval_only and loaded.new_classifier:
        name = settings.model_name_or_path
        exit_with_errors(f"--eval_only: {name} was not trained on these labels: {loaders.labels_text}")
    with one_line_errors("--dataset "):
        loaders = loaders.decode()
    plan, learning_rate, _ = plan_schedule(settings, len(loaders.train))
    run.replace_loaders(loaders, plan)

    # --- optimizer, plugin, Booster.boost: vit/parallel/boost.py
    boosted = boost(model, settings)
    normalize, weights = Normalize.of(processor), loaders.summary.class_weights(settings.class_weights)
    step = TrainStep.of(boosted, settings, labels, normalize, plan.steps_per_epoch, weights)
    checkpoints = CheckpointFolder(run.path / "checkpoints", keep=settings.keep_checkpoints)
    trainer = Trainer(step, loaders, plan, learning_rate, run, checkpoints, stop)
    with exits_in_one_line(settings, checkpoints):
        if settings.eval_only:
            for loader in filter(None, (loaders.evaluated, loaders.test)):
                result = trainer.evaluate(loader)
                print_rank0(f"{loader.name}: {result_text(result)} ({result['images']} images)")
            return
        # --- train, then test and export the selected epoch
        if checkpoint := run.find_checkpoint(checkpoints):
            trainer.resume(checkpoint)
        run.open()
        trainer.fit()
        trainer.finish()
        run.export(boosted, model.config)


if __name__ == "__main__":
    main()
