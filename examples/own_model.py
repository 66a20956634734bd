"""CATS on a model of your own: calibrate, apply, generate, measure, save and share the thresholds.

python examples/own_model.py                                  # the shipped pocket model, offline, seconds
python examples/own_model.py HuggingFaceTB/SmolLM2-360M       # a hub id, or a directory of save_pretrained
python examples/own_model.py pocket up-norm                   # another criterion than CATS
"""

import sys
from pydoc_data.topics import topics

import torch

import cats
from cats.models import load_model


def main(name: str, criterion: str = "cats") -> None:
    model, tokenizer = load_model(name, device="cuda" if torch.cuda.is_available() else "cpu")
    assert tokenizer is not None, "a model with random weights has no tokenizer"
    # any text that is like what the model will read; here Python's documentation
    batches = [tokenizer(topics[topic][:600], return_tensors="pt") for topic in ("assignment", "function", "strings")]

    thresholds = cats.calibrate(model, batches, sparsity=0.5, criterion=criterion)
    cats.apply(model, thresholds)
    prompt = tokenizer("def main(", return_tensors="pt")["input_ids"].to(model.device)
    output = model.generate(prompt, max_new_tokens=40, do_sample=False, pad_token_id=tokenizer.eos_token_id)
    print(tokenizer.decode(output[0]))

    fractions = cats.measure_sparsity(model, batches)
    mean = sum(fractions.values()) / len(fractions)
    print(f"neurons skipped by {criterion}: {mean:.1%} on average over {len(fractions)} layers")
    thresholds.save("thresholds.json")  # a few kilobytes; whoever has the model loads them with:
    cats.apply(model, cats.Thresholds.load("thresholds.json"))
    cats.remove(model)  # the original again, bit for bit


if __name__ == "__main__":
    try:
        main(*(sys.argv[1:] or ["pocket"]))
    except (ValueError, OSError) as error:  # such as a path that does not exist
        sys.exit(str(error))
