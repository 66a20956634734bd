"""A world in which the accuracy experiments take seconds: a tiny model with a tokenizer, text, and YAML tasks."""

import csv
import gzip
import json
import random
from pathlib import Path

import pytest
from lm_eval.tasks import TaskManager

from cats import task_index
from cats.models import load_model
from experiments.framework.profiles import load_profile, make_config
from experiments.pocket.tokenizer import as_pretrained, train_tokenizer
from tests.conftest import tiny_model

WORDS = [
    "alpha",
    "beta",
    "gamma",
    "delta",
    "epsilon",
    "zeta",
    "eta",
    "theta",
    "iota",
    "kappa",
    "lambda",
    "mu",
    "nu",
    "xi",
    "omicron",
    "pi",
    "rho",
    "sigma",
    "tau",
]
ITEMS = 24


def sentences(seed: int, count: int) -> list[str]:
    """Sentences of a few random words."""
    rng = random.Random(seed)
    return [" ".join(rng.choices(WORDS, k=rng.randint(4, 12))) for _ in range(count)]


def write_task(folder: Path, name: str, choices: int, metric: str = "acc") -> None:
    """A multiple-choice task with training and test items as JSON lines; the gold position varies."""
    rng = random.Random(name)
    for split in ("train", "test"):
        rows = []
        for text in sentences(rng.randint(0, 10**6), ITEMS):
            options = [f" {word}" for word in rng.sample(WORDS, choices)] if choices > 2 else ["no", "yes"]
            rows.append({"text": text, "options": options, "gold": rng.randrange(choices)})
        (folder / f"{name}.{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    delimiter = "" if choices > 2 else " "
    (folder / f"{name}.yaml").write_text(
        f"""task: {name}
dataset_path: json
dataset_kwargs:
  data_files:
    train: {folder}/{name}.train.jsonl
    test: {folder}/{name}.test.jsonl
output_type: multiple_choice
training_split: train
test_split: test
doc_to_text: "{{{{text}}}}"
target_delimiter: "{delimiter}"
doc_to_target: gold
doc_to_choice: options
metric_list:
  - metric: {metric}
    aggregation: mean
    higher_is_better: true
"""
    )


def write_answer_task(folder: Path, name: str) -> None:
    """A task with generated answers in the manner of lm-eval's gsm8k: examples in the prompt, two ways to read."""
    rng = random.Random(name)
    for split in ("train", "test"):
        rows = [
            {"question": text, "answer": f"alpha #### {rng.randint(2, 9)}"} for text in sentences(len(split), ITEMS)
        ]
        (folder / f"{name}.{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / f"{name}.yaml").write_text(
        f"""task: {name}
dataset_path: json
dataset_kwargs:
  data_files:
    train: {folder}/{name}.train.jsonl
    test: {folder}/{name}.test.jsonl
output_type: generate_until
training_split: train
fewshot_split: train
test_split: test
num_fewshot: 1
doc_to_text: "Q: {{{{question}}}}\\nA:"
doc_to_target: "{{{{answer}}}}"
generation_kwargs:
  until: ["Q:"]
  do_sample: false
  max_gen_toks: 8
metric_list:
  - metric: exact_match
    aggregation: mean
    higher_is_better: true
    regexes_to_ignore: ["(?s).*#### "]
filter_list:
  - name: strict-match
    filter:
      - function: regex
        regex_pattern: "#### ([0-9]+)"
      - function: take_first
  - name: flexible-extract
    filter:
      - function: regex
        group_select: -1
        regex_pattern: "([0-9]+)"
      - function: take_first
"""
    )


def build_world(root: Path) -> Path:
    """``root`` with model/, tasks/ and text.jsonl."""
    text = sentences(0, 600)
    tokenizer = as_pretrained(train_tokenizer(text, 300), 64)
    model = tiny_model("Llama", vocab_size=len(tokenizer), max_position_embeddings=128, num_hidden_layers=2)
    model.config.bos_token_id = model.config.eos_token_id = model.config.pad_token_id = 0
    model.save_pretrained(root / "model")
    tokenizer.save_pretrained(root / "model")
    (root / "text.jsonl").write_text("".join(json.dumps({"text": line}) + "\n" for line in text))
    (root / "tasks").mkdir()
    write_task(root / "tasks", "tiny_words", 4)
    write_task(root / "tasks", "tiny_yes", 2)
    write_task(root / "tasks", "tiny_without_acc", 4, "acc_norm")
    write_answer_task(root / "tasks", "tiny_answer")
    return root


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """The folder of a world, which a module shares."""
    return build_world(tmp_path_factory.mktemp("world"))


@pytest.fixture
def loaded(world):
    """Its model and tokenizer."""
    return load_model(str(world / "model"), "float32")


PROFILE = """models = ["{world}/model"]
device = "cpu"
dtype = "float32"
seed = 0
[data]
source = "hub"
path = "json"
data_files = "{world}/text.jsonl"
split = "train"
heldout_documents = 100
"""
EXPERIMENTS = {
    "e01": """blocks = 4
length = 32
batch_size = 4
targets = [0.5, 0.9]
bins = 10
largest = 1.0
""",
    "e02": """tasks = ["tiny_words", "tiny_yes"]
levels = [0.5, 0.9]
limit = 20
{tasks}{text}""",
    "e03": """tasks = ["tiny_words"]
levels = [0.5]
limit = 10
{tasks}{text}{training}
sweep_steps = 2
sweep_blocks = 4
learning_rates = [1e-3, 1e-2]
sweep_level = 0.7
seeds = [0, 1]
steps = [2, 5]
""",
    "e04": """tasks = ["tiny_yes"]
levels = [0.5]
seeds = [0]
epochs = 2
train_items = 20
calibration_items = 16
sweep_items = 12
sweep_level = 0.7
learning_rates = [1e-4, 1e-2]
save_steps = 4
{tasks}{training}""",
    "e07": """tasks = ["tiny_words"]
levels = [0.5]
limit = 10
{tasks}{text}{training}
steps = 2
learning_rate = 1e-3
""",
}
SHARED = {
    "tasks": """include_path = "{world}/tasks"
batch_size = 8
length = 32
""",
    "text": """calibration_blocks = 8
heldout_blocks = 4
""",
    "training": """train_batch_size = 4
weight_decay = 0.01
warmup_steps = 1
""",
}
"""Options that several experiments have."""


def profile(world: Path) -> str:
    """A profile in TOML that runs e01, e02, e03, e04 and e07 in that world."""
    tables = [f"[{name}]\n{options.format(**SHARED)}" for name, options in EXPERIMENTS.items()]
    return "\n".join([PROFILE, *tables]).format(world=world)


def leave_out_own_tasks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have no task of lm-eval's own: the index of all, which an unknown name asks for, takes ten seconds to read.

    tests/test_task_lookup.py reads it.
    """
    monkeypatch.setattr(task_index, "all_own_tasks", lambda: TaskManager(include_defaults=False))


def config_of(world, experiment, output, **changes):
    """The experiment in the world, whose profile is tiny.toml there, with some options changed."""
    settings = load_profile(str(world / "tiny.toml"))
    settings[experiment] |= changes
    return make_config(experiment, "tiny", settings, output)


def table(output, name):
    """Rows of a table of a run directory."""
    with (output / "results" / f"{name}.csv").open() as file:
        return list(csv.DictReader(file))


def samples(output, name):
    """Rows of a table of samples."""
    with gzip.open(output / "results" / "samples" / f"{name}.csv.gz", "rt") as file:
        return list(csv.DictReader(file))
