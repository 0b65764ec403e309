"""What an episode of AMC is worth, and which of two is better."""

from __future__ import annotations

import math
from collections.abc import Sequence

from tersenet.errors import TersenetError
from tersenet.results import Accuracy
from tersenet.search.amc_settings import Episode, Reward


def value_of(accuracy: Accuracy) -> float:
    """top-1; the user's own metric where there is none, or less the loss.

    Raises:
        TersenetError: none of them is known.
    """
    for value in (accuracy.top1, accuracy.metric, None if accuracy.loss is None else -accuracy.loss):
        if value is not None:
            return value
    raise TersenetError("the data have neither classes, a metric nor a loss, so that no pruning is better than another")


def reward_of(reward: Reward, accuracy: Accuracy, macs: int, params: int) -> float:
    """Source: AMC, section 3.3: the accuracy under a budget; otherwise -error ln(MACs), or with parameters.

    Raises:
        TersenetError: an error is asked for where there are no classes.
    """
    if reward == "accuracy":
        return value_of(accuracy)
    if accuracy.top1 is None:
        raise TersenetError(f"the reward {reward} is made of the top-1 error: these data have no classes. Use accuracy")
    return -(1 - accuracy.top1) * math.log(max(macs if reward == "macs" else params, 1))


def below(rewards: Sequence[float]) -> float:
    """For a network of which nothing can be said: less than the least of `rewards`, by as much as that is away from
    zero, and at least by 1. A loss or a metric has no least value that could stand for it."""
    least = min(rewards)
    return least - max(1.0, abs(least))


def rank(episode: Episode) -> tuple[bool, float]:
    """Higher is better."""
    return episode.accuracy is not None, episode.reward


def shown(episode: Episode) -> float | None:
    """The figure by which progress is told, if there is one."""
    return None if episode.accuracy is None else value_of(episode.accuracy)
