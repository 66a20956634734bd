"""Run a model over batches and look at the values that criteria threshold, at real tokens only.

Sites, always before any threshold of their own: ``gate`` is ``act(x W_gate)``; ``up`` is ``x W_up``; ``neurons`` is the
product of both; ``attention_input`` and ``mlp_input`` are the inputs of the two blocks of a layer (equation 7, appendix
B); ``mlp_linears`` and ``attention_linears`` are the inputs of each of their linear layers.
"""

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from cats.activation import CATSActivation, Mask
from cats.devices import eval_mode, execution_device
from cats.equation import GatedMLP, check_forward
from cats.structure import (
    attention_blocks,
    attention_linears,
    check_module,
    gated_mlps,
    mlp_linears,
    parts_of,
    unwrapped,
)
from cats.thresholds import SITES

__all__ = [
    "SITES",
    "Batches",
    "Record",
    "check_sites",
    "count_tokens",
    "dense_path",
    "input_mask",
    "keeps_logits",
    "masks_of",
    "model_inputs",
    "observe",
    "vocabulary_of",
]

Batches = Iterable[Mapping[str, Any] | Tensor]
Record = Callable[[str, str, Tensor], None]  # site, module path, (tokens, features)


def check_sites(sites: Iterable[str]) -> tuple[str, ...]:
    """Validate names of sites; raises ValueError naming the allowed ones."""
    if isinstance(sites, str):
        raise ValueError(f"sites must be a tuple of names, not the string {sites!r}")
    sites = tuple(sites)
    unknown = [site for site in sites if site not in SITES]
    if unknown or not sites:
        raise ValueError(f"unknown sites {unknown}: allowed are {', '.join(SITES)}")
    return sites


@contextmanager
def dense_path(model: nn.Module) -> Iterator[None]:
    """Keep patched MLPs on their dense masked path, so that every value is formed and hooks see it."""
    states: list[Any] = [mlp.cats_state for mlp in model.modules() if "cats_state" in mlp.__dict__]
    states += [mask for mask in model.modules() if isinstance(mask, Mask)]
    before = [(state.sparse, state.dense_prompts) for state in states]
    for state in states:
        state.sparse = state.dense_prompts = False
    try:
        yield
    finally:
        for state, (sparse, dense_prompts) in zip(states, before, strict=True):
            state.sparse, state.dense_prompts = sparse, dense_prompts


def masks_of(module: Any) -> dict[str, Mask]:
    """The masks inside a patched MLP, by the place where they act (see `cats.sparse_forward`)."""
    return dict(module._modules.get("cats_masks", {}).items())


def input_mask(module: Any) -> Mask | None:
    """The mask that a patch has put on the input of a block or a linear layer."""
    return module._modules.get("cats_input")


class _Watcher:
    """Hooks on the sites.

    Attributes:
        valid: the mask of real tokens of the batch under way, or None when all are.
        silent: the watched (site, module path) that have not been seen yet, in order.
    """

    def __init__(self, record: Record) -> None:
        self.record = record
        self.valid: Tensor | None = None
        self.silent: dict[tuple[str, str], None] = {}
        self.handles: list[Any] = []

    def _see(self, site: str, name: str, value: Tensor) -> None:
        self.silent.pop((site, name), None)
        value = value.detach()
        if self.valid is None:
            value = value.reshape(-1, value.shape[-1])
        elif value.shape[:-1] == self.valid.shape:
            value = value[self.valid.to(value.device)]
        else:
            raise ValueError(
                f"{name} sees rows of shape {tuple(value.shape[:-1])} where the batch has tokens of shape "
                f"{tuple(self.valid.shape)}: with an attention_mask only blocks that see every token can be watched"
            )
        self.record(site, name, value)

    def watch_output(
        self, site: str, name: str, module: nn.Module, of: Callable[[Tensor], Tensor] | None = None
    ) -> None:
        """Record the output of ``module``, or what ``of`` makes of it."""

        def hook(_module: nn.Module, _args: Any, output: Tensor) -> None:
            self._see(site, name, output if of is None else of(output))

        self.silent[site, name] = None
        self.handles.append(module.register_forward_hook(hook))

    def watch_input(self, site: str, name: str, module: nn.Module) -> None:
        """Record the first argument of ``module``."""

        def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            self._see(site, name, args[0] if args else next(iter(kwargs.values())))

        self.silent[site, name] = None
        # prepended, so that a threshold which cats.apply put on this input has not acted yet
        self.handles.append(module.register_forward_pre_hook(hook, with_kwargs=True, prepend=True))

    def watch_mlp(self, sites: Iterable[str], name: str, mlp: GatedMLP) -> None:
        """The sites inside one MLP whose values are per neuron."""
        of, masks = parts_of(mlp), masks_of(mlp)
        activation = mlp._modules.get(of.activation or "cats_activation")
        if "gate" in sites and activation is not None:
            inner = activation.inner if isinstance(activation, CATSActivation) else activation
            self.watch_output("gate", name, inner)
        elif "gate" in sites:
            function, fused = of.function, of.up is None
            assert function is not None
            self.watch_output(
                "gate", name, mlp._modules[of.gate], lambda y: function(y.chunk(2, -1)[0] if fused else y)
            )
        if "up" in sites and of.up is not None:
            self.watch_output("up", name, mlp._modules[of.up])
        elif "up" in sites:
            self.watch_output("up", name, mlp._modules[of.gate], lambda y: y.chunk(2, -1)[1])
        if "neurons" in sites:
            self.watch_input("neurons", name, masks.get("neurons", mlp._modules[of.down]))


