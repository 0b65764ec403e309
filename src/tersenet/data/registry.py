"""Which data sets there are, how one is named, and the settings of a recipe's `data:` part. Imports no torch."""

from __future__ import annotations

import re
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, StrictFloat, StrictInt, field_validator

from tersenet.errors import TersenetError, UnknownNameError

MeanStd = tuple[tuple[float, ...], tuple[float, ...]]

NAMES: dict[str, str] = {
    "digits": "1,797 handwritten digits, 8x8 gray, 10 classes; embedded (scikit-learn's load_digits), no download",
    "cifar10": "cifar10:DIR, 60,000 colour images 32x32, 10 classes; `tersenet data fetch` downloads it",
    "cifar100": "cifar100:DIR, 60,000 colour images 32x32, 100 classes; `tersenet data fetch` downloads it",
    "imagefolder": "imagefolder:DIR, image files in DIR/train/CLASS/ and DIR/val/CLASS/, with ImageNet's transforms",
}

# Mean and standard deviation per channel, after division by 255; one value goes for every channel.
# Source: cifar10 and cifar100 as He et al.'s soft filter pruning scripts have them; imagenet as torchvision.
NORMALISATION: dict[str, MeanStd] = {
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "cifar10": ((125.3 / 255, 123.0 / 255, 113.9 / 255), (63.0 / 255, 62.1 / 255, 66.7 / 255)),
    "cifar100": ((129.3 / 255, 124.1 / 255, 112.4 / 255), (68.2 / 255, 65.4 / 255, 70.4 / 255)),
    "digits": ((0.305,), (0.376,)),
    "half": ((0.5,), (0.5,)),
    "none": ((0.0,), (1.0,)),
}

DEFAULT_NORMALISATION = {"digits": "digits", "cifar10": "cifar10", "cifar100": "cifar100", "imagefolder": "imagenet"}

# (C, H, W) of one image and the number of classes, where they are known without reading the files.
SHAPES: dict[str, tuple[tuple[int, int, int], int | None]] = {
    "digits": ((1, 8, 8), 10),
    "cifar10": ((3, 32, 32), 10),
    "cifar100": ((3, 32, 32), 100),
    "imagefolder": ((3, 224, 224), None),
}

_FUNCTION = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*(\.[A-Za-z_]\w*)*", re.ASCII)


def parse(spec: str) -> tuple[str, str | None]:
    """Split a data specification into its name and its folder.

    "digits" -> ("digits", None); "cifar10:DIR" -> ("cifar10", "DIR"); a user's own "package.module:function" is one
    name, without a folder. Whether the folder or the function exists is not looked at.

    Raises:
        UnknownNameError: no such data set.
        TersenetError: a folder is missing, or there is one too many.
    """
    name, colon, location = spec.partition(":")
    if name == "digits" and colon:
        raise TersenetError(f"data {spec!r}: digits is embedded and takes no folder; write 'digits'.")
    if name in NAMES:
        if name != "digits" and not location:
            fetch = f" (`tersenet data fetch {name} DIR` downloads it)" if name.startswith("cifar") else ""
            raise TersenetError(f"data {spec!r} needs a folder: write '{name}:DIR'{fetch}.")
        return name, location or None
    if _FUNCTION.fullmatch(spec):
        return spec, None
    raise unknown(name)


def unknown(name: str) -> UnknownNameError:
    """The error for a name that is neither one of ours nor a module that can be imported."""
    hint = "Known: digits, cifar10:DIR, cifar100:DIR, imagefolder:DIR, or your own package.module:function."
    return UnknownNameError("data set", name, NAMES, hint)


def normalisation(choice: str | MeanStd, channels: int) -> MeanStd:
    """Mean and standard deviation, `channels` numbers each, of a named normalisation or of the numbers themselves.

    Raises:
        UnknownNameError: no such name.
        TersenetError: it is for another number of channels.
    """
    if isinstance(choice, str) and choice not in NORMALISATION:
        raise UnknownNameError("normalisation", choice, NORMALISATION, f"Known: {', '.join(NORMALISATION)}.")
    mean, std = NORMALISATION[choice] if isinstance(choice, str) else choice
    for values in (mean, std):
        if len(values) not in (1, channels):
            raise TersenetError(
                f"normalisation {choice!r} is for {len(values)} channels, but the images have {channels}; "
                "use 'half' or 'none', which go for any number."
            )
    return mean if len(mean) == channels else mean * channels, std if len(std) == channels else std * channels


class DataSettings(BaseModel):
    """The `data:` part of a recipe. Your own function makes its own batches: only `source` matters for it."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    source: str
    """`digits`, `cifar10:DIR`, `cifar100:DIR`, `imagefolder:DIR`, or your own `package.module:function`"""
    batch_size: int = Field(default=128, ge=1)
    """training images per optimizer step, all processes together"""
    eval_batch_size: int = Field(default=250, ge=1)
    """images per evaluation batch; changes the speed, not the result"""
    validation: StrictInt | StrictFloat = Field(default=0.1, ge=0)
    """kept apart from the training set to choose by: a share below 1, or a whole number of images; 0 = nothing"""
    augment: Literal["standard", "none"] = "standard"
    """random crops and flips as the data set's literature has them, or none"""
    normalise: str | None = None
    """imagenet, cifar10, cifar100, digits, half or none; by default what the weights or the data set call for"""
    train_limit: int | None = Field(default=None, ge=1)
    """use only the first so many of the shuffled training images, for short trials"""
    workers: int = Field(default=0, ge=0)
    """processes that read image files; 0 reads them in the main process"""

    @field_validator("source")
    @classmethod
    def _check_source(cls, source: str) -> str:
        try:
            parse(source)
        except TersenetError as error:
            raise ValueError(str(error)) from error
        return source

    @field_validator("validation")
    @classmethod
    def _check_validation(cls, value: float) -> float:
        if isinstance(value, float) and value >= 1:
            raise ValueError("must be a share below 1, or a whole number of images")
        return value

    @field_validator("normalise")
    @classmethod
    def _check_normalise(cls, name: str | None) -> str | None:
        if name is not None and name not in NORMALISATION:
            raise ValueError(str(UnknownNameError("normalisation", name, NORMALISATION)))
        return name
