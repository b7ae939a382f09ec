"""The learning rate of a step, which images are in which step, and the layout's arithmetic."""

import math
from dataclasses import replace

import pytest
from helpers import settings

from vit.layout import ParallelLayout
from vit.schedule import BatchPlan, CosineWithWarmup, plan_schedule


def test_learning_rate_warms_up_linearly_then_follows_a_cosine_to_zero():
    rates = [CosineWithWarmup(peak=0.8, total_steps=10, warmup_steps=4)(step) for step in range(10)]
    assert rates[:4] == pytest.approx([0.2, 0.4, 0.6, 0.8])
    assert rates[4] == pytest.approx(0.8) and rates[7] == pytest.approx(0.4)  # the middle of the cosine
    assert rates[9] == pytest.approx(0.4 * (1 + math.cos(math.pi * 5 / 6)))
    assert rates[4:] == sorted(rates[4:], reverse=True) and rates[-1] > 0


@pytest.mark.parametrize("warmup, expected", [(0, [1.0, 0.5]), (2, [0.5, 1.0]), (1, [1.0, 1.0])])
def test_learning_rate_at_the_edges(warmup, expected):
    rate = CosineWithWarmup(1.0, 2, warmup)
    assert [rate(0), rate(1)] == pytest.approx(expected)


def test_schedule_of_settings_warms_up_for_its_part_of_all_steps():
    chosen = settings("--batch_size", 4, "--num_epoch", 4, "--warmup_ratio", 0.3, "--learning_rate", 0.1)
    plan, rate, _ = plan_schedule(chosen, images=28)
    assert plan.steps_per_epoch == 7
    assert rate == CosineWithWarmup(0.1, total_steps=28, warmup_steps=8)  # of 8.4
    assert plan_schedule(replace(chosen, num_epoch=5), 28)[1].warmup_steps == 10  # of 10.5, to even
    two = replace(chosen, layout=ParallelLayout(4, tensor_size=2))
    assert plan_schedule(two, 28)[1].peak == 0.2


def test_layout_gives_every_process_its_own_place():
    layouts = [ParallelLayout(8, 2, 2, rank) for rank in range(8)]
    places = {(lay.data_parallel_rank, lay.pipeline_rank, lay.tensor_rank) for lay in layouts}
    assert places == {(d, p, t) for d in range(2) for p in range(2) for t in range(2)}
    assert sum(lay.reports_loss for lay in layouts) == layouts[0].data_parallel_size == 2
    assert layouts[1].tensor_rank == 1  # tensor-parallel processes are neighbours


# ---- batches


def plans(images, batch_size, accumulation=1, world=1, tp=1, pp=1, seed=42):
    """The plan of every rank."""
    return [
        BatchPlan(images, batch_size, accumulation, ParallelLayout(world, tp, pp, rank), seed)
        for rank in range(world)
    ]


