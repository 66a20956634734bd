"""What the loopback hub serves: tiny models, tiny versions of the paper's eight task data sets, and a corpus."""

import json
from pathlib import Path

import pandas as pd
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from .conftest import tiny_model
from .fake_hub import FakeHub, Repo

TASKS = ("openbookqa", "arc_easy", "winogrande", "hellaswag", "arc_challenge", "piqa", "boolq", "sciq")
ITEMS = 6

_ARC = {"id": "a", "question": "Which is a star?", "choices": {"text": ["Sun", "Moon"], "label": ["A", "B"]}}
# repository: {configuration or "" for none: one item}, with the columns of the real data sets
_ROWS = {
    "allenai/openbookqa": {"main": {**_ARC, "question_stem": "The sun is", "answerKey": "A"}},
    "allenai/ai2_arc": {"ARC-Easy": {**_ARC, "answerKey": "A"}, "ARC-Challenge": {**_ARC, "answerKey": "B"}},
    "allenai/winogrande": {
        "winogrande_xl": {"sentence": "The cup won as _ is big.", "option1": "cup", "option2": "jug", "answer": "1"}
    },
    "Rowan/hellaswag": {
        "": {"ctx_a": "A man sits.", "ctx_b": "he", "activity_label": "S", "endings": ["rises", "flies"], "label": "0"}
    },
    "baber/piqa": {"": {"goal": "To boil water,", "sol1": "heat it.", "sol2": "cool it.", "label": 0}},
    "aps/super_glue": {"boolq": {"passage": "Iron is a metal.", "question": "is iron a metal", "idx": 0, "label": 1}},
    "allenai/sciq": {
        "": {
            "question": "What is ice?", "support": "Ice is frozen water.", "correct_answer": "water",
            "distractor1": "iron", "distractor2": "salt", "distractor3": "sand",
        }
    },
}  # fmt: skip


def tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte, and an end of text."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    inner = Tokenizer(models.BPE({piece: i for i, piece in enumerate(["</s>", *alphabet])}, []))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="</s>", pad_token="</s>", model_max_length=128)


def save_model(folder: Path, family: str, seed: int = 0) -> Path:
    """A random model of ``family`` with its tokenizer, as save_pretrained leaves it."""
    tiny_model(family, seed=seed, vocab_size=264, eos_token_id=0, bos_token_id=None).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


def save_task_data(folder: Path) -> dict[str, Path]:
    """The data sets of `TASKS` as parquet repositories with the usual splits; repository id to folder."""
    folders = {}
    for name, configurations in _ROWS.items():
        folders[name] = root = folder / name
        blocks = ["---", "configs:"]
        for configuration, row in configurations.items():
            blocks += [f"- config_name: {configuration or 'default'}", "  data_files:"]
            for split in ("train", "validation", "test"):
                path = Path(configuration) / f"{split}-00000-of-00001.parquet"
                (root / path).parent.mkdir(parents=True, exist_ok=True)
                pd.DataFrame([row] * ITEMS).to_parquet(root / path)
                blocks += [f"  - split: {split}", f"    path: {path.as_posix()}"]
        (root / "README.md").write_text("\n".join([*blocks, "---", ""]))
    return folders


def save_corpus(folder: Path, documents: int = 60) -> Path:
    """A text corpus with a training split only and its text in the column ``content``, as RefinedWeb has it."""
    folder.mkdir(parents=True)
    lines = [json.dumps({"content": f"Document {i} says that {i} and {i} is {2 * i}. " * 8}) for i in range(documents)]
    (folder / "train.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def make_hub(folder: Path) -> FakeHub:
    """A hub with tiny/mistral, tiny/llama, gated/llama, the task data, and tiny/corpus."""
    hub = FakeHub()
    hub.models["tiny/mistral"] = Repo(save_model(folder / "mistral", "Mistral"))
    hub.models["tiny/llama"] = Repo(save_model(folder / "llama", "Llama", seed=1))
    hub.models["gated/llama"] = Repo(folder / "llama", gated=True)
    hub.datasets.update({name: Repo(path) for name, path in save_task_data(folder / "data").items()})
    hub.datasets["tiny/corpus"] = Repo(save_corpus(folder / "corpus"))
    return hub