def _watch(watcher: _Watcher, model: nn.Module, sites: tuple[str, ...]) -> None:
    for name, mlp in gated_mlps(model).items():
        check_forward(name, mlp)
        watcher.watch_mlp(sites, name, mlp)
        if "mlp_input" in sites:
            watcher.watch_input("mlp_input", name, mlp)
    if "mlp_linears" in sites:
        for name, (mlp, part) in mlp_linears(model).items():
            watcher.watch_input("mlp_linears", name, masks_of(mlp).get(f"input_{part}", mlp._modules[part]))
    if "attention_input" in sites:
        for name, attention in attention_blocks(model).items():
            watcher.watch_input("attention_input", name, attention)
    if "attention_linears" in sites:
        for name, linear in attention_linears(model).items():
            watcher.watch_input("attention_linears", name, linear)


def _watch_kept(watcher: _Watcher, model: nn.Module) -> None:
    """What is left after the criterion in force: zeros are what is skipped."""
    for name, mlp in gated_mlps(model).items():
        of, masks = parts_of(mlp), masks_of(mlp)
        activation = mlp._modules.get(of.activation or "cats_activation")
        if not masks and activation is not None:
            watcher.watch_output("gate", name, activation)
        elif not masks:
            watcher.watch_mlp(("gate",), name, mlp)
        for place, mask in masks.items():
            if place.startswith("input_"):
                watcher.watch_output("mlp_linears", f"{name}.{place.removeprefix('input_')}", mask)
            else:
                watcher.watch_output(place, name, mask)
    try:
        linears = attention_linears(model)
    except ValueError:  # no self_attn
        return
    for name, linear in linears.items():
        if (mask_of_input := input_mask(linear)) is not None:
            watcher.watch_output("attention_linears", name, mask_of_input)


def model_inputs(batch: Mapping[str, Any] | Tensor, device: torch.device, vocabulary: int | None) -> dict[str, Tensor]:
    """``input_ids`` and perhaps ``attention_mask`` of a batch, each (batch, length) on ``device``.

    Raises:
        TypeError, ValueError: as `observe`.
    """
    if isinstance(batch, Tensor):
        batch = {"input_ids": batch}
    if not isinstance(batch, Mapping) or "input_ids" not in batch:
        # going through a mapping gives its keys
        advice = "; text must be tokenized, and one batch alone must be in a list: [batch]"
        raise TypeError(
            f"a batch must be a tensor of token ids or a mapping with input_ids, not {type(batch).__name__}"
            + (advice if isinstance(batch, str) else "")
        )
    inputs = {}
    for key in ("input_ids", "attention_mask"):
        if key in batch:
            try:
                value = torch.as_tensor(batch[key], device=device)
            except (TypeError, ValueError) as error:
                raise TypeError(f"{key} of a batch must be a tensor or rows of equal length: pad them") from error
            inputs[key] = value[None] if value.dim() == 1 else value
    shapes = {key: tuple(value.shape) for key, value in inputs.items()}
    if len(set(shapes.values())) > 1:
        raise ValueError(f"attention_mask must have the shape of input_ids, (batch, length), not {shapes}")
    ids = inputs["input_ids"]
    if ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
        raise TypeError(f"input_ids must be whole numbers, not {ids.dtype}")
    if vocabulary is not None and ids.numel() and not (int(ids.min()) >= 0 and int(ids.max()) < vocabulary):
        raise ValueError(f"input_ids must lie in 0 to {vocabulary - 1}, this model's vocabulary")
    return inputs