def seen(parts, epoch, first_step=0):
    """Real images of each step over all data-parallel groups."""
    steps = {}
    for part in parts:
        if part.layout.reports_loss:
            for i, batch in enumerate(part.batches(epoch, first_step)):
                images = [image for _, image in batch if image >= 0]
                steps.setdefault(first_step + i // part.micro_batches_per_step, []).extend(images)
    return [sorted(steps[step]) for step in sorted(steps)]


GROUPINGS = [
    dict(world=1, batch_size=8),
    dict(world=2, batch_size=4),
    dict(world=4, batch_size=2),
    dict(world=8, batch_size=1),
    dict(world=4, batch_size=4, tp=2),
    dict(world=4, batch_size=4, pp=2),
    dict(world=2, batch_size=2, accumulation=2),
    dict(world=1, batch_size=2, accumulation=4),
    dict(world=2, batch_size=4, accumulation=2, pp=2),
]


@pytest.mark.parametrize("grouping", GROUPINGS, ids=str)
def test_each_step_takes_the_same_images_however_processes_share_them(grouping):
    parts = plans(22, **grouping)
    assert seen(parts, 3) == seen(plans(22, 8), 3)
    assert {part.steps_per_epoch for part in parts} == {3}
    assert parts[0].images_per_step == 8 and parts[0].real_images_per_step == [8, 8, 6]
    sizes = {len(batch) for part in parts for batch in part.batches(3)}
    assert sizes == {parts[0].local_batch_size}  # the last batch too
    assert min(image for part in parts for batch in part.batches(3) for _, image in batch) == -1  # padding


@pytest.mark.parametrize("grouping", GROUPINGS, ids=str)
def test_every_epoch_takes_every_image_exactly_once(grouping):
    for images in (22, 24, 1):
        parts = plans(images, **grouping)
        assert sorted(sum(seen(parts, 0), [])) == list(range(images))


def test_processes_of_one_tensor_or_pipeline_group_take_the_same_images():
    a, b, c, d = (list(part.batches(1)) for part in plans(22, 4, world=4, tp=2))
    assert a == b and c == d and a != c
    a, b, c, d = (list(part.batches(1)) for part in plans(22, 4, world=4, pp=2))
    assert a == b and c == d and a != c


def test_a_pipeline_takes_the_images_of_a_step_as_one_batch():
    """It cuts them into micro-batches by itself; elsewhere accumulation means several batches."""
    piped, plain = plans(22, 4, accumulation=2, world=2, pp=2)[0], plans(22, 4, accumulation=2)[0]
    assert (piped.micro_batches_per_step, piped.local_batch_size, piped.images_per_step) == (1, 8, 8)
    assert (plain.micro_batches_per_step, plain.local_batch_size, plain.images_per_step) == (2, 4, 8)


def test_order_follows_epoch_and_seed():
    epochs = [sum(seen(plans(22, 1), epoch), []) for epoch in range(3)]
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0] and epochs[0] != list(range(22))
    assert epochs[0] == sum(seen(plans(22, 1), 0), [])
    assert epochs[0] != sum(seen(plans(22, 1, seed=43), 0), [])


@pytest.mark.parametrize("grouping", GROUPINGS, ids=str)
def test_epoch_resumed_in_the_middle_takes_the_rest(grouping):
    parts = plans(22, **grouping)
    for part in parts:
        assert list(part.batches(2, 1)) == list(part.batches(2))[part.micro_batches_per_step :]
        assert list(part.batches(2, 3)) == []
    assert seen(parts, 2, first_step=1) == seen(parts, 2)[1:]


@pytest.mark.parametrize("world, tp, pp", [(1, 1, 1), (2, 1, 1), (4, 1, 1), (4, 2, 1), (4, 1, 2), (4, 2, 2)])
@pytest.mark.parametrize("images", [1, 13, 16])
def test_evaluation_takes_every_image_exactly_once(world, tp, pp, images):
    parts = plans(22, 4, world=world, tp=tp, pp=pp)
    orders = [part.evaluation_batches(images) for part in parts]
    assert {len(order) for order in orders} == {len(orders[0])}
    assert {len(batch) for order in orders for batch in order} == {4}
    reporting = [order for part, order in zip(parts, orders) if part.layout.reports_loss]
    taken = [image for order in reporting for batch in order for _, image in batch]
    assert sorted(image for image in taken if image >= 0) == list(range(images))


def test_evaluation_goes_through_the_images_in_order():
    first, second = (part.evaluation_batches(13) for part in plans(0, 4, world=2))
    assert first == [[(0, i) for i in range(4)], [(0, i) for i in range(8, 12)]]
    assert second == [[(0, i) for i in range(4, 8)], [(0, 12), (0, -1), (0, -1), (0, -1)]]


def test_plan_of_settings_has_their_sizes():
    chosen = settings("--batch_size", 4, "--gradient_accumulation_steps", 2, "--seed", 7)
    assert BatchPlan.of(chosen, 22) == BatchPlan(22, 4, 2, ParallelLayout(1), 7)
