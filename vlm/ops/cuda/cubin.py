"""Reads what a compiled CUDA module says about itself: registers, local memory, parameters, constants.

A cubin is an ELF file. Reading it needs neither a GPU nor a driver, so CI can judge kernels, and a launch can
be checked against the kernel that it launches.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

_SECTION = struct.Struct("<IIQQQQIIQQ")
_SYMBOL = struct.Struct("<IBBHQQ")
_SYMBOL_TABLE = 2
_NO_BITS = 8
# attributes of the .nv.info sections, and the one format that has a payload
_FRAME_BYTES, _PARAMETER_BYTES, _REGISTERS = 0x11, 0x19, 0x2F
_WITH_PAYLOAD = 4


@dataclass(frozen=True, slots=True)
class Footprint:
    """What one kernel occupies.

    Attributes:
        registers: Of each thread.
        local_bytes: Stack of each thread; spilled registers lie there, so 0 means that nothing was spilled.
        parameter_bytes: Size of the argument, or of all arguments together.
    """

    registers: int
    local_bytes: int
    parameter_bytes: int


def footprints(image: bytes) -> dict[str, Footprint]:
    """Return the footprint of every kernel in a cubin.

    Raises:
        ValueError: ``image`` is not a cubin.
    """
    elf = _Elf(image)
    registers: dict[str, int] = {}
    local: dict[str, int] = {}
    for attribute, payload in _attributes(elf.section(".nv.info")):
        if attribute in (_REGISTERS, _FRAME_BYTES):
            symbol, value = struct.unpack("<II", payload)
            (registers if attribute == _REGISTERS else local)[elf.symbols[symbol].name] = value
    found = {}
    for name, count in registers.items():
        info = elf.section(f".nv.info.{name}", required=False)
        # a device function that was not inlined has registers, but no parameters of a launch
        sizes = [payload for attribute, payload in _attributes(info) if attribute == _PARAMETER_BYTES]
        if info:
            size = int.from_bytes(sizes[0], "little") if sizes else 0
            found[name] = Footprint(count, local.get(name, 0), size)
    return found


def constant(image: bytes, name: str) -> bytes:
    """Return the initial bytes of a ``__constant__`` or ``__device__`` variable with C linkage.

    Raises:
        ValueError: ``image`` is not a cubin.
        KeyError: It has no such variable.
    """
    elf = _Elf(image)
    for symbol in elf.symbols:
        if symbol.name == name and symbol.section < len(elf.contents):
            return elf.contents[symbol.section][symbol.start : symbol.start + symbol.num_bytes]
    raise KeyError(name)


@dataclass(frozen=True, slots=True)
class _Symbol:
    name: str
    section: int
    start: int
    num_bytes: int


class _Elf:
    """The sections and symbols of a little-endian 64-bit ELF file."""

    def __init__(self, image: bytes) -> None:
        if image[:6] != b"\x7fELF\x02\x01":
            raise ValueError(f"expected a cubin, got {len(image)} bytes that begin with {image[:6]!r}")
        try:
            self._read(image)
        except (struct.error, IndexError, ValueError) as error:
            raise ValueError(f"a damaged cubin of {len(image)} bytes: {error}") from error

    def _read(self, image: bytes) -> None:
        (start,) = struct.unpack_from("<Q", image, 40)
        size, count, names = struct.unpack_from("<HHH", image, 58)
        headers = [_SECTION.unpack_from(image, start + index * size) for index in range(count)]
        self.contents = [
            b"" if kind == _NO_BITS else image[offset : offset + num_bytes]
            for _, kind, _, _, offset, num_bytes, *_ in headers
        ]
        self._named = {
            _text(self.contents[names], header[0]): content
            for header, content in zip(headers, self.contents, strict=True)
        }
        self.symbols: list[_Symbol] = []
        for header, content in zip(headers, self.contents, strict=True):
            if header[1] == _SYMBOL_TABLE:
                strings = self.contents[header[6]]
                self.symbols = [
                    _Symbol(_text(strings, name), section, value, num_bytes)
                    for name, _, _, section, value, num_bytes in _SYMBOL.iter_unpack(content)
                ]

    def section(self, name: str, *, required: bool = True) -> bytes:
        if required and name not in self._named:
            raise ValueError(f"expected a cubin, got an ELF file without {name}")
        return self._named.get(name, b"")


def _text(strings: bytes, start: int) -> str:
    return strings[start : strings.index(b"\0", start)].decode()


def _attributes(info: bytes) -> list[tuple[int, bytes]]:
    """Return the entries of a ``.nv.info`` section: number and payload, or number and its 16-bit value."""
    found = []
    position = 0
    while position + 4 <= len(info):
        form, attribute, value = struct.unpack_from("<BBH", info, position)
        position += 4
        payload = info[position : position + value] if form == _WITH_PAYLOAD else value.to_bytes(2, "little")
        position += value if form == _WITH_PAYLOAD else 0
        found.append((attribute, payload))
    return found
