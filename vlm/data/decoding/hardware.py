"""Decoders of a graphics card: the same frames as from the CPU, or a reason why not.

Only codecs whose standard fixes every bit of a frame are given to a device, its frames are put into the CPU's
layout before anything else is done to them, and times come from the packets as always. So which of the two
decoded a sound file cannot be told from its frames, and nothing has to be recorded.
"""

from __future__ import annotations

import ctypes
import sys
from typing import Any

import av
from av.codec import Codec, CodecContext
from av.codec.hwaccel import HWAccel, hwdevices_available
from av.error import FFmpegError

from vlm.errors import InvalidInput

# not those with a transform that may be rounded in more than one way: MPEG-2, MPEG-4 part 2, motion JPEG
_EXACT_CODECS = ("h264", "hevc", "vp8", "vp9", "av1")
# the CPU's layout of a frame, and the device's of the same numbers
_LAYOUTS = {"yuv420p": "nv12", "yuvj420p": "nv12", "yuv420p10le": "p010le"}
# what of a stream decides how its packets are read
_COPIED = (
    *("extradata", "codec_tag", "width", "height", "reorder_depth", "field_order"),
    *("color_range", "color_primaries", "color_trc", "colorspace"),
)


class DeviceError(Exception):
    """A device cannot decode this file, or no longer: ``reason`` is a short countable label.

    ``codec_unsupported`` (it has no exact decoder for it), ``layout_unsupported`` (frames are not 4:2:0 of 8
    or 10 bits, of even size), ``device_refused`` (no first frame came), ``device_failed`` (it broke off).
    """

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


def offered_devices() -> dict[str, tuple[str, ...]]:
    """Return what PyAV's FFmpeg was built to decode with: codecs that are exact, by kind of device.

    Whether such a device is here only opening it can tell.
    """
    # an older PyAV cannot say in which layout a device holds a frame
    kinds = hwdevices_available() if hasattr(av.VideoFrame, "sw_format") else []
    found: dict[str, list[str]] = {kind: [] for kind in kinds}
    for name in _EXACT_CODECS:
        for config in Codec(name, "r").hardware_configs:
            if config.is_supported and config.device_type.name in found:
                found[config.device_type.name].append(name)
    return {kind: tuple(codecs) for kind, codecs in found.items() if codecs}


class Device:
    """A device that decodes, open as long as this object lives.

    Of a CUDA device this is the process's primary context, which nothing else may have made before (PyTorch
    does): decode in a process of its own, as indexing does.

    Args:
        name: A kind of `offered_devices`, and which one if it is not the first: ``cuda``, ``cuda:1``,
            ``vaapi:/dev/dri/renderD129``.

    Raises:
        InvalidInput: PyAV offers no such kind, or no such device is here; the message says what there is.
    """

    def __init__(self, name: str) -> None:
        self._kind, _, place = name.partition(":")
        self._place = place or None
        offered = offered_devices()
        if self._kind not in offered:
            kinds = ", ".join(("cpu", *offered))
            raise InvalidInput(
                f"cannot decode with {name!r}: PyAV {av.__version__} offers {kinds} here; "
                "choose one of these, or install a PyAV whose FFmpeg was built for the device"
            )
        self._codecs = offered[self._kind]
        try:
            # opening takes tenths of a second, and is then shared by every file
            self._held = _opened(self._settings(), self._codecs[0])
        except (FFmpegError, OSError, ValueError, RuntimeError) as error:
            raise InvalidInput(
                f"cannot decode with {name!r}: no such device can be opened here ({error}); install its "
                "driver, name another device, or decode with cpu, which gives the same frames"
            ) from error

    def decoder(self, stream: Any, layout: str) -> DeviceDecoder:
        """Return a decoder for a stream that `video_stream` gave, under the same limits.

        Args:
            stream: The stream.
            layout: The pixel format in which the CPU decodes it.

        Raises:
            DeviceError: ``codec_unsupported``, ``layout_unsupported`` or ``device_refused``.
        """
        like = stream.codec_context
        codec = like.codec.canonical_name
        if codec not in self._codecs:
            raise DeviceError("codec_unsupported")
        if layout not in _LAYOUTS or like.width % 2 or like.height % 2:
            raise DeviceError("layout_unsupported")
        try:
            context = CodecContext.create(Codec(codec, "r"), "r", self._settings())
            for name in _COPIED:
                setattr(context, name, getattr(like, name))
            context.options = dict(like.options)
            context.thread_count = 1
        except (FFmpegError, OSError, ValueError, RuntimeError) as error:
            raise DeviceError("device_refused") from error
        return DeviceDecoder(context, layout)

    def _settings(self) -> HWAccel:
        # frames that nobody wants never leave the device; `DeviceDecoder.fetched` brings the others
        options: dict[str, object] = {"primary_ctx": "1"} if self._kind == "cuda" else {}
        return HWAccel(
            self._kind, self._place, allow_software_fallback=False, options=options, is_hw_owned=True
        )


