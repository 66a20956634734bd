"""The artifact between calibration and a sparse model: per site and module a number or a vector, in a JSON file.

Format 2 is ``{format, criterion, sparsity, decider, levels, sequential, model, tokens, sites: {site: {module path:
value}}}``; a value is a number or ``{"float32": base64 of little-endian float32}``, exact to the bit; ``levels`` is
left out where every layer has the same, ``sequential`` where it is false. Format 1, which had the sites ``gate``,
``attention_input`` and ``mlp_input`` of CATS beside each other and numbers only, is read as well.
"""

import base64
import binascii
import json
import stat
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn, TypeAlias

import numpy as np
import torch
from torch import Tensor

from cats.files import write_text_atomically

FORMAT, FORMAT_1 = "cats-thresholds-2", "cats-thresholds-1"
SITES = ("gate", "up", "neurons", "attention_input", "mlp_input", "mlp_linears", "attention_linears")
"""Where values are thresholded, see `cats.observe`."""
SITES_1 = ("gate", "attention_input", "mlp_input")
LARGEST_FILE = 2**30
"""Bytes; the largest open models need a seventh of it."""
LARGEST = float(torch.finfo(torch.float32).max)
_PLAIN = ("criterion", "sparsity", "levels", "sequential", "model", "tokens")

Value: TypeAlias = float | Tensor
ByModule: TypeAlias = dict[str, Value]


