from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from train_support import settings_of

from tersenet.errors import TersenetError
from tersenet.train.distill import Objective, soft_loss

CPU = torch.device("cpu")
GENERATOR = torch.Generator().manual_seed(0)
STUDENT, TEACHER = torch.randn(5, 4, generator=GENERATOR), torch.randn(5, 4, generator=GENERATOR)
LABELS = torch.tensor([0, 1, 2, 3, 0])


class Constant(nn.Module):
    def __init__(self, outputs: Tensor) -> None:
        super().__init__()
        self.outputs = outputs

    def forward(self, x: Tensor) -> Tensor:
        assert not torch.is_grad_enabled()
        assert not self.training
        return self.outputs


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_soft_loss_is_the_scaled_divergence_by_hand(temperature: float) -> None:
    p, q = (TEACHER / temperature).softmax(1), (STUDENT / temperature).softmax(1)
    by_hand = temperature**2 * (p * (p / q).log()).sum() / 5
    assert float(soft_loss(STUDENT, TEACHER, temperature)) == pytest.approx(float(by_hand), rel=1e-5)


def test_soft_loss_of_equal_logits_is_zero() -> None:
    assert float(soft_loss(STUDENT, STUDENT, 4.0)) == pytest.approx(0, abs=1e-6)


def test_the_mixture() -> None:
    settings = settings_of(distill={"weight": 0.3, "temperature": 2.0}, label_smoothing=0.1)
    loss = Objective(settings, None, Constant(TEACHER), CPU)(None, STUDENT, LABELS)
    hard = functional.cross_entropy(STUDENT, LABELS, label_smoothing=0.1)
    assert float(loss) == pytest.approx(float(0.7 * hard + 0.3 * soft_loss(STUDENT, TEACHER, 2.0)), rel=1e-6)


def test_own_loss_without_a_teacher() -> None:
    objective = Objective(settings_of(), functional.mse_loss, Constant(TEACHER), CPU)
    assert torch.equal(objective(None, STUDENT, TEACHER), functional.mse_loss(STUDENT, TEACHER))


def test_contradictions_are_refused() -> None:
    with pytest.raises(TersenetError, match="none was given as the teacher"):
        Objective(settings_of(distill={}), None, None, CPU)
    with pytest.raises(TersenetError, match="belongs to cross entropy"):
        Objective(settings_of(label_smoothing=0.1), functional.mse_loss, None, CPU)
    with pytest.raises(TersenetError, match=r"teacher gives outputs \(5, 3\)"):
        Objective(settings_of(distill={}), None, Constant(TEACHER[:, :3]), CPU)(None, STUDENT, LABELS)
    with pytest.raises(TersenetError, match="logits"):
        Objective(settings_of(distill={}), functional.mse_loss, Constant(TEACHER), CPU)(None, STUDENT[0], TEACHER[0])
