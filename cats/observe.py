"""Run a model over batches and look at the activations that CATS thresholds, at real tokens only.

Three sites: ``gate`` is ``act(x W_gate)`` before any threshold; ``attention_input`` and ``mlp_input`` are the inputs of
the two blocks of a layer (equation 7, appendix B).
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from cats.activation import CATSActivation
from cats.structure import activation_name, attention_blocks, eval_mode, execution_device, gated_mlps

SITES = ("gate", "attention_input", "mlp_input")
Batches = Iterable[Mapping[str, Any] | Tensor]
Record = Callable[[str, str, Tensor], None]  # site, module path, (tokens, features)


def check_sites(sites: Iterable[str]) -> tuple[str, ...]:
    """Validate names of sites; raises ValueError naming the allowed ones."""
    sites = tuple(sites)
    unknown = [site for site in sites if site not in SITES]
    if unknown or not sites:
        raise ValueError(f"unknown sites {unknown}: allowed are {', '.join(SITES)}")
    return sites


@contextmanager
def dense_path(model: nn.Module) -> Iterator[None]:
    """Keep patched MLPs on their dense masked path, so that every activation is formed and hooks see it."""
    states: list[Any] = [mlp.cats_state for mlp in model.modules() if hasattr(mlp, "cats_state")]
    before = [state.sparse for state in states]
    for state in states:
        state.sparse = False
    try:
        yield
    finally:
        for state, sparse in zip(states, before, strict=True):
            state.sparse = sparse


def _first_tensor(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    return args[0] if args else kwargs["hidden_states"]


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

    def watch_output(self, site: str, name: str, module: nn.Module) -> None:
        def hook(_module: nn.Module, _args: Any, output: Tensor) -> None:
            self._see(site, name, output)

        self.silent[site, name] = None
        self.handles.append(module.register_forward_hook(hook))

    def watch_input(self, site: str, name: str, module: nn.Module) -> None:
        def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            self._see(site, name, _first_tensor(args, kwargs))

        self.silent[site, name] = None
        # prepended, so that a threshold which cats.apply put on this input has not acted yet
        self.handles.append(module.register_forward_pre_hook(hook, with_kwargs=True, prepend=True))


def _model_inputs(batch: Mapping[str, Any] | Tensor, device: torch.device) -> dict[str, Tensor]:
    if isinstance(batch, Tensor):
        batch = {"input_ids": batch}
    if not isinstance(batch, Mapping) or "input_ids" not in batch:
        raise TypeError(
            f"a batch must be a tensor of token ids or a mapping with input_ids, not {type(batch).__name__}"
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
    return inputs


def observe(
    model: nn.Module, batches: Batches, record: Record, sites: Iterable[str] = ("gate",), after_threshold: bool = False
) -> int:
    """Run ``model`` over ``batches`` without gradients and hand every site's activations to ``record``.

    What torch.compile has compiled runs eagerly meanwhile, since compiled code calls no hooks.

    Args:
        model: a causal language model, patched or not; each module's mode (train or eval) is restored.
        batches: mappings with ``input_ids`` (batch, length) and optionally ``attention_mask``, both tensors or rows of
            numbers, or tensors of token ids.
        record: called as ``record(site, module path, values)`` with values of shape (real tokens, features).
        sites: which of `SITES` to watch.
        after_threshold: look at the gate activations behind the CATS (or ReLU) activation instead of before it.

    Returns:
        How many real tokens were seen.

    Raises:
        TypeError: a batch is neither a tensor nor a mapping with ``input_ids``, or cannot be made a tensor.
        ValueError: there was no batch, or no real token in any; a watched module never ran (a vision tower fed with
            text, a block that does not call its activation); a mask of another shape than the tokens.
    """
    sites = check_sites(sites)
    watcher, tokens, device = _Watcher(record), 0, execution_device(model)
    try:
        for name, mlp in gated_mlps(model).items():
            if "gate" in sites:
                activation = getattr(mlp, activation_name(mlp))
                inner = (
                    activation.inner if isinstance(activation, CATSActivation) and not after_threshold else activation
                )
                watcher.watch_output("gate", name, inner)
            if "mlp_input" in sites:
                watcher.watch_input("mlp_input", name, mlp)
        if "attention_input" in sites:
            for name, attention in attention_blocks(model).items():
                watcher.watch_input("attention_input", name, attention)
        with torch.no_grad(), eval_mode(model), dense_path(model), torch.compiler.set_stance("force_eager"):
            for batch in batches:
                inputs = _model_inputs(batch, device)
                mask = inputs.get("attention_mask")
                watcher.valid = None if mask is None else mask.bool()
                tokens += int(inputs["input_ids"].numel() if mask is None else mask.sum())
                model(**inputs, use_cache=False)
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