@dataclass(frozen=True, eq=False)
class Thresholds:
    """Thresholds of one criterion at one level: what calibration makes, `cats.apply` uses, and JSON stores.

    Attributes:
        sparsity: the target k in [0, 1): of every layer, or with ``levels`` of all MLPs together, each counted by its
            number of weights.
        gate, up: module path of an MLP to the threshold of ``act(x W_gate)`` or ``x W_up``; the one that is given for
            an MLP decides there. A value is a number, or a float32 vector (m,) on the CPU with one threshold per
            neuron; infinity in a vector skips the neuron always.
        neurons: module path of an MLP to the parameter of a criterion that masks ``act(x W_gate) * (x W_up)``.
        attention_input, mlp_input: module path of a block to the threshold of its input (appendix B).
        mlp_linears, attention_linears: module path of a linear layer to the threshold of its input.
        model: what the thresholds were made for: model_type, hidden_size, intermediate_size, num_hidden_layers.
        tokens: how many tokens calibration saw.
        criterion: name of the criterion, one of `cats.criteria.names`.
        levels: module path of an MLP to its own target in [0, 1), where sparsity was allocated between layers; empty
            where every layer has the same.
        sequential: whether each layer's were made behind those of the layers before it (`cats.calibrate`).
    """

    sparsity: float
    gate: ByModule = field(default_factory=dict)
    attention_input: ByModule = field(default_factory=dict)
    mlp_input: ByModule = field(default_factory=dict)
    model: dict[str, Any] = field(default_factory=dict)
    tokens: int = 0
    criterion: str = "cats"
    up: ByModule = field(default_factory=dict)
    neurons: ByModule = field(default_factory=dict)
    mlp_linears: ByModule = field(default_factory=dict)
    attention_linears: ByModule = field(default_factory=dict)
    levels: dict[str, float] = field(default_factory=dict)
    sequential: bool = False

    def __post_init__(self) -> None:
        check_sparsity(self.sparsity)
        for site in SITES:
            values = getattr(self, site)
            if not isinstance(values, Mapping):
                raise ValueError(f"{site} must map module paths to thresholds, not be a {type(values).__name__}")
            checked = {_module_path(site, name): _value(f"{site}[{name!r}]", value) for name, value in values.items()}
            object.__setattr__(self, site, checked)
        object.__setattr__(self, "levels", _levels(self.levels))
        both = [name for name in self.gate if name in self.up]
        if both:
            raise ValueError(f"gate and up cannot both have thresholds of {both[0]}: one of the two products decides")
        if not isinstance(self.model, dict):
            raise ValueError(f"model must be a mapping of what the thresholds were made for, not {_short(self.model)}")
        if isinstance(self.tokens, bool) or not isinstance(self.tokens, int) or not 0 <= self.tokens < 2**63:
            raise ValueError(f"tokens must be a whole number from 0 to 2^63, not {_short(self.tokens)}")
        if not isinstance(self.criterion, str) or not self.criterion:
            raise ValueError(f"criterion must be the name of a criterion, not {_short(self.criterion)}")
        if not isinstance(self.sequential, bool):
            raise ValueError(f"sequential must be true or false, not {_short(self.sequential)}")

    @property
    def sites(self) -> dict[str, ByModule]:
        """Site to module path to value, for the sites that have any."""
        return {site: values for site in SITES if (values := getattr(self, site))}

    @property
    def decider(self) -> str | None:
        """The product that decides which neurons are kept, "gate" or "up", or "mixed" where it is not the same in every
        MLP (`decider_of` tells); None where masks of another kind do."""
        if self.gate and self.up:
            return "mixed"
        return "up" if self.up else "gate" if self.gate else None

    def decider_of(self, name: str) -> str | None:
        """The product that decides in the MLP of module path ``name``: "gate" or "up", or None."""
        return "up" if name in self.up else "gate" if name in self.gate else None

    def level_of(self, name: str) -> float:
        """The target of the layer of module path ``name``."""
        return self.levels.get(name, self.sparsity)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Thresholds):
            return NotImplemented
        if any(getattr(self, name) != getattr(other, name) for name in _PLAIN):
            return False
        return all(_same(getattr(self, site), getattr(other, site)) for site in SITES)

    def save(self, path: str | Path) -> None:
        """Write as JSON (format 2), whole or not at all. Raises OSError naming ``path``."""
        data = {
            "format": FORMAT,
            "criterion": self.criterion,
            "sparsity": self.sparsity,
            "decider": self.decider,
            **({"levels": self.levels} if self.levels else {}),
            **({"sequential": True} if self.sequential else {}),
            "model": self.model,
            "tokens": self.tokens,
            "sites": {
                site: {name: _encode(value) for name, value in values.items()} for site, values in self.sites.items()
            },
        }
        write_text_atomically(path, json.dumps(data, indent=2) + "\n")

    @classmethod
    def load(cls, path: str | Path) -> "Thresholds":
        """Read what `save` wrote, or a file of format 1.

        Raises:
            ValueError: it is not a valid thresholds file; the sentence names the key and what is allowed.
            OSError: it is not there, or cannot be read.
        """
        try:
            return cls._from_json(_read(Path(path)))
        except (ValueError, TypeError) as error:
            raise ValueError(f"{path} is not a CATS thresholds file: {error}") from error

    @classmethod
    def _from_json(cls, data: Any) -> "Thresholds":
        version = data.pop("format", None) if isinstance(data, dict) else None
        if version == FORMAT_1:
            _check_keys(data, ("sparsity", *SITES_1, "model", "tokens"), ("sparsity", "gate"))
            return cls(**data)
        if version != FORMAT:
            raise ValueError(f'its "format" is neither "{FORMAT}" nor "{FORMAT_1}"')
        allowed = ("criterion", "sparsity", "decider", "levels", "sequential", "model", "tokens", "sites")
        _check_keys(data, allowed, ("criterion", "sparsity", "sites"))
        sites = data.pop("sites")
        if not isinstance(sites, dict):
            raise ValueError(f"sites must map sites to thresholds, not be {_short(sites)}")
        _check_keys(sites, SITES, (), "sites.")
        for site, values in sites.items():
            if isinstance(values, dict):
                sites[site] = {name: _decode(f"{site}[{name!r}]", value) for name, value in values.items()}
        decider = data.pop("decider", None)
        thresholds = cls(**data, **sites)
        if decider != thresholds.decider:
            raise ValueError(f"decider is {_short(decider)}, but its sites say {thresholds.decider!r}")
        return thresholds


def check_sparsity(sparsity: float) -> None:
    """Raise ValueError unless ``sparsity`` is in [0, 1)."""
    if isinstance(sparsity, bool) or not isinstance(sparsity, int | float) or not 0 <= sparsity < 1:
        raise ValueError(f"sparsity must be a number in [0, 1), not {_short(sparsity)}")


