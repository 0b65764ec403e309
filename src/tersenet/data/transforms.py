"""The standard ImageNet transforms on PIL images, as torchvision and its reference training script have them."""

from __future__ import annotations

import math
import random

from PIL import Image

SIZE = 224
RESIZE = 256


def resize_and_centre(image: Image.Image) -> Image.Image:
    """The shorter side resized to 256 (bilinear), then the 224x224 in the middle. Source: torchvision."""
    width, height = image.size
    short = min(width, height)
    size = int(RESIZE * width / short), int(RESIZE * height / short)
    image = image.resize(size, Image.Resampling.BILINEAR)
    left, top = round((size[0] - SIZE) / 2), round((size[1] - SIZE) / 2)
    return image.crop((left, top, left + SIZE, top + SIZE))


def random_resized_crop(image: Image.Image, draw: random.Random) -> Image.Image:
    """8 to 100 % of the area, at an aspect ratio of 3/4 to 4/3, resized to 224x224; mirrored half of the time.

    Source: torchvision's RandomResizedCrop and RandomHorizontalFlip: ten attempts, then the largest centre crop.
    """
    width, height = image.size
    for _ in range(10):
        area = width * height * draw.uniform(0.08, 1)
        ratio = math.exp(draw.uniform(math.log(3 / 4), math.log(4 / 3)))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            left, top = draw.randint(0, width - w), draw.randint(0, height - h)
            break
    else:
        w, h = min(width, round(height * 4 / 3)), min(height, round(width * 4 / 3))
        left, top = (width - w) // 2, (height - h) // 2
    # Cropped first: resizing with a box would let pixels from outside it into the borders.
    image = image.crop((left, top, left + w, top + h)).resize((SIZE, SIZE), Image.Resampling.BILINEAR)
    return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if draw.random() < 0.5 else image
