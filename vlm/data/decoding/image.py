"""An image file as a query: any format Pillow reads, turned as its camera says."""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np

from vlm.errors import DataError


def read_image(path: Path) -> np.ndarray:
    """Read an image file as (height, width, 3) uint8 RGB, turned as its camera says.

    Raises:
        DataError: It is not an image, or too large to be an honest one.
    """
    from PIL import Image, ImageOps

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path) as image:
                return np.asarray(ImageOps.exif_transpose(image).convert("RGB"))
    except FileNotFoundError as error:
        raise DataError(f"{path}: no such image", "missing") from error
    except (
        OSError,
        ValueError,
        SyntaxError,
        Image.DecompressionBombError,
        Image.DecompressionBombWarning,
    ) as error:
        raise DataError(f"{path}: cannot be read as an image ({error})", "undecodable") from error
