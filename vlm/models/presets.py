"""Names for models, and where each comes from."""

from __future__ import annotations

import difflib

from vlm.errors import InvalidInput

_OFFICIAL = "hf:OpenGVLab/VideoMamba/videomamba_m16_{corpus}_f8_res224.pth"

# name: source, as `load_model` understands it; `asset:` is a shipped folder
PRESETS: dict[str, str] = {
    "demo": "asset:eval/models/demo",
    "videomamba-m-5m": _OFFICIAL.format(corpus="5M"),
    "videomamba-m-17m": _OFFICIAL.format(corpus="17M"),
    "videomamba-m-25m": _OFFICIAL.format(corpus="25M"),
    "clip-b32": "open_clip:ViT-B-32/laion2b_s34b_b79k",
    "pe-core-b": "open_clip:PE-Core-B-16/meta",
}


def resolve(name: str) -> str:
    """Return the source of a preset.

    Raises:
        InvalidInput: There is no such preset; the nearest is named.
    """
    if name in PRESETS:
        return PRESETS[name]
    near = difflib.get_close_matches(name, PRESETS, n=1)
    hint = f"did you mean {near[0]!r}?" if near else f"presets: {', '.join(PRESETS)}"
    raise InvalidInput(
        f"no model {name!r}: neither a file, a folder nor a preset; {hint} ('vlm models list' describes them)"
    )
