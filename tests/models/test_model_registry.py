from __future__ import annotations

import subprocess
import sys

import pytest

from tersenet.errors import UnknownNameError
from tersenet.models.registry import ENTRIES, PUBLISHED, entry


def test_every_network_of_the_families_is_there() -> None:
    cifar = {f"resnet{d}{s}" for d in (8, 14, 20, 32, 44, 56, 110) for s in ("", "_projection")}
    preact = {f"preresnet{d}" for d in (20, 32, 44, 56, 110, 164)}
    imagenet = {f"resnet{d}" for d in (18, 34, 50, 101, 152)}
    vgg = {f"vgg{d}{s}" for d in (11, 13, 16, 19) for s in ("", "_bn", "_bn_cifar")}
    winograd = {"winograd_resnet18", "lenet5", "squeezenet_cifar", "resnext20_8x16"}
    sparse = {"vgg_nagadomi", "vgg_nagadomi_24", "convpool_cnn_c", "pool_resnet18"}
    assert set(ENTRIES) == cifar | preact | imagenet | vgg | winograd | sparse
    assert all(name == found.name for name, found in ENTRIES.items())


def test_entry_says_input_and_classes() -> None:
    assert (entry("resnet56").input_shape, entry("resnet56").classes) == ((3, 32, 32), 10)
    assert (entry("resnet50").input_shape, entry("resnet50").classes) == ((3, 224, 224), 1000)


def test_unknown_name_offers_the_nearest() -> None:
    with pytest.raises(UnknownNameError, match=r"unknown model 'resnet65'; did you mean .*'resnet56'"):
        entry("resnet65")
    with pytest.raises(UnknownNameError, match="`tersenet models` lists them"):
        entry("zzz")


def test_published_files_belong_to_known_networks() -> None:
    for known in PUBLISHED:
        assert known.model in ENTRIES
        assert known.file.split("-")[1].startswith(known.sha256[:8])
        assert 0.9 < known.top1 < 1


def test_import_is_light() -> None:
    code = "import sys, tersenet.models.registry; sys.exit('torch' in sys.modules or 'numpy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
