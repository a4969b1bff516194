"""Weights in and out: model folders, published files, and how they become models."""

from vlm.models.weights.files import read_state_dict
from vlm.models.weights.folder import load_folder, read_card, save_model, sweep_partial
from vlm.models.weights.loading import load_model
from vlm.models.weights.official import LoadReport, from_official
from vlm.models.weights.precision import set_dtype

__all__ = [
    "LoadReport",
    "from_official",
    "load_folder",
    "load_model",
    "read_card",
    "read_state_dict",
    "save_model",
    "set_dtype",
    "sweep_partial",
]
