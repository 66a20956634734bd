"""Tasks whose answers are generated: greedy decoding by hand, in padded batches, and what is refused."""

import json
import re

import numpy as np
import pytest
import torch

import cats
from cats.evaluation import load_tasks
from cats.generated_answers import evaluate_answers, load_answer_tasks
from tests.accuracy_world import loaded as loaded
from tests.accuracy_world import world as world

ANSWERS = """task: first_word
dataset_path: json
dataset_kwargs:
  data_files:
    test: {folder}/first_word.jsonl
output_type: generate_until
test_split: test
doc_to_text: question
doc_to_target: answer
generation_kwargs:
  until: ["zeta"]
  max_gen_toks: 6
metric_list:
  - metric: exact_match
    aggregation: mean
    higher_is_better: true
filter_list:
  - name: first
    filter: [{{function: regex, regex_pattern: "([a-z]+)"}}, {{function: take_first}}]
  - name: last
    filter: [{{function: regex, group_select: -1, regex_pattern: "([a-z]+)"}}, {{function: take_first}}]
"""


def greedy(model, ids, count):
    """Continue ``ids`` token by token without a cache, up to an end token."""
    new = []
    for _ in range(count):
        token = int(model(torch.tensor([ids + new])).logits[0, -1].argmax())
        if token == model.config.eos_token_id:
            break
        new.append(token)
    return new


def test_generated_answers_are_those_of_greedy_decoding_by_hand(world, loaded, tmp_path):
    """Items of several lengths in padded batches: every second one's answer is the word that comes first."""
    model, tokenizer = loaded
    model.generation_config.update(do_sample=True, temperature=5.0, repetition_penalty=3.0)  # put aside
    cats.apply(model, cats.calibrate(model, [torch.randint(1, len(tokenizer), (4, 32))], 0.5))
    questions = ["alpha beta", "tau rho pi", "mu nu xi omicron pi", "kappa", "eta theta", "iota lambda mu"]
    rows, expected = [], {"first": [], "last": []}
    for index, question in enumerate(questions):
        text = tokenizer.decode(greedy(model, tokenizer.encode(question), 6), skip_special_tokens=True)
        words = re.findall("[a-z]+", text.split("zeta")[0]) or ["[invalid]"]
        answer = words[0] if index % 2 else "nothing"
        rows.append(json.dumps({"question": question, "answer": answer}))
        expected["first"].append(float(words[0] == answer))
        expected["last"].append(float(words[-1] == answer))
    (tmp_path / "first_word.jsonl").write_text("\n".join(rows))
    (tmp_path / "first_word.yaml").write_text(ANSWERS.format(folder=tmp_path))
    tasks = load_answer_tasks(["first_word"], tmp_path)
    settings = model.generation_config
    results = evaluate_answers(model, tokenizer, tasks, batch_size=4)
    assert {r.reading: list(r.correct) for r in results} == expected
    assert sum(expected["first"]) >= 2
    assert [r.accuracy for r in results] == [np.mean(flags) for flags in expected.values()]
    assert model.generation_config is settings and settings.temperature == 5.0
    assert [r.items for r in evaluate_answers(model, tokenizer, tasks, limit=3)] == [3, 3]


def test_generated_answers_are_refused_where_they_make_no_sense(world, loaded):
    model, tokenizer = loaded
    with pytest.raises(ValueError, match="no metric exact_match: only generated-answer tasks"):
        load_answer_tasks(["tiny_words"], world / "tasks")
    with pytest.raises(ValueError, match="tiny_answer has no metric acc: only multiple-choice tasks"):
        load_tasks(["tiny_answer"], world / "tasks")
    tasks = load_answer_tasks(["tiny_answer"], world / "tasks")
    model.config.max_position_embeddings = 40
    with pytest.raises(ValueError, match=r"task tiny_answer needs [0-9]+ positions .* the model has 40"):
        evaluate_answers(model, tokenizer, tasks)