class DeviceDecoder:
    """A codec context on a device, with what `vlm.data.decoding.timeline` asks of one; it swallows nothing.

    Args:
        context: PyAV's.
        layout: The pixel format that frames are to have.
    """

    def __init__(self, context: Any, layout: str) -> None:
        self._context, self._layout = context, layout
        self._size = (context.width, context.height)
        self._has_decoded = False
        self.name: str = context.name

    @property
    def skip_frame(self) -> str:
        """Which frames are not decoded; as PyAV's."""
        return str(self._context.skip_frame)

    @skip_frame.setter
    def skip_frame(self, which: str) -> None:
        self._context.skip_frame = which

    def flush_buffers(self) -> None:
        """Forget what was decoded so far; after a seek."""
        self._context.flush_buffers()

    def decode(self, packet: Any) -> list[Any]:
        """Return the frames, on the device, that a packet completes; None drains.

        Raises:
            DeviceError: ``device_refused`` before the first frame, ``device_failed`` after it.
        """
        try:
            frames = list(self._context.decode(packet))
        except (FFmpegError, OSError, ValueError, RuntimeError) as error:
            raise DeviceError("device_failed" if self._has_decoded else "device_refused") from error
        self._has_decoded |= bool(frames)
        return frames

    def fetched(self, frame: Any) -> Any:
        """Return a frame as the CPU would have decoded it.

        Raises:
            DeviceError: ``layout_unsupported`` in another size or layout, ``device_failed`` if it does not.
        """
        layout = (frame.sw_format or frame.format).name
        if layout != _LAYOUTS[self._layout] or (frame.width, frame.height) != self._size:
            raise DeviceError("layout_unsupported")
        try:
            # number by number; from the device's layout straight to RGB, colours would spread otherwise. One
            # thread: with two, swscale 9 spoils a row of 10-bit frames where their shares meet, now and then
            return frame.reformat(format=self._layout, threads=1)
        except (FFmpegError, OSError, ValueError) as error:
            raise DeviceError("device_failed") from error


def _opened(settings: HWAccel, codec: str) -> HWAccel:
    """Open a device; an error says what FFmpeg said."""
    level = av.logging.get_level()
    av.logging.set_level(av.logging.ERROR)  # without it the error would be a bare number
    try:
        with av.logging.Capture(local=True):
            opened = settings.create(Codec(codec, "r"))
    finally:
        av.logging.set_level(level)
    if settings.options.get("primary_ctx") and sys.platform == "linux":
        # FFmpeg looks for it at the first file only, and each would be decoded by the CPU without it
        try:
            ctypes.CDLL("libnvcuvid.so.1")
        except OSError as error:
            raise OSError(f"{error}; in a container, NVIDIA_DRIVER_CAPABILITIES has to name video") from error
    return opened
