"""Pretrain the pocket model, a small Llama (SiLU gate), on the source of the standard library: `cats/pocket_model`.

Cost: 77 s on an H200; 1.6 hours on two CPU cores (27.9 M tokens at 5.0 thousand a second). Commands:
    python -m experiments.pocket.pretrain                          # the running Python's library -> pocket_model/
    python -m experiments.pocket.pretrain --prepare corpus.npz     # tokenise only, to train on another machine:
    python -m experiments.pocket.pretrain --corpus corpus.npz --device cuda --out DIR

Everything random is seeded. The checkpoint kept is the one of the lowest loss on held-out modules; nothing else is
looked at to choose it.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import time
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from torch.nn import functional
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM

from experiments.pocket import tokenizer as bpe


@dataclass(frozen=True)
class Recipe:
    """Every number of the recipe; each is an option of the command line."""

    hidden: int = 192
    intermediate: int = 512
    layers: int = 5
    heads: int = 6
    context: int = 256  # tokens
    batch: int = 32  # windows a step
    steps: int = 3400
    learning_rate: float = 4e-3
    warmup: int = 200  # steps
    weight_decay: float = 0.3
    dropout: float = 0.1  # on what each block adds to the residual stream; without it, perplexity was 15.8, not 12.6
    seed: int = 0
    evaluate_every: int = 200  # steps


def prepare(path: Path) -> None:
    """Write the tokenised corpus of the running Python, its tokenizer and its description to the .npz file `path`."""
    from experiments.pocket.corpus import load_corpus

    train, heldout, report = load_corpus()
    print(report)
    tokenizer = bpe.train_tokenizer(train["text"])
    arrays = {
        "train": bpe.encode_texts(tokenizer, train["text"]),
        "heldout": bpe.encode_texts(tokenizer, heldout["text"]),
        "tokenizer": np.array(tokenizer.to_str()),
        "report": np.array(json.dumps(asdict(report))),
    }
    print(f"tokens: {len(arrays['train']):,} to train on, {len(arrays['heldout']):,} held out")
    temporary = path.with_name(path.name + ".tmp.npz")
    np.savez_compressed(temporary, allow_pickle=False, **arrays)
    os.replace(temporary, path)


def build_model(recipe: Recipe, vocabulary: int) -> LlamaForCausalLM:
    """Randomly initialised, seeded model with tied embeddings; residual dropout comes as hooks, on in training mode."""
    torch.manual_seed(recipe.seed)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=recipe.hidden,
        intermediate_size=recipe.intermediate,
        num_hidden_layers=recipe.layers,
        num_attention_heads=recipe.heads,
        max_position_embeddings=recipe.context,
        hidden_act="silu",
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
    )
    model = LlamaForCausalLM(config)

    def drop(module: torch.nn.Module, inputs: Any, output: torch.Tensor) -> torch.Tensor:
        return functional.dropout(output, recipe.dropout, training=module.training)

    if recipe.dropout:
        for layer in model.model.layers:
            layer.self_attn.o_proj.register_forward_hook(drop)
            layer.mlp.down_proj.register_forward_hook(drop)
    return model


def next_token_loss(model: torch.nn.Module, windows: torch.Tensor) -> torch.Tensor:
    """Mean negative log-likelihood in nats of windows (b, context + 1) of ids, each token given those before it."""
    logits = model(input_ids=windows[:, :-1], use_cache=False).logits
    return functional.cross_entropy(logits.flatten(0, 1).float(), windows[:, 1:].flatten())


@torch.no_grad()
def evaluate(model: torch.nn.Module, tokens: torch.Tensor, context: int, limit: int | None = None) -> float:
    """Mean loss in nats over disjoint windows of `tokens`; `limit` keeps that many, evenly spread."""
    windows = tokens[: (len(tokens) - 1) // context * context + 1].unfold(0, context + 1, context)
    if limit is not None:
        windows = windows[torch.linspace(0, len(windows) - 1, min(limit, len(windows))).long()]
    model.eval()
    losses = [next_token_loss(model, chunk) * len(chunk) for chunk in windows.split(64)]
    model.train()
    return float(torch.stack(losses).sum()) / len(windows)


def rate_at(step: int, recipe: Recipe) -> float:
    """Learning rate of a step: linear warm-up, then a cosine down to zero."""
    if step < recipe.warmup:
        return recipe.learning_rate * (step + 1) / recipe.warmup
    progress = (step - recipe.warmup) / max(1, recipe.steps - recipe.warmup)
    return recipe.learning_rate * 0.5 * (1 + math.cos(math.pi * progress))


def make_optimizer(model: torch.nn.Module, recipe: Recipe) -> torch.optim.AdamW:
    """AdamW that decays matrices and leaves the norms alone."""
    matrices = [p for p in model.parameters() if p.dim() >= 2]
    vectors = [p for p in model.parameters() if p.dim() < 2]
    groups = [{"params": matrices, "weight_decay": recipe.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=recipe.learning_rate, betas=(0.9, 0.95), fused=True)


def train(recipe: Recipe, corpus: dict[str, np.ndarray], device: str, out: Path) -> dict[str, Any]:
    """Train by `recipe`, keep the best checkpoint by held-out loss in `out`, return the numbers of the run."""
    torch.set_float32_matmul_precision("high")
    tokenizer = Tokenizer.from_str(str(corpus["tokenizer"]))
    model: torch.nn.Module = build_model(recipe, tokenizer.get_vocab_size())
    model.to(device)
    optimizer = make_optimizer(model, recipe)
    tokens = {side: torch.from_numpy(corpus[side].astype(np.int64)).to(device) for side in ("train", "heldout")}
    generator = torch.Generator(device=device).manual_seed(recipe.seed)
    span = torch.arange(recipe.context + 1, device=device)
    last_start = len(tokens["train"]) - recipe.context
    cuda = device.startswith("cuda")
    quick = None if cuda else 200  # windows a regular evaluation reads: all take 40 s on two cores
    out.mkdir(parents=True, exist_ok=True)
    best, history, started = (math.inf, 0), [], time.perf_counter()
    bar = tqdm(range(1, recipe.steps + 1), desc="pretrain", unit="step", mininterval=2)
    for step in bar:
        for group in optimizer.param_groups:
            group["lr"] = rate_at(step - 1, recipe)
        starts = torch.randint(last_start, (recipe.batch, 1), device=device, generator=generator)
        loss = next_token_loss(model, tokens["train"][starts + span])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % recipe.evaluate_every == 0 or step == recipe.steps:
            heldout = evaluate(model, tokens["heldout"], recipe.context, quick)
            history.append({"step": step, "train_loss": float(loss.detach()), "heldout_loss": heldout})
            tqdm.write(f"step {step}: train {history[-1]['train_loss']:.4f}, held out {heldout:.4f} nats a token")
            if heldout < best[0]:
                best = (heldout, step)
                save_weights(model, out)
    seconds = time.perf_counter() - started
    model.load_state_dict(load_file(out / "model.safetensors"), strict=False)  # the tied head is stored once
    final = {"heldout": evaluate(model, tokens["heldout"], recipe.context)}
    final["train"] = evaluate(model, tokens["train"], recipe.context, limit=500)
    return {
        "recipe": asdict(recipe),
        "corpus": json.loads(str(corpus["report"])),
        "parameters": sum(p.numel() for p in model.parameters()),
        "corpus_tokens": {side: len(ids) for side, ids in tokens.items()},
        "tokens_processed": recipe.steps * recipe.batch * recipe.context,
        "seconds": seconds,
        "device": torch.cuda.get_device_name() if cuda else f"CPU, {torch.get_num_threads()} threads",
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        "best_step": best[1],
        "train_loss": final["train"],
        "heldout_loss": final["heldout"],
        "heldout_perplexity": math.exp(final["heldout"]),
        "history": history,
    }


def save_weights(model: Any, out: Path) -> None:
    """config.json and model.safetensors (float32; the tied head stored once), each replaced atomically."""
    model.config.save_pretrained(out)
    state = {name: value.float().cpu().contiguous() for name, value in model.state_dict().items()}
    del state["lm_head.weight"]
    save_file(state, out / "model.safetensors.tmp", metadata={"format": "pt"})
    os.replace(out / "model.safetensors.tmp", out / "model.safetensors")


def main(arguments: list[str] | None = None) -> None:
    """Command line: see the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    parser.add_argument("--out", type=Path, default=Path("pocket_model"), help="folder for the model")
    parser.add_argument("--prepare", type=Path, metavar="FILE", help="write the tokenised corpus here and stop")
    parser.add_argument("--corpus", type=Path, metavar="FILE", help="train on this file of --prepare")
    for field in fields(Recipe):
        option, default = f"--{field.name.replace('_', '-')}", field.default
        parser.add_argument(option, type=type(default), default=default, help=f"default {default}")
    options = parser.parse_args(arguments)
    if options.prepare:
        prepare(options.prepare)
        return
    device = options.device if options.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    options.out.mkdir(parents=True, exist_ok=True)
    file = options.corpus or options.out / "corpus.npz"
    if not options.corpus:
        prepare(file)
    with np.load(file) as archive:
        corpus = dict(archive)
    recipe = Recipe(**{field.name: getattr(options, field.name) for field in fields(Recipe)})
    run = train(recipe, corpus, device, options.out)
    bpe.as_pretrained(Tokenizer.from_str(str(corpus["tokenizer"])), recipe.context).save_pretrained(options.out)
    (options.out / "run.json").write_text(json.dumps(run, indent=1) + "\n")
    (options.out / "README.md").write_text(model_card(run))
    if not options.corpus:
        file.unlink()
    print(f"held-out perplexity {run['heldout_perplexity']:.3f} after {run['seconds']:.0f} s; model in {options.out}")


