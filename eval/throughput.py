"""Measure how fast VideoMamba encodes; --scaling: how its cost grows; --training: where the time goes."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from vlm.errors import InvalidInput, UsageError
from vlm.evaluation.speed import draw_scaling, machine, peak_bytes, time_ms
from vlm.evaluation.speed.rivals import VideoTransformer, naive_bytes, num_heads
from vlm.models.video_mamba import SIZES, VideoMamba, VideoMambaConfig, sized
from vlm.models.weights import set_dtype

FORMAT, TRAINING_FORMAT = "vlm-scaling/1", "vlm-training-throughput/1"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
FRAMES = {"cpu": (8, 16, 32), "cuda": (8, 16, 32, 64)}
CPU_LIMIT_GIB = 4.0
# what is compared, with its name in tables and plots; the first is what the others are divided by
ARCHITECTURES = {
    "videomamba": "VideoMamba",
    "joint-fused": "ViT, joint attention, fused",
    "divided": "ViT, divided attention, fused",
    "joint-naive": "ViT, joint attention, naive",
}
_EXAMPLE = "vlm eval throughput --scaling --out scaling.json"
_TRAINING_HEADING = (
    f"{'workers':>7}{'decode/s':>10}{'samples/s':>11}{'waiting':>10}{'of limit':>10}"
    + "".join(
        f"{name:>15}" for name in ("wait, ms", "to device", "forward", "backward", "optimizer", "other")
    )
)
_HEADING = f"{'frames':>6}  {'':<29} {'ms':>9}  {'p20 to p80':>17} {'MiB':>8}   times VideoMamba's"


def main(argv: list[str]) -> int:
    """Measure, print what was found, write it."""
    arguments = _parser().parse_args(argv)
    settings = _settings(arguments)
    if arguments.training:
        return _train(arguments)
    if arguments.scaling:
        return _scale(arguments, settings)
    frames, *others = arguments.frames or [8]
    if others:
        raise UsageError("--frames takes one number, or several with --scaling")
    row = measure(arguments.point or "videomamba", settings, frames)
    if arguments.point:
        print(json.dumps(row))
        return 0
    if "error" in row:
        raise InvalidInput(f"{row['error']}; try a smaller --batch or fewer --frames")
    row["clips_per_s"] = 1e3 * settings["batch"] / row["time_ms"]["wall"]["median"]
    results = {"machine": _machine(settings), "settings": settings, "frames": frames, **row}
    _write(arguments.out, results)
    each = row["time_ms"]["wall"]["median"] / settings["batch"]
    print(
        json.dumps(results, indent=1)
        if arguments.json
        else f"VideoMamba {settings['size']}, {frames} frames, batch {settings['batch']}, "
        f"{settings['dtype']}, {settings['threads']} threads: "
        f"{row['clips_per_s']:.3g} clips/s, {each:.4g} ms a clip"
    )
    return 0


def _train(arguments: argparse.Namespace) -> int:
    """Time the stages of training on shards, with one number of data workers after another."""
    from vlm.config import load_config
    from vlm.training.config import TrainingConfig
    from vlm.training.reports.stages import STAGES, measure_stages

    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    config = load_config(TrainingConfig, arguments.training, arguments.overrides)
    found = measure_stages(config, arguments.workers, arguments.updates)
    device = "cuda" if config.train.device != "cpu" and torch.cuda.is_available() else "cpu"
    vision = config.model.vision
    results = {
        "format": TRAINING_FORMAT,
        "machine": machine(torch.device(device)),
        "clip": {"frames": vision.num_frames, "image_size": vision.image_size},
        "model": {"width": vision.width, "depth": vision.depth, "precision": config.train.precision},
        **found,
    }
    _write(arguments.out, results)
    if arguments.json:
        print(json.dumps(results, indent=1))
        return 0
    sample, update = (
        ", ".join(f"{name} {ms:.1f}" for name, ms in found[key].items()) for key in ("sample_ms", "update_ms")
    )
    print(f"a sample, in ms of one thread: {sample}\nan update of {found['batch_size']}, in ms: {update}")
    print(f"the model alone: {found['compute_samples_per_s']:.1f} samples/s\n{_TRAINING_HEADING}")
    for row in found["workers"]:
        stages = "".join(f"{row['update_ms'][name]:>15.1f}" for name in STAGES)
        print(
            f"{row['workers']:>7}{row['decode_samples_per_s']:>10.1f}{row['samples_per_s']:>11.1f}"
            f"{row['data_wait']:>10.1%}{row['of_slower_limit']:>10.1%}{stages}"
        )
    return 0


def measure(architecture: str, settings: dict[str, Any], frames: int) -> dict[str, Any]:
    """Build a model with random weights, run it once for its peak memory, then for its time."""
    torch.set_num_threads(settings["threads"])
    torch.manual_seed(0)
    device, dtype = torch.device(settings["device"]), DTYPES[settings["dtype"]]
    config = _config(settings, frames)
    model, run = _job(architecture, config, settings["batch"], device, dtype)
    # a small one first: libraries, thread pools and compiled kernels are not the model's memory
    small = sized(settings["size"], depth=1, num_frames=2, image_size=32)
    _job(architecture, small, 1, device, dtype)[1]()
    try:
        peak = peak_bytes(run, device)
        times = time_ms(run, device, settings["seconds"])
    except torch.OutOfMemoryError:
        return {"error": "out of memory"}
    return {
        "tokens": 1 + config.num_steps * config.grid**2,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "ms": times[settings["clock"]]["median"],
        "bytes": peak,
        "time_ms": times,
    }


def _job(
    architecture: str, config: VideoMambaConfig, batch: int, device: torch.device, dtype: torch.dtype
) -> tuple[nn.Module, Callable[[], object]]:
    model: nn.Module
    if architecture == "videomamba":
        model = set_dtype(VideoMamba(config), dtype)
    else:
        model = VideoTransformer(config, architecture).to(dtype)
    model = model.to(device).eval()
    size = (batch, config.num_frames, config.channels, config.image_size, config.image_size)
    video = torch.randn(size, device=device, dtype=dtype)

    def run() -> object:
        with torch.inference_mode():
            return model(video)

    return model, run


def _scale(arguments: argparse.Namespace, settings: dict[str, Any]) -> int:
    """Measure every architecture at every number of frames; each point is printed and written as it comes."""
    results: dict[str, Any] = {"format": FORMAT, "machine": _machine(settings), "settings": settings}
    rows = results["points"] = _earlier(arguments.out, results) if arguments.resume else []
    done = {(row["architecture"], row["frames"]): row for row in rows}
    limit_gib = arguments.memory_gib or (CPU_LIMIT_GIB if settings["device"] == "cpu" else None)
    if not arguments.json:
        print(_HEADING)
    for frames in arguments.frames or ((2, 4) if settings["is_quick"] else FRAMES[settings["device"]]):
        for architecture in ARCHITECTURES:
            row = done.get((architecture, frames))
            if row is None:
                row = _point(architecture, settings, frames, limit_gib)
                own = done.get(("videomamba", frames), row)
                row |= {
                    f"{name}_ratio": row[name] / own[name]
                    for name in ("ms", "bytes")
                    if row.get(name) and own.get(name)
                }
                done[architecture, frames] = row
                rows.append(row)
                _write(arguments.out, results)
            if not arguments.json:
                print(_line(row, settings["clock"]), flush=True)
    if arguments.out:
        _draw(results, arguments.out.with_suffix(".png"))
    if arguments.json:
        print(json.dumps(results, indent=1))
    return 0


def _point(
    architecture: str, settings: dict[str, Any], frames: int, limit_gib: float | None
) -> dict[str, Any]:
    """Measure one point: on a CPU in a fresh process, whose memory nothing else has touched."""
    row: dict[str, Any] = {"architecture": architecture, "frames": frames}
    need = naive_bytes(_config(settings, frames), settings["batch"], DTYPES[settings["dtype"]])
    if architecture == "joint-naive" and limit_gib is not None and need > limit_gib * 2**30:
        return row | {"predicted_bytes": need}
    if settings["device"] != "cpu":
        return row | measure(architecture, settings, frames)
    words = [str(Path(__file__)), "--point", architecture, "--frames", str(frames)]
    for name in ("size", "batch", "threads", "dtype", "device", "seconds"):
        words += [f"--{name}", str(settings[name])]
    if settings["is_quick"]:
        words.append("--quick")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    done = subprocess.run([sys.executable, *words], env=environment, stdout=subprocess.PIPE, check=False)
    return row | (json.loads(done.stdout) if done.returncode == 0 else {"error": f"exit {done.returncode}"})


def _earlier(path: Path | None, now: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the points of an interrupted run, if its settings, code and machine are those of now."""
    if path is None:
        raise UsageError("--resume needs --out, the file to go on with")
    if not path.exists():
        return []
    try:
        then = json.loads(path.read_text(encoding="utf-8"))
        rows: list[dict[str, Any]] = then["points"]
        for key in ("format", "settings", "machine"):
            if _steady(then[key]) != _steady(now[key]):
                raise InvalidInput(
                    f"{path} has another {key} than this run; leave out --resume to begin anew"
                )
    except (ValueError, KeyError) as error:
        raise InvalidInput(f"{path} is not a file of --scaling; leave out --resume to begin anew") from error
    return [row for row in rows if "error" not in row]


