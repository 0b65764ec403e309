from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, DistributedSampler, RandomSampler, TensorDataset

from tersenet.data.augment import CropFlip
from tersenet.data.bundle import Loader, LoaderAdapter, TensorLoader
from tersenet.data.order import generator
from tersenet.errors import TersenetError

N = 50
IMAGES = torch.randint(0, 256, (N, 3, 8, 8), dtype=torch.uint8, generator=generator("bundle"))
LABELS = torch.arange(N)


def training(**changes: Any) -> TensorLoader:
    settings: dict[str, Any] = {"batch_size": 16, "shuffle": True, "augment": CropFlip(2, True), "seed": 1}
    return TensorLoader(IMAGES, LABELS, **(settings | changes))


def same(first: list[Any], second: list[Any]) -> bool:
    return len(first) == len(second) and all(
        torch.equal(a[0], b[0]) and torch.equal(a[1], b[1]) for a, b in zip(first, second, strict=True)
    )


def test_the_same_epoch_is_bit_equal_whatever_ran_before() -> None:
    loader = training()
    third = list(loader.batches(3))
    torch.rand(100)
    next(iter(loader.batches(1)))
    list(loader.batches(2))
    assert same(list(loader.batches(3)), third)
    assert same(list(training().batches(3)), third)
    assert not same(list(loader.batches(4)), third)
    assert not same(list(training(seed=2).batches(3)), third)


def test_the_global_generator_is_left_alone() -> None:
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    list(training().batches(0))
    assert torch.equal(torch.rand(3), expected)


def test_two_ranks_see_together_what_one_does() -> None:
    alone = list(training(batch_size=10).batches(7))
    pairs = zip(*(training(batch_size=5, rank=rank, world=2).batches(7) for rank in range(2)), strict=True)
    for (images, labels), ((images0, labels0), (images1, labels1)) in zip(alone, pairs, strict=True):
        together = torch.cat([labels0, labels1])
        order = together.argsort()
        assert torch.equal(together[order], labels.sort().values)
        # Augmentation included.
        assert torch.equal(torch.cat([images0, images1])[order], images[labels.argsort()])


def test_evaluation_is_in_order_and_plain() -> None:
    loader = TensorLoader(IMAGES, LABELS, batch_size=16)
    images, labels = (torch.cat(parts) for parts in zip(*loader.batches(0), strict=True))
    assert torch.equal(labels, LABELS)
    assert torch.equal(images, IMAGES.float() / 255)
    assert (loader.n, len(loader)) == (N, 4)
    assert isinstance(loader, Loader)


def test_limit_and_indices() -> None:
    loader = TensorLoader(IMAGES, LABELS, batch_size=2, indices=torch.tensor([9, 3, 7]), limit=2)
    assert [labels.tolist() for _, labels in loader.batches(0)] == [[9, 3]]
    assert loader.n == 2


@pytest.mark.parametrize(
    ("images", "labels", "says"),
    [
        (IMAGES.float(), LABELS, "must be uint8"),
        (IMAGES[:, 0], LABELS, r"not torch.uint8 \(50, 8, 8\)"),
        (IMAGES, LABELS[:-1], r"there are 50 images, not torch.int64 \(49,\)"),
        (IMAGES, LABELS.float(), "labels must be int64"),
    ],
)
def test_wrong_tensors(images: torch.Tensor, labels: torch.Tensor, says: str) -> None:
    with pytest.raises(TersenetError, match=says):
        TensorLoader(images, labels, batch_size=4)


class Noisy(TensorDataset):
    """Draws from the global generator, as random transforms do."""

    def __getitem__(self, index: int) -> tuple[torch.Tensor, ...]:
        image, label = super().__getitem__(index)
        return image + torch.rand(()), label


def user_loader(**changes: Any) -> DataLoader[Any]:
    return DataLoader(TensorDataset(IMAGES.float(), LABELS), **({"batch_size": 8, "shuffle": True} | changes))


@pytest.mark.parametrize(
    "make",
    [
        user_loader,
        lambda: user_loader(generator=torch.Generator()),
        lambda: user_loader(shuffle=False, sampler=RandomSampler(LABELS.tolist(), generator=torch.Generator())),
    ],
)
def test_a_shuffling_dataloader_repeats_its_epochs(make: Any) -> None:
    loader = make()
    adapter = LoaderAdapter(loader, train=True, seed=3)
    second = list(adapter.batches(2))
    torch.rand(9)
    list(loader)
    list(adapter.batches(1))
    assert same(list(adapter.batches(2)), second)
    assert not same(list(adapter.batches(3)), second)
    assert (adapter.n, len(adapter)) == (N, 7)
    assert isinstance(adapter, Loader)


def test_random_transforms_repeat_under_the_fit_loops_seed() -> None:
    adapter = LoaderAdapter(DataLoader(Noisy(IMAGES.float(), LABELS), batch_size=8, shuffle=True))
    runs: list[list[Any]] = []
    for _ in range(2):
        torch.manual_seed(5)
        runs.append(list(adapter.batches(0)))
    assert same(*runs)


def test_looking_at_the_first_batch_leaves_no_trace() -> None:
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    assert len(LoaderAdapter(DataLoader(Noisy(IMAGES.float(), LABELS), batch_size=8)).first[0]) == 8
    assert torch.equal(torch.rand(3), expected)


def test_ranks_share_out_a_users_batches() -> None:
    def seen(train: bool, world: int) -> list[list[int]]:
        adapters = [LoaderAdapter(user_loader(), train=train, rank=r, world=world) for r in range(world)]
        assert all(len(list(a.batches(0))) == len(a) for a in adapters)
        return [[i for _, labels in a.batches(1) for i in labels.tolist()] for a in adapters]

    evaluation = seen(False, 3)
    assert sorted(i for part in evaluation for i in part) == list(range(N))
    first, second = seen(True, 2)
    assert len(first) == len(second) == 24
    assert not set(first) & set(second)


def test_a_distributed_sampler_is_trusted_and_told_the_epoch() -> None:
    sampler = DistributedSampler(LABELS.tolist(), num_replicas=2, rank=1, shuffle=True)
    adapter = LoaderAdapter(user_loader(shuffle=False, sampler=sampler), train=True, rank=1, world=2)
    first = list(adapter.batches(1))
    assert sum(len(labels) for _, labels in first) == 25
    assert sampler.epoch == 1
    assert not same(list(adapter.batches(2)), first)
    assert adapter.n == N


def test_a_plain_list_of_batches() -> None:
    adapter = LoaderAdapter([(IMAGES[:4].float(), LABELS[:4]), (IMAGES[4:8].float(), LABELS[4:8])])
    assert (adapter.n, len(adapter)) == (8, 2)
    assert [labels.tolist() for _, labels in adapter.batches(0)] == [[0, 1, 2, 3], [4, 5, 6, 7]]


@pytest.mark.parametrize(
    ("loader", "says"),
    [
        (TensorDataset(IMAGES, LABELS), "train is a Dataset, .*DataLoader"),
        ((x for x in "ab"), "train is a generator"),
        (42, "train is a int"),
        ([], "train has 0 batches"),
    ],
)
def test_what_is_no_loader(loader: Any, says: str) -> None:
    with pytest.raises(TersenetError, match=says):
        LoaderAdapter(loader, name="train")


def test_a_batch_that_is_no_pair() -> None:
    with pytest.raises(TersenetError, match=r"test gives a Tensor as a batch; it must be \(inputs, targets\)"):
        list(LoaderAdapter([IMAGES], name="test").batches(0))