def model_card(run: dict[str, Any]) -> str:
    """The model card, every number of it from the run."""
    recipe, corpus, tokens, versions = run["recipe"], run["corpus"], run["corpus_tokens"], run["versions"]
    changed = {key: value for key, value in recipe.items() if value != getattr(Recipe(), key)}
    options = "".join(f" --{key.replace('_', '-')} {value}" for key, value in changed.items())
    rows = "\n".join(f"| {key.replace('_', ' ')} | {value} |" for key, value in recipe.items())
    return f"""---
license: apache-2.0
library_name: transformers
pipeline_tag: text-generation
---
# Pocket model

A Llama-architecture language model of {run["parameters"] / 1e6:.2f} million parameters (SiLU gate, tied embeddings,
float32), trained on the source of Python's standard library. It exists to reproduce the experiments on activation
sparsity offline; it writes plausible Python and knows nothing else.

- **Corpus**: standard library of Python {corpus["python"]}, tests, vendored and generated files left out.
  Training: {corpus["modules_train"]} modules, {corpus["bytes_train"]:,} bytes, {tokens["train"]:,} tokens.
  Held out by a hash of the module family's name: {corpus["modules_heldout"]} modules,
  {corpus["bytes_heldout"]:,} bytes, {tokens["heldout"]:,} tokens. SHA-256 of the corpus:
  `{corpus["sha256"]}`.
- **Training**: {run["tokens_processed"]:,} tokens in {run["seconds"]:.0f} s on {run["device"]}
  (Python {versions["python"]}, torch {versions["torch"]}), seed {recipe["seed"]}.
- **Loss** in nats a token, windows of {recipe["context"]} tokens: {run["heldout_loss"]:.4f} held out,
  {run["train_loss"]:.4f} on training modules. Held-out perplexity {run["heldout_perplexity"]:.3f}.
  The checkpoint, step {run["best_step"]}, is the one of the lowest held-out loss.
- **Again**: `nox -s pretrain{" --" if options else ""}{options}`

| recipe | |
|---|---|
{rows}
"""


if __name__ == "__main__":
    main()
