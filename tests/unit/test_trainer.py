"""What an epoch's row says: sums over the epoch, which epoch is the best, memory of all processes."""

from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from helpers import settings

from vit import distributed
from vit.layout import ParallelLayout
from vit.parallel.boost import boost
from vit.run_folder import RunFolder
from vit.schedule import BatchPlan, CosineWithWarmup
from vit.settings import Settings
from vit.trainer import EpochProgress, NonFiniteLoss, Position, Trainer


@pytest.fixture
def alone(monkeypatch):
    """Collectives of one process, without a process group."""
    for name in ("trainer.all_reduce_sum", "signals.all_reduce_max"):
        monkeypatch.setattr(f"vit.{name}", lambda values: values)


def trainer_of(losses: dict[int, float], position: Position, **changes) -> Trainer:
    """A trainer of 22 images, 8 a step. ``losses``: of each global step."""
    chosen = SimpleNamespace(num_epoch=2, checkpoint_steps=0, **changes)
    plan = BatchPlan(22, 8, 1, ParallelLayout(1), seed=0)

    def step(batches, images, learning_rate, global_step):
        return torch.tensor(losses[global_step], dtype=torch.float64)

    step.model = SimpleNamespace(train=lambda: None)
    run = SimpleNamespace(settings=chosen)
    stop = SimpleNamespace(of_any_rank=lambda: 0)
    trainer = Trainer(step, None, plan, CosineWithWarmup(1.0, 6, 2), run, None, stop)
    trainer.position = position
    return trainer


@pytest.mark.parametrize("window", [1, 2, 50], ids="a read every {} steps".format)
def test_loss_of_an_epoch_is_the_mean_over_its_images_also_where_the_last_step_has_fewer(
    alone, monkeypatch, window
):
    monkeypatch.setattr("vit.trainer.MAX_STEPS_BETWEEN_LOSS_READS", window)
    trainer = trainer_of({3: 4.0, 4: 2.0, 5: 1.0}, Position(epoch=1))
    trainer.train_epoch(iter([{}] * 3))
    progress = trainer.position.progress
    assert progress.loss_sum == 8 * 4.0 + 8 * 2.0 + 6 * 1.0
    assert (progress.images, progress.steps) == (22, 3) and progress.seconds > 0


def test_epoch_that_was_resumed_in_its_middle_reports_all_of_it(alone):
    before = EpochProgress(loss_sum=8 * 4.0, images=8, steps=1, seconds=10.0)
    trainer = trainer_of({4: 2.0, 5: 1.0}, Position(1, before))
    assert trainer.position.global_step(trainer.plan) == 4
    trainer.train_epoch(iter([{}] * 2))
    progress = trainer.position.progress
    assert progress.loss_sum == 8 * 4.0 + 8 * 2.0 + 6 * 1.0
    assert (progress.images, progress.steps) == (22, 3) and progress.seconds > 10


class Bar:
    """Stands for the progress bar of an epoch."""

    def __init__(self, total, title):
        self.total, self.title, self.steps, self.said = total, title, [], []
        self.update, self.set_postfix_str = self.steps.append, self.said.append

    def __enter__(self):
        return self

    def __exit__(self, *error):
        pass


def timed_epoch(monkeypatch, steps: int, seconds: list[float], **changes) -> tuple[Trainer, Bar]:
    """The second epoch, of ``steps`` steps of 8 images; ``seconds``: of each, by a clock of its own."""
    clock, bars = [100.0], []
    monkeypatch.setattr("vit.trainer.time.perf_counter", lambda: clock[0])
    monkeypatch.setattr("vit.trainer.progress_bar", lambda *args: bars.append(Bar(*args)) or bars[0])
    trainer = trainer_of(None, Position(epoch=1), **changes)
    trainer.plan = BatchPlan(8 * steps, 8, 1, ParallelLayout(1), seed=0)

    def step(batches, images, learning_rate, global_step):
        clock[0] += seconds[global_step - steps]
        return torch.tensor(float(global_step))

    step.model, trainer.step = SimpleNamespace(train=lambda: None), step
    trainer.train_epoch(iter([{}] * steps))
    return trainer, bars[0]


def test_losses_are_read_about_once_in_so_many_seconds(alone, monkeypatch):
    monkeypatch.setattr("vit.trainer.SECONDS_BETWEEN_LOSS_READS", 2.0)
    monkeypatch.setattr("vit.trainer.MAX_STEPS_BETWEEN_LOSS_READS", 50)
    trainer, bar = timed_epoch(monkeypatch, 80, [0.5] * 5 + [3.0] * 5 + [0.01] * 70)
    # one step, then as many as take 2 s if they are as fast as those before, but from 1 to 50
    assert bar.steps == [1, 4, 4, 1, 1, 50, 19]
    assert trainer.position.progress.seconds == pytest.approx(18.2) and bar.total == 80
    assert bar.title == "epoch 2/2"
    assert bar.said[1] == f"loss 84.0000, lr {trainer.learning_rate(84):.2e}, 16 images/s"


