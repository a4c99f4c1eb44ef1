"""The training loop of one model: what it steps down, when it saves, and what a stop or a loss of NaN does."""

import math
import os
import signal

import pytest
import torch

from trainer.common.progress import Terminated, TrainingError
from trainer.training.optimise import optimise


class Run:
    """A weight of 1, gradient descent at rate 0.1, and what was saved at which step."""

    def __init__(self, loss, steps=4, save_every=100, **options):
        self.weight = torch.nn.Parameter(torch.ones(()))
        self.step, self.saved = 0, {}
        self.loss = loss
        optimizer = torch.optim.SGD([self.weight], 0.1)
        schedule = torch.optim.lr_scheduler.ConstantLR(optimizer, 1.0)
        self.train = lambda: optimise(
            optimizer, schedule, self.step_loss, steps=steps, samples=1, save=self.save, save_every=save_every,
            **options,
        )  # fmt: skip

    def step_loss(self, step):
        assert step == self.step + 1
        self.step = step
        return self.loss(step, self.weight)

    def save(self):
        self.saved[self.step] = self.weight.item()


def fall(step, weight):
    return {"loss": 0.5 * weight}


def test_it_saves_every_so_often_and_after_the_last_step():
    run = Run(fall, steps=5, save_every=2)
    run.train()
    assert run.saved == pytest.approx({2: 0.9, 4: 0.8, 5: 0.75})


def test_losses_are_weighted_and_the_gradient_is_clipped():
    def two(step, weight):
        return {"first": weight, "second": 10 * weight}

    for max_norm, gradient in ((math.inf, 6.0), (1.0, 1.0)):
        run = Run(two, steps=1, weights={"second": 0.5}, max_norm=max_norm)
        run.train()
        assert run.saved[1] == pytest.approx(1 - 0.1 * gradient, rel=1e-5)


def test_after_each_step_an_average_may_follow():
    seen = []
    run = Run(fall, steps=3, after_step=lambda: seen.append((run.step, run.weight.item())))
    run.train()
    assert seen == [(1, pytest.approx(0.95)), (2, pytest.approx(0.9)), (3, pytest.approx(0.85))]


@pytest.mark.parametrize(
    ("sent", "raised"), [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, Terminated)]
)
def test_a_stop_finishes_the_step_saves_and_is_passed_on(sent, raised):
    def stop_in_the_second(step, weight):
        if step == 2:
            os.kill(os.getpid(), sent)
        return fall(step, weight)

    run = Run(stop_in_the_second)
    with pytest.raises(raised):
        run.train()
    assert run.saved == pytest.approx({2: 0.9})


def test_a_loss_that_is_not_finite_is_an_error_and_changes_nothing():
    run = Run(lambda step, weight: {"loss": weight * (math.nan if step == 3 else 0.5)}, save_every=1)
    with pytest.raises(
        TrainingError, match=r"step 3: the loss is nan \(loss nan\).*Set a lower learning rate"
    ):
        run.train()
    assert run.weight.item() == pytest.approx(0.9) and run.saved == pytest.approx({1: 0.95, 2: 0.9})
