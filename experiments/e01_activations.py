"""Figure 1: histograms of |SiLU(x W_gate)| in the first, middle and last layer, with the 50 % threshold.

Purpose: whether trained models have many small activations, which is what makes CATS possible. As a control the same is
measured on the same model with random weights, initialised as for training from scratch and calibrated on the same
text: what such a network shows as well does not come from training. Also the thresholds of every layer at each target,
and the sparsity they give on text that calibration has not seen.
Cost: four passes over a few hundred blocks of text; half a minute for the pocket model on two cores.

    nox -s experiment -- e01 --model PATH_OR_HUB_ID
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from cats.calibration import Thresholds, histograms
from cats.models import load_config, load_model
from cats.structure import resolve_device
from cats.text_config import fingerprint
from experiments.data import batches
from experiments.framework.common_options import check_tokens
from experiments.framework.config import Config
from experiments.framework.cost import Cost, memory_per_parameter, text
from experiments.framework.identity import text_identity
from experiments.framework.options import Count, Positive, Range, Sparsity
from experiments.framework.subject import check_length, check_models, fractions_below
from experiments.framework.tables import WEIGHTS, HistogramRow, Row, ThresholdRow


@dataclass(frozen=True, kw_only=True)
class Options:
    """Options of e01.

    Attributes:
        blocks: of ``length`` tokens, for calibration and again of held-out text.
        batch_size: blocks at once; lowered when memory runs out.
        targets: sparsities.
        bins, largest: of the histograms: equal bins up to ``largest``, and one beyond.
    """

    blocks: Count = 128
    length: Annotated[int, Range(2)] = 512
    batch_size: Count = 4
    targets: tuple[Sparsity, ...] = (0.5, 0.7, 0.9)
    bins: Count = 800
    largest: Positive = 8.0

    def __post_init__(self) -> None:
        check_tokens(blocks=self.blocks, length=self.length)


def text_blocks(config: Config[Options]) -> dict[str, int]:
    """Blocks of text that it needs of each purpose."""
    return {"train": config.options.blocks, "heldout": config.options.blocks}


def run(config: Config[Options]) -> Iterable[Row]:
    """Measure histograms and thresholds of each model in ``config.models``, and of its control."""
    check_models(config)
    check_length(config, text_blocks(config))
    for model in config.models:
        for weights in WEIGHTS:
            compute = partial(measure, config, model, weights)
            yield from config.unit(f"{model}/{weights}", compute, (HistogramRow, ThresholdRow))


def cost(config: Config[Options]) -> Cost:
    """Calibration and held-out text, of the model and of its control."""
    options = config.options
    work = text(options.blocks, options.length, options.batch_size) * (2 * len(WEIGHTS))
    return Cost(work, memory=memory_per_parameter([config.dtype]), loads=len(WEIGHTS))


def random_model(config: Config[Options], name: str, dtype: torch.dtype) -> PreTrainedModel:
    """A model of the same configuration with the weights that transformers gives to a new one."""
    device = resolve_device("auto") if config.device == "sharded" else config.device
    torch.manual_seed(config.seed)
    with torch.device(device):
        model: Any = AutoModelForCausalLM.from_config(load_config(name), dtype=dtype)
    made: PreTrainedModel = model.to(device).eval()  # buffers that transformers makes on the host follow
    return made


def measure(config: Config[Options], name: str, weights: str) -> list[Row]:
    """Rows of one model, ``pretrained`` or with ``random`` weights."""
    options = config.options
    model, tokenizer = load_model(name, config.dtype, config.device)
    assert tokenizer is not None  # check_models refuses models without one
    config.identify(name)
    config.identify_data("text", text_identity(config.data))
    if weights == "random":
        dtype = model.dtype
        del model  # before the other one takes its memory
        model = random_model(config, name, dtype)
    blocks, length = options.blocks, options.length
    text = {p: batches(config, tokenizer, p, blocks, length, options.batch_size) for p in ("train", "heldout")}
    by_site, tokens = histograms(model, config.progress(text["train"], f"{name} {weights}, calibration"))
    by_layer = {layer: histogram for (_, layer), histogram in by_site.items()}
    made = {
        target: Thresholds(
            target,
            {layer: histogram.threshold(target) for layer, histogram in by_layer.items()},
            model=fingerprint(model),
            tokens=tokens,
        )
        for target in options.targets
    }
    below = fractions_below(model, config.progress(text["heldout"], f"{name} {weights}, held-out"), made)
    rows: list[Row] = []
    edges = torch.cat([torch.linspace(0, options.largest, options.bins + 1), torch.tensor([math.inf])])
    shown = {0, len(by_layer) // 2, len(by_layer) - 1}
    for index, (layer, histogram) in enumerate(by_layer.items()):
        if index in shown:
            counts = histogram.rebinned(edges).tolist()
            bars = zip(edges[:-1].tolist(), edges[1:].tolist(), counts, strict=True)
            rows += [HistogramRow(name, weights, layer, index, left, right, count) for left, right, count in bars]
        for target, thresholds in made.items():
            threshold = float(thresholds.gate[layer])
            row = ThresholdRow(
                model=name,
                weights=weights,
                criterion="cats",
                layer=layer,
                layer_index=index,
                sparsity_target=target,
                threshold=threshold,
                sparsity_calibration=histogram.fraction_below(threshold),
                sparsity_heldout=below[target, "gate", layer],
            )
            rows.append(row)
    config.notes["calibration_tokens"] = tokens
    return rows