def test_time_of_steps_is_the_mean_of_all_ranks(alone, monkeypatch):
    trainer = trainer_of({}, Position())
    trainer.plan = BatchPlan(22, 4, 1, ParallelLayout(2), seed=0)
    monkeypatch.setattr("vit.trainer.time.perf_counter", lambda: 7.0)
    monkeypatch.setattr("vit.trainer.all_reduce_sum", lambda values: values + torch.tensor([1.0, 6.0]))
    means, _, seconds = trainer.read_losses([torch.tensor(0.5)], since=3.0)
    assert means == [1.5] and seconds == (4 + 6) / 2


@pytest.mark.parametrize("every, saved", [(0, []), (1, [4, 5, 6]), (2, [4, 6]), (3, [6]), (4, [4]), (5, [5])])
def test_checkpoint_steps_count_the_steps_of_the_whole_training(alone, every, saved):
    """The second epoch has the steps 4, 5 and 6; a checkpoint has all of them up to its own."""
    trainer, found = trainer_of({3: 4.0, 4: 2.0, 5: 1.0}, Position(epoch=1)), []
    trainer.settings.checkpoint_steps = every
    trainer.save = lambda: found.append(trainer.position.global_step(trainer.plan))
    trainer.train_epoch(iter([{}] * 3))
    assert found == saved


def test_progress_weighs_losses_by_images():
    progress = EpochProgress()
    progress.add([1.0, 2.0], [8, 8], 3.0)
    progress.add([5.0], [6], 1.0)
    assert progress == EpochProgress(loss_sum=54.0, images=22, steps=3, seconds=4.0)


# ---- rows


def run_of(**changes) -> RunFolder:
    run = RunFolder.__new__(RunFolder)
    run.settings, run.rows = settings(*changes.pop("flags", ())), [{"kind": "run"}]
    return run


def add_epochs(run: RunFolder, results: list[tuple[float, ...]]) -> list[bool]:
    """Rows of epochs with these accuracies, losses and macro F1s. -> which is the best after the last one"""
    progress = EpochProgress(loss_sum=55.0, images=22, steps=3, seconds=4.0)
    for epoch, numbers in enumerate(results, 1):
        result = dict(zip(("accuracy", "average_loss", "macro_f1"), numbers)) | {"images": 13}
        run.add_epoch(epoch, result, progress, 0.1, 1.0, 2.0, None)
        assert sum(row["best"] for row in run.rows[1:]) == 1
    return [row["best"] for row in run.rows[1:]]


def test_row_has_means_over_images_and_over_time():
    run = run_of()
    add_epochs(run, [(0.5, 1.0)])
    row = run.rows[-1]
    assert row["train_loss"] == 2.5 and row["images_per_second"] == 5.5 and row["steps_per_second"] == 0.75


@pytest.mark.parametrize(
    "results, best",
    [
        ([(0.5, 1.0), (0.6, 2.0), (0.55, 0.1)], 2),  # the accuracy decides
        ([(0.5, 1.0), (0.5, 0.9), (0.5, 0.95)], 2),  # of equal ones the lower loss
        ([(0.5, 1.0), (0.5, 1.0), (0.5, 1.0)], 1),  # of equal ones the first
        ([(0.5, 1.0), (0.4, 0.5), (0.5, 1.0)], 1),
    ],
)
def test_best_epoch_has_the_highest_accuracy_then_the_lowest_loss_then_is_the_first(results, best):
    assert add_epochs(run_of(), results) == [epoch == best for epoch in (1, 2, 3)]


@pytest.mark.parametrize(
    "metric, results, best",
    [
        ("loss", [(0.6, 1.0), (0.5, 0.9), (0.7, 0.95)], 2),  # the loss decides
        ("loss", [(0.5, 1.0), (0.6, 1.0), (0.6, 1.0)], 2),  # of equal ones the higher accuracy
        ("loss", [(0.5, float("nan")), (0.4, 2.0), (0.6, float("nan"))], 2),  # no number is the worst
        ("macro_f1", [(0.6, 1.0, 0.3), (0.5, 2.0, 0.5), (0.7, 0.1, 0.4)], 2),
        ("macro_f1", [(0.6, 1.0, 0.5), (0.5, 0.9, 0.5), (0.7, 0.95, 0.5)], 2),  # then the lower loss
    ],
)
def test_best_epoch_is_chosen_by_the_selection_metric(metric, results, best):
    run = run_of(flags=("--selection_metric", metric, "--patience", 1))
    assert add_epochs(run, results) == [epoch == best for epoch in (1, 2, 3)]
    assert run.is_stalled(3) and not run.is_stalled(2)
    assert run.settings.selected_by == f" by {metric}"


def test_last_epoch_is_kept_whatever_it_measured():
    assert add_epochs(run_of(flags=("--keep", "last")), [(0.9, 0.1), (0.1, 3.0)]) == [False, True]


