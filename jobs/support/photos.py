"""Makes the demo's images: views of photos, which are turned, cropped, flipped and blurred."""

from __future__ import annotations

import math
import random
import shutil
from importlib.util import find_spec
from pathlib import Path

from PIL import Image, ImageEnhance, ImageFilter, ImageOps

from shard_embedder.pipeline.core.errors import InputError

NUM_VIEWS = 12
# Photos in scikit-image's wheel that its documentation declares CC0 or public domain, by file name.
PHOTOS = (
    "astronaut.png", "brick.png", "camera.png", "cell.png", "chelsea.png", "clock_motion.png", "coffee.png",
    "coins.png", "grass.png", "gravel.png", "hubble_deep_field.jpg", "ihc.png", "moon.png", "page.png",
    "retina.jpg", "rocket.jpg", "text.png",
)  # fmt: skip
_VIEW_SIDE = 256
_PHOTO_SIDE = 512


def augmented(photo: Image.Image, rng: random.Random) -> Image.Image:
    """One view of an RGB photo: rotated and cropped, sometimes flipped or blurred, with other light and colours."""
    angle = rng.uniform(-20, 20)
    view = photo.rotate(angle, Image.Resampling.BICUBIC)
    # The largest upright rectangle of the same shape without the black corners that rotation makes.
    ratio = max(photo.width / photo.height, photo.height / photo.width)
    inside = 1 / (math.cos(math.radians(angle)) + ratio * math.sin(math.radians(abs(angle))))
    view = _random_crop(view, inside, rng)
    if rng.random() < 0.5:
        view = ImageOps.mirror(view)
    view.thumbnail((_VIEW_SIDE, _VIEW_SIDE), Image.Resampling.LANCZOS)
    for enhance in (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color):
        view = enhance(view).enhance(rng.uniform(0.6, 1.4))
    return view.filter(ImageFilter.GaussianBlur(rng.uniform(0, 2))) if rng.random() < 0.5 else view


def _random_crop(image: Image.Image, inside: float, rng: random.Random) -> Image.Image:
    """A random rectangle from the middle of an image: 60 to 100 % of the share `inside` of its sides."""
    scale = inside * rng.uniform(0.6, 1.0)
    width, height = image.width * scale, image.height * scale
    left = image.width * (1 - inside) / 2 + rng.random() * (image.width * inside - width)
    top = image.height * (1 - inside) / 2 + rng.random() * (image.height * inside - height)
    return image.crop((round(left), round(top), round(left + width), round(top + height)))


def make_views(folder: Path) -> int:
    """Write the views of each photo below `folder`, one folder a photo, and return their number.

    Raises:
        InputError: scikit-image, which brings the photos, is not installed.
    """
    spec = find_spec("skimage")
    if spec is None or not spec.submodule_search_locations:
        raise InputError("the demo's photos come with scikit-image: pip install scikit-image, or give --images")
    data = Path(spec.submodule_search_locations[0]) / "data"
    photos = [data / name for name in PHOTOS if (data / name).exists()]
    if not photos:
        raise InputError(f"scikit-image must hold the demo's photos, got none in {data}; give --images")
    shutil.rmtree(folder, ignore_errors=True)
    for path in photos:
        (folder / path.stem).mkdir(parents=True)
        with Image.open(path) as image:
            photo = image.convert("RGB")
        # Views are small: turning a large photo would take most of the time.
        photo.thumbnail((_PHOTO_SIDE, _PHOTO_SIDE), Image.Resampling.LANCZOS)
        for number in range(NUM_VIEWS):
            rng = random.Random(f"{path.stem} {number}")
            view = augmented(photo, rng)
            view.save(folder / path.stem / f"{number:02d}.jpg", quality=rng.randint(30, 95))
    return len(photos) * NUM_VIEWS