def _steady(found: Any) -> Any:
    """Leave out what may differ between two halves of a run."""
    return {k: v for k, v in found.items() if k != "load_average"} if isinstance(found, dict) else found


def _line(row: dict[str, Any], clock: str) -> str:
    name = f"{row['frames']:>6}  {ARCHITECTURES[row['architecture']]:<29}"
    if "predicted_bytes" in row:
        return f"{name} not run: its scores alone would need {row['predicted_bytes'] / 2**30:.1f} GiB"
    if "error" in row:
        return f"{name} {row['error']}"
    times = row["time_ms"][clock]
    spread = f"{times['p20']:.1f} to {times['p80']:.1f}"
    memory = "" if row["bytes"] is None else f"{row['bytes'] / 2**20:.1f}"
    ratios = f"{row['ms_ratio']:.2f} x time" if "ms_ratio" in row else ""
    ratios += f", {row['bytes_ratio']:.2f} x memory" if "bytes_ratio" in row else ""
    return f"{name} {row['ms']:>9.1f}  {spread:>17} {memory:>8}   {ratios}"


def _draw(results: dict[str, Any], path: Path) -> None:
    settings, about = results["settings"], results["machine"]
    curves = {
        label: [row for row in results["points"] if row["architecture"] == architecture]
        for architecture, label in ARCHITECTURES.items()
    }
    clock = "processor time of one thread" if settings["clock"] == "processor" else "time"
    draw_scaling(
        curves,
        path,
        title=f"Encoding {settings['batch']} clip{'s' if settings['batch'] > 1 else ''} of "
        f"{settings['image_size']} x {settings['image_size']}: {settings['depth']} blocks of "
        f"{settings['width']} channels, {settings['dtype']}, {about['device']}, PyTorch {about['torch']}",
        time_label=f"{clock}, s",
    )