def test_last_epoch_needs_no_checkpoint_of_the_one_before(capsys):
    """It is the next epoch that will be exported, so a lost one is no matter."""
    before, resumed = (run_of(flags=("--keep", "last")) for _ in range(2))
    add_epochs(before, [(0.9, 0.1), (0.1, 3.0)])
    resumed.restore_rows(before.rows[1:], SimpleNamespace(why_lost=lambda epoch: "is gone"))
    assert resumed.best["epoch"] == 2 and not capsys.readouterr().out


@pytest.mark.parametrize("patience, ends", [(None, False), (1, True), (2, True), (3, False)])
def test_patience_counts_the_epochs_after_the_best(patience, ends):
    run = run_of(flags=("--patience", patience) if patience else ())
    assert not run.is_stalled(0)  # there is no epoch yet
    add_epochs(run, [(0.5, 1.0), (0.6, 1.0), (0.6, 1.0), (0.55, 0.1)])  # the second is the best
    assert not run.is_stalled(2) and run.is_stalled(4) == ends


def test_a_stalled_training_ends_and_also_when_it_is_resumed(alone, capsys):
    trained = []

    def trainer_at(epoch: int) -> Trainer:
        trainer = Trainer.__new__(Trainer)
        trainer.settings = settings("--patience", 2, "--num_epoch", 9)
        trainer.run, trainer.position = run_of(flags=("--patience", 2)), Position(epoch)
        add_epochs(trainer.run, [(0.5, 1.0), (0.6, 1.0)])
        trainer.batches, trainer.stop = lambda: iter(()), SimpleNamespace(start_training=lambda: None)
        trainer.train_epoch = lambda batches: trained.append(trainer.position.epoch)

        def finish_epoch():
            trainer.position = Position(trainer.position.epoch + 1)

        trainer.finish_epoch = finish_epoch
        trainer.step = SimpleNamespace(free_graphs=lambda: None)
        return trainer

    trainer_at(2).fit()
    assert trained == [2, 3]  # the third and the fourth epoch
    trainer_at(4).fit()
    assert trained == [2, 3] and "no epoch in 2 was better than epoch 2" in capsys.readouterr().out


@pytest.mark.parametrize("error", [None, NonFiniteLoss("nan"), KeyError("of a library")], ids=str)
def test_recorded_steps_are_freed_however_the_training_ends(error):
    """Otherwise NCCL would wait for them without an end when the process group is left."""

    def train_epoch(batches):
        if error:
            raise error
        trainer.position = Position(1)

    freed = []
    trainer = Trainer.__new__(Trainer)
    trainer.settings, trainer.position = settings("--num_epoch", 1), Position(0)
    trainer.run = SimpleNamespace(is_stalled=lambda epoch: False)
    trainer.batches, trainer.stop = lambda: iter(()), SimpleNamespace(start_training=lambda: None)
    trainer.train_epoch, trainer.finish_epoch = train_epoch, lambda: None
    trainer.step = SimpleNamespace(free_graphs=lambda: freed.append(True))
    with pytest.raises(type(error)) if error else nullcontext():
        trainer.fit()
    assert freed == [True]


# ---- processes


@pytest.mark.parametrize("others", [0.0, 1e6])
def test_peak_memory_is_the_largest_of_all_processes(monkeypatch, others):
    """``others``: GiB of another process, which takes part in the reduction."""
    calls = []

    def all_reduce(values, op):
        calls.append(op)
        values.clamp_(min=others)

    monkeypatch.setattr(torch.distributed, "all_reduce", all_reduce)
    peak = distributed.peak_memory_gib()
    assert calls == [torch.distributed.ReduceOp.MAX]
    assert peak == others if others else 0.01 < peak < 1e3


def test_data_parallel_ranks_draw_other_masks_and_the_ranks_of_one_group_the_same(monkeypatch):
    """Drop path draws from torch's generator, which `boost` seeds."""

    def masks(layout: ParallelLayout) -> torch.Tensor:
        from helpers import tiny_vit

        chosen = Settings(
            plugin="none", precision="fp32", layout=layout, drop_path=0.5, weight_decay=0.0, learning_rate=0.1
        )
        monkeypatch.setattr(
            "vit.parallel.boost.boost_plain", lambda model, optimizer, _: (None, model, optimizer)
        )
        torch.manual_seed(0)
        model = boost(tiny_vit(), chosen).model.train()
        with torch.no_grad():
            return model(torch.ones(16, 3, 16, 16)).logits[:, :3]

    first, second = (masks(ParallelLayout(2, rank=rank)) for rank in (0, 1))
    assert torch.equal(first, masks(ParallelLayout(2, rank=0))) and not torch.equal(first, second)
    group = [masks(ParallelLayout(4, tensor_size=2, rank=rank)) for rank in range(4)]
    assert torch.equal(group[0], group[1]) and torch.equal(group[2], group[3])
    assert not torch.equal(group[0], group[2])