def _read(path: Path) -> Any:
    try:
        status = path.stat()
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{path} does not exist: give the file that `cats calibrate` or save wrote") from error
    if not stat.S_ISREG(status.st_mode):
        raise ValueError("it is not a regular file")
    if status.st_size > LARGEST_FILE:
        raise ValueError(f"it has {status.st_size} bytes, where thresholds have at most {LARGEST_FILE}")

    def refuse(constant: str) -> NoReturn:
        raise ValueError(f"it holds {constant}, where only finite numbers are allowed")

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        made: dict[str, Any] = {}
        for key, value in pairs:
            if key in made:
                raise ValueError(f"the key {_short(key)} is there twice")
            made[key] = value
        return made

    try:
        return json.loads(path.read_text(encoding="utf-8"), parse_constant=refuse, object_pairs_hook=once)
    except RecursionError:
        raise ValueError("it is nested too deeply: sites, module paths and values are three levels") from None


def _check_keys(data: Mapping[str, Any], allowed: tuple[str, ...], needed: tuple[str, ...], prefix: str = "") -> None:
    unknown = [key for key in data if key not in allowed]
    if unknown:
        raise ValueError(f"unknown key {_short(prefix + unknown[0])}: allowed are {', '.join(allowed)}")
    missing = [key for key in needed if key not in data]
    if missing:
        raise ValueError(f"the key {prefix + missing[0]!r} is missing")


def _module_path(site: str, name: object) -> str:
    if not isinstance(name, str):
        raise ValueError(f"{site} must have module paths as keys, not {_short(name)}")
    return name


def _levels(values: object) -> dict[str, float]:
    """Module path to a sparsity."""
    if not isinstance(values, Mapping):
        raise ValueError(f"levels must map module paths to sparsities, not be a {type(values).__name__}")
    for name, level in values.items():
        try:
            check_sparsity(level)
        except ValueError as error:
            raise ValueError(f"levels[{name!r}]: {error}") from error
    return {_module_path("levels", name): float(level) for name, level in values.items()}


def _value(key: str, value: Any) -> Value:
    """A finite number >= 0 as a float, or a vector of numbers >= 0 (infinity too) as a float32 tensor on the CPU."""
    if isinstance(value, Tensor) and value.dim() == 0:
        value = value.item()
    if isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value <= LARGEST:
        return float(value)
    if isinstance(value, Tensor) and value.dim() == 1 and value.numel() and value.is_floating_point():
        vector = value.detach().to("cpu", torch.float32, copy=True).contiguous()
        if bool((vector >= 0).all()):
            return vector
        raise ValueError(f"{key} must be a vector of numbers that are not negative: it has NaN or a negative number")
    shown = f"a tensor of {value.dtype} and shape {tuple(value.shape)}" if isinstance(value, Tensor) else _short(value)
    raise ValueError(f"{key} must be a finite number of at least 0 (in float32) or a float vector, not {shown}")


def _encode(value: Value) -> float | dict[str, str]:
    if isinstance(value, Tensor):
        return {"float32": base64.b64encode(value.numpy().astype("<f4").tobytes()).decode()}
    return value


def _decode(key: str, value: Any) -> Any:
    if not isinstance(value, dict):
        return value
    text = value.get("float32")
    if set(value) != {"float32"} or not isinstance(text, str):
        raise ValueError(f'{key} must be a number or {{"float32": base64}}, not {_short(value)}')
    try:
        content = base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        raise ValueError(f"{key}.float32 is not base64") from None
    if not content or len(content) % 4:
        raise ValueError(f"{key}.float32 has {len(content)} bytes: float32 takes 4 for each of at least one number")
    return torch.from_numpy(np.frombuffer(content, "<f4").astype(np.float32))


def _same(left: ByModule, right: ByModule) -> bool:
    if left.keys() != right.keys():
        return False
    for name, a in left.items():
        b = right[name]
        if isinstance(a, Tensor) and isinstance(b, Tensor):
            if not torch.equal(a, b):
                return False
        elif isinstance(a, Tensor) or isinstance(b, Tensor) or a != b:
            return False
    return True


def _short(value: object) -> str:
    """``repr`` of a value for a message, cut."""
    try:
        text = repr(value)
    except ValueError:  # an integer of more digits than Python prints
        return "a number of thousands of digits"
    return text if len(text) <= 80 else f"{text[:80]}..."