def _write(path: Path | None, results: dict[str, Any]) -> None:
    if path is None:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.part")
    temporary.write_text(json.dumps(results, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    os.replace(temporary, path)


def _machine(settings: dict[str, Any]) -> dict[str, Any]:
    torch.set_num_threads(settings["threads"])
    return machine(torch.device(settings["device"]))


def _config(settings: dict[str, Any], frames: int) -> VideoMambaConfig:
    shape = {name: settings[name] for name in ("depth", "image_size")}
    return sized(settings["size"], num_frames=frames, **shape)


def _settings(arguments: argparse.Namespace) -> dict[str, Any]:
    device = arguments.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda" and not torch.cuda.is_available():
        raise InvalidInput("--device cuda: no CUDA device answers; use --device cpu")
    is_scaling = arguments.scaling or arguments.point
    threads = arguments.threads or (1 if is_scaling else torch.get_num_threads())
    width, depth = SIZES[arguments.size]
    return {
        "size": arguments.size,
        "width": width,
        "depth": 2 if arguments.quick else depth,
        "heads": num_heads(width),
        "image_size": 32 if arguments.quick else 224,
        "batch": arguments.batch,
        "dtype": arguments.dtype or ("fp32" if device == "cpu" else "bf16"),
        "device": device,
        "threads": threads,
        "seconds": 0.0 if arguments.quick else arguments.seconds,
        # on a shared machine the wall clock says more about the neighbours
        "clock": "processor" if is_scaling and device == "cpu" and threads == 1 else "wall",
        "is_quick": arguments.quick,
    }


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="vlm eval throughput", description=__doc__, epilog=f"example: {_EXAMPLE}"
    )
    add = parser.add_argument
    add("--scaling", action="store_true", help="time and peak memory over frames, beside transformers")
    add("--training", type=Path, metavar="CONFIG", help="stages of a run of vlm train on shards")
    add("--set", action="append", default=[], metavar="KEY=VALUE", dest="overrides",
        help="with --training: change a value of the config")  # fmt: skip
    add("--workers", type=natural, nargs="+", default=[0, 1, 2], metavar="N",
        help="with --training: data workers, one number after another; default: 0 1 2")  # fmt: skip
    add("--updates", type=count, default=20, metavar="N", help="with --training: timed updates; default: 20")
    add("--size", default="tiny", choices=SIZES, help="which VideoMamba; default: tiny")
    add("--frames", type=count, nargs="+", metavar="N", help="of a clip; default: 8, or 8 16 32 (64 on CUDA)")
    add("--batch", type=count, default=1, metavar="N", help="clips encoded at once; default: 1")
    add("--threads", type=count, metavar="N", help="of PyTorch; default: its own, or 1 with --scaling")
    add("--dtype", choices=DTYPES, help="default: fp32 on a CPU, bf16 on CUDA")
    add("--device", default="auto", choices=("auto", "cpu", "cuda"), help="where the models run")
    add("--seconds", type=float, default=5.0, metavar="S", help="least time spent on a point; default: 5")
    add(
        "--memory-gib", type=float, metavar="X", help="naive attention that needs more is not run; 4 on a CPU"
    )
    add("--quick", action="store_true", help="two blocks and 32 x 32 pixels, to see that the program runs")
    add("--out", type=Path, metavar="FILE.json", help="where to write; --scaling draws FILE.png beside it")
    add("--resume", action="store_true", help="with --scaling: keep the points that --out holds already")
    add("--json", action="store_true", help="print a JSON object instead of text")
    add("--point", choices=ARCHITECTURES, help=argparse.SUPPRESS)
    return parser


def count(text: str) -> int:
    """Read a number from 1; argparse names the function in its complaint."""
    if int(text) < 1:
        raise ValueError
    return int(text)


def natural(text: str) -> int:
    """Read a number from 0."""
    if int(text) < 0:
        raise ValueError
    return int(text)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
