"""Whether a loaded model speaks English at all: its perplexity on a text that every language model has read."""

import math

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

# the preamble and first articles of the Universal Declaration of Human Rights (United Nations, 1948)
TEXT = (
    "Whereas recognition of the inherent dignity and of the equal and inalienable rights of all members of the human "
    "family is the foundation of freedom, justice and peace in the world, Whereas disregard and contempt for human "
    "rights have resulted in barbarous acts which have outraged the conscience of mankind, and the advent of a world "
    "in which human beings shall enjoy freedom of speech and belief and freedom from fear and want has been proclaimed "
    "as the highest aspiration of the common people. All human beings are born free and equal in dignity and rights. "
    "They are endowed with reason and conscience and should act towards one another in a spirit of brotherhood. "
    "Everyone is entitled to all the rights and freedoms set forth in this Declaration, without distinction of any "
    "kind, such as race, colour, sex, language, religion, political or other opinion, national or social origin, "
    "property, birth or other status."
)
# measured in bfloat16: gemma-3-270m 4.4, Qwen2.5-Coder-Instruct 0.5B 19.9 and 1.5B 2.4; gemma-3-270m with the tokenizer
# that transformers 5.17 builds of its GGUF file 412
ABSURD = 100.0


@torch.no_grad()
def sample_perplexity(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> float:
    """Perplexity per token of `TEXT`, with the tokenizer's beginning of text in front, where it has one."""
    ids = tokenizer(TEXT, return_tensors="pt")["input_ids"].to(model.device)
    nats = model(ids, labels=ids, use_cache=False).loss
    return math.exp(min(float(nats), 100.0))


def absurdity(spec: str, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> str | None:
    """One sentence if the model's perplexity on `TEXT` is absurd (NaN included), else None."""
    value = sample_perplexity(model, tokenizer)
    if value <= ABSURD:
        return None
    return (
        f"{spec} has a perplexity of {value:.3g} on a well-known English text, where a pretrained model is far below "
        f"{ABSURD:g}: it is untrained, not of English, or was loaded wrongly"
    )
