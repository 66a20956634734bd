"""What a loader of models is, and the table of all of them: every module ``from_*.py`` of this package has one.

A new source of models is a new file ``from_NAME.py`` with an instance of `Loader` named ``LOADER``.
"""

import importlib
import pkgutil
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from pathlib import Path

import torch
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from cats.quantization import GROUP_SIZE

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Request:
    """How a model is wanted.

    Attributes:
        dtype: of the weights; None: as stored, and bfloat16 where nothing is stored in a dtype of its own.
        device: ``cpu``, ``cuda``, ``cuda:1``, or ``sharded`` (the layers over all GPUs).
        layers: keep only the first so many decoder layers; None: all.
        seed: of random weights.
        packed: keep the weights of gated MLPs as they are quantised in a GGUF file.
        bits, group_size, linears: quantise, as in `cats.quantize`; no bits: do not.
    """

    dtype: torch.dtype | None = None
    device: str = "cpu"
    layers: int | None = None
    seed: int = 0
    packed: bool = False
    bits: int | None = None
    group_size: int | None = GROUP_SIZE
    linears: str = "mlp"

    @property
    def others(self) -> tuple[int, int | None] | None:
        """Bits and group size for the linear layers outside of the gated MLPs; None: they stay as they are."""
        return (self.bits, self.group_size) if self.bits is not None and self.linears == "all" else None

    @property
    def plain(self) -> bool:
        """Whether no weight is to be quantised."""
        return not self.packed and self.bits is None


@dataclass(frozen=True)
class Origin:
    """Where a model comes from.

    Attributes:
        kind: in words, such as ``directory`` or ``GGUF Q4_K_M, dequantised``.
        revision: commit of a hub repository, where it is known.
        weights, config, tokenizer: the files of each part.
        notes: what else is known, such as the file that a directory was converted from.
    """

    kind: str
    revision: str | None = None
    weights: tuple[Path, ...] = ()
    config: tuple[Path, ...] = ()
    tokenizer: tuple[Path, ...] = ()
    notes: dict[str, str] = field(default_factory=dict)


class Loader(ABC):
    """One way to come by a model.

    Attributes:
        order: loaders are asked in ascending order whether a name is theirs.
        example: what a user writes, for messages.
        packs: whether weights may arrive quantised and be kept so.
    """

    order: int
    example: str
    packs = False

    @abstractmethod
    def claims(self, spec: str) -> bool:
        """Whether ``spec`` is of this kind, however wrong it may be otherwise."""

    def resolve(self, spec: str) -> str:
        """The hub id, path or name that ``spec`` stands for. Raises ValueError when it cannot be loaded."""
        return spec

    @abstractmethod
    def config(self, spec: str, layers: int | None = None) -> PretrainedConfig:
        """Configuration, without weights."""

    @abstractmethod
    def load(self, spec: str, request: Request) -> tuple[PreTrainedModel, PreTrainedTokenizerBase | None]:
        """The model in evaluation mode, where and as it is requested, and what `tokenizer` gives."""

    @abstractmethod
    def tokenizer(self, spec: str) -> PreTrainedTokenizerBase | None:
        """Its tokenizer, or None where there is none."""

    @abstractmethod
    def origin(self, spec: str) -> Origin:
        """Its files as they lie on this machine. Raises OSError when they are not here."""


def loaders() -> list[Loader]:
    """All loaders, in the order in which they are asked."""
    import cats.models as package

    names = [module.name for module in pkgutil.iter_modules(package.__path__) if module.name.startswith("from_")]
    table = [importlib.import_module(f"{package.__name__}.{name}").LOADER for name in names]
    return sorted(table, key=lambda loader: loader.order)


def loader_of(spec: str) -> Loader:
    """The loader that ``spec`` belongs to.

    Raises:
        TypeError: it is no string.
        ValueError: it belongs to none, such as a path that does not exist.
    """
    if not isinstance(spec, str):
        raise TypeError(f"a model is named by a string, not a {type(spec).__name__}: of a path give str(path)")
    table = loaders()
    for loader in table:
        if loader.claims(spec):
            return loader
    raise ValueError(f"{spec} does not exist: give {', '.join(loader.example for loader in table)}")
