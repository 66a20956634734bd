"""The head of a GGUF file: its metadata and the list of its tensors, without the tensors' data.

The `gguf` package's own reader makes a Python object of every entry of a vocabulary, which takes ten seconds where this
takes less than one; and what it raises on a damaged file does not say that the file is damaged. Format:
https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

import mmap
import struct
from dataclasses import dataclass
from functools import lru_cache
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

MAGIC = b"GGUF"
VERSIONS = (2, 3)
STRING, ARRAY = 8, 9
CONTROL, USER_DEFINED, UNUSED = 3, 4, 5  # of `tokenizer.ggml.token_type`
SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}  # struct's codes


@dataclass(frozen=True)
class TensorInfo:
    """A tensor: its shape in torch's order, GGML's number of its type, where its data begin in the file, and bytes."""

    shape: tuple[int, ...]
    kind: int
    start: int
    size: int


@dataclass(frozen=True)
class Header:
    """Metadata by key, and tensors by GGUF's names in the file's order."""

    path: Path
    metadata: dict[str, Any]
    tensors: dict[str, TensorInfo]

    @property
    def architecture(self) -> str:
        return str(self.metadata["general.architecture"])

    def rows(self, name: str, indices: np.ndarray) -> np.ndarray:
        """Rows of a matrix, dequantised; float32 (len(indices), columns)."""
        info = self.tensors[name]
        data = np.memmap(self.path, np.uint8, "r", info.start, (info.shape[0], info.size // info.shape[0]))
        return self.unpack(name, data[indices])

    def packed(self, name: str, first: int, last: int) -> np.ndarray:
        """Rows [first, last) of a tensor as they lie in the file, a vector being one row; uint8 (rows, bytes)."""
        info = self.tensors[name]
        width = info.size // prod(info.shape[:-1])
        count = (last - first) * width
        return np.fromfile(self.path, np.uint8, count, offset=info.start + first * width).reshape(-1, width)

    def unpack(self, name: str, data: np.ndarray) -> np.ndarray:
        """Whole blocks of rows of a tensor (rows, bytes), dequantised; float32 (rows, columns)."""
        from gguf import GGMLQuantizationType, dequantize

        return np.asarray(dequantize(data, GGMLQuantizationType(self.tensors[name].kind)), dtype=np.float32)


def read_header(path: Path) -> Header:
    """Parse the head of a file; remembered for as long as its size and time stay what they are.

    Raises:
        ValueError: not a GGUF file, or of another byte order, version or tensor type.
        OSError: truncated or damaged.
    """
    status = path.stat()
    return _read(path, status.st_mtime_ns, status.st_size)


@lru_cache(maxsize=8)
def _read(path: Path, _modified: int, size: int) -> Header:
    with path.open("rb") as file:
        start = file.read(8)
        if start[:4] != MAGIC:
            raise ValueError(f"{path} is not a GGUF file: it does not begin with the letters GGUF")
        version = int.from_bytes(start[4:], "little")
        if len(start) == 8 and int.from_bytes(start[4:], "big") in VERSIONS:
            raise ValueError(f"{path} is a big-endian GGUF file: only little-endian files can be loaded")
        if len(start) == 8 and version not in VERSIONS:
            allowed = " and ".join(map(str, VERSIONS))
            raise ValueError(f"{path} is GGUF of version {version}: versions {allowed} can be loaded")
        damaged = f"{path} is truncated or damaged: copy or download it again"
        try:
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
                header = _parse(path, content)
        except (struct.error, IndexError, KeyError, UnicodeDecodeError, MemoryError, OverflowError) as error:
            raise OSError(damaged) from error
    end = max((info.start + info.size for info in header.tensors.values()), default=0)
    if end > size:
        raise OSError(f"{damaged} (its tensors need {end} bytes, it has {size})")
    return header


def _parse(path: Path, content: mmap.mmap) -> Header:
    cursor = _Cursor(content, 8)
    tensor_count, metadata_count = cursor.take("QQ")
    metadata = {}
    for _ in range(metadata_count):
        key = cursor.string()
        metadata[key] = cursor.value(cursor.take("I")[0])
    entries = []
    for _ in range(tensor_count):
        name = cursor.string()
        dimensions = cursor.take(f"{cursor.take('I')[0]}Q")
        kind, offset = cursor.take("IQ")
        entries.append((name, tuple(reversed(dimensions)), kind, offset))
    alignment = metadata.get("general.alignment", 32)
    data = -(-cursor.position // alignment) * alignment
    metadata["general.architecture"]  # a KeyError without it: nothing can be done with the file
    tensors = {
        name: TensorInfo(shape, kind, data + offset, _bytes(path, name, shape, kind))
        for name, shape, kind, offset in entries
    }
    return Header(path, metadata, tensors)


def _bytes(path: Path, name: str, shape: tuple[int, ...], kind: int) -> int:
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    try:
        block, size = GGML_QUANT_SIZES[GGMLQuantizationType(kind)]
    except (ValueError, KeyError) as error:
        raise ValueError(f"{path} holds {name} in GGML's type {kind}, which the gguf package does not know") from error
    return prod(shape) // block * size


class _Cursor:
    """Reads one value after another. Raises struct.error at the end of the file."""

    def __init__(self, content: mmap.mmap, position: int) -> None:
        self.content, self.position = content, position

    def take(self, form: str) -> tuple[Any, ...]:
        values = struct.unpack_from(f"<{form}", self.content, self.position)
        self.position += struct.calcsize(f"<{form}")
        return values

    def string(self) -> str:
        (length,) = self.take("Q")
        text = self.content[self.position : self.position + length]
        if len(text) < length:
            raise IndexError(length)
        self.position += length
        return text.decode("utf-8")

    def value(self, kind: int) -> Any:
        if kind in SCALARS:
            return self.take(SCALARS[kind])[0]
        if kind == STRING:
            return self.string()
        if kind != ARRAY:
            raise KeyError(kind)
        element, count = self.take("IQ")
        if element in SCALARS:
            return list(self.take(f"{count}{SCALARS[element]}"))
        return [self.value(element) for _ in range(count)]