def count_tokens(batches: Batches) -> int:
    """Real tokens, or what is as good for spreading a sample: `observe` refuses what these are not."""
    total = 0
    for batch in batches:
        inputs = model_inputs(batch, torch.device("cpu"), None)
        mask = inputs.get("attention_mask")
        total += inputs["input_ids"].numel() if mask is None else int(mask.sum())
    return total


def vocabulary_of(model: nn.Module) -> int | None:
    """How many ids ``model`` knows; None where that cannot be told."""
    try:
        return int(unwrapped(model).get_input_embeddings().num_embeddings)  # type: ignore[operator]
    except (AttributeError, NotImplementedError, TypeError):
        return None


def keeps_logits(model: nn.Module) -> bool:
    """Whether its forward can be asked for the last token's logits alone."""
    return "logits_to_keep" in inspect.signature(unwrapped(model).forward).parameters


def _run(model: nn.Module, batches: Batches, watcher: _Watcher, watch: Callable[[], None]) -> int:
    tokens, device, vocabulary = 0, execution_device(model), vocabulary_of(model)
    # logits of a whole batch, which nobody reads, can take more memory than all else: 64 GB for 64 x 1024 tokens
    fewest: dict[str, Any] = {"logits_to_keep": 1} if keeps_logits(model) else {}
    try:
        watch()
        with torch.no_grad(), eval_mode(model), dense_path(model), torch.compiler.set_stance("force_eager"):
            for batch in batches:
                inputs = model_inputs(batch, device, vocabulary)
                if not inputs["input_ids"].numel():
                    continue
                mask = inputs.get("attention_mask")
                # a mask of ones alone says nothing: experts, which see some of the tokens, are watched all the same
                watcher.valid = None if mask is None or bool(mask.all()) else mask.bool()
                tokens += int(inputs["input_ids"].numel() if mask is None else mask.sum())
                model(**inputs, use_cache=False, **fewest)
    finally:
        for handle in watcher.handles:
            handle.remove()
    if tokens == 0:
        raise ValueError("no tokens to look at: the batches are empty or fully masked; give at least one real token")
    if watcher.silent:
        names = ", ".join(name for _site, name in watcher.silent)
        raise ValueError(
            f"nothing was seen of {names}: the model did not run them, or not their activation modules; "
            "give the part of the model that the batches run through"
        )
    return tokens


def observe(
    model: nn.Module, batches: Batches, record: Record, sites: Iterable[str] = ("gate",), after_threshold: bool = False
) -> int:
    """Run ``model`` over ``batches`` without gradients and hand every site's values to ``record``.

    What torch.compile has compiled runs eagerly meanwhile, since compiled code calls no hooks.

    Args:
        model: a causal language model, patched or not; each module's mode (train or eval) is restored.
        batches: mappings with ``input_ids`` (batch, length) and optionally ``attention_mask``, both tensors or rows of
            numbers, or tensors of token ids.
        record: called as ``record(site, module path, values)`` with values of shape (real tokens, features).
        sites: which of `SITES` to watch.
        after_threshold: look instead at what is left behind the criterion in force, 0 where it skips, at its own sites;
            unpatched MLPs show their gate.

    Returns:
        How many real tokens were seen.

    Raises:
        TypeError: ``model`` is no module; a batch is neither a tensor nor a mapping with ``input_ids``, or cannot be
            made a tensor of ids.
        ValueError: there was no batch, or no real token in any; an id outside the vocabulary; a watched module never
            ran (a vision tower fed with text, a block that does not call its activation); a block has had its forward
            replaced; a mask of another shape than the tokens.
    """
    check_module(model)
    sites, watcher = check_sites(sites), _Watcher(record)
    if after_threshold:
        return _run(model, batches, watcher, lambda: _watch_kept(watcher, model))
    return _run(model, batches, watcher, lambda: _watch(watcher, model, sites))
