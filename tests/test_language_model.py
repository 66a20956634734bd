"""What lm-eval asks a model for: texts encoded ahead and kept by tokenizer, and tokenizers that are refused."""

import copy
import gc

import pytest
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM

from cats.evaluation import (
    check_tokenizer,
    evaluate,
    load_tasks,
)
from cats.language_model import LanguageModel
from tests.accuracy_world import loaded as loaded
from tests.accuracy_world import world as world


def test_encodings_go_with_their_tokenizer(world, loaded):
    model, tokenizer = loaded
    tasks = load_tasks(["tiny_yes"], world / "tasks")
    evaluate(model, tokenizer, tasks, limit=2)
    assert tasks.encodings[tokenizer]
    other = copy.deepcopy(tokenizer)
    evaluate(model, other, tasks, limit=2)
    assert len(tasks.encodings) == 2
    del other
    gc.collect()
    assert list(tasks.encodings) == [tokenizer], "a tokenizer with the same id would find another one's encodings"


def test_texts_encoded_ahead_are_all_that_lm_eval_asks_for(loaded, monkeypatch):
    """With the ids that it gets one by one; a text that begins with the model's first token is left to it."""
    model, tokenizer = loaded
    first = tokenizer.decode(LanguageModel(model, tokenizer, 2, {}).prefix_token_id)
    assert first
    pairs = [("Is it so?", " yes"), ("Is it so?", " no"), ("with spaces  ", "at the end"), ("", "alone"), (first, " a")]
    requests = [Instance("loglikelihood", {}, pair, i) for i, pair in enumerate(pairs)]
    language_model = LanguageModel(model, tokenizer, 2, {})
    language_model.loglikelihood(requests, disable_tqdm=True)
    assert {"Is it so?", "Is it so? no", "with spaces", "with spaces  at the end"} <= language_model.cache.keys()
    one_by_one = HFLM(pretrained=model, tokenizer=tokenizer)
    assert language_model.cache == {text: one_by_one.tok_encode(text) for text in language_model.cache}
    asked, original = [], HFLM.tok_encode

    def recorded(self, text, *arguments, **options):
        asked.append(text)
        return original(self, text, *arguments, **options)

    monkeypatch.setattr(HFLM, "tok_encode", recorded)
    LanguageModel(model, tokenizer, 2, {}).loglikelihood(requests, disable_tqdm=True)
    assert set(asked) == {"alone", first, first + " a"}


def test_a_tokenizer_without_bos_and_eos_is_refused() -> None:
    class Tokenizer:
        bos_token_id: int | None = None
        eos_token_id: int | None = None

    tokenizer = Tokenizer()
    with pytest.raises(ValueError, match="the tokenizer of some/model has neither a bos nor an eos token"):
        check_tokenizer(tokenizer, "some/model")
    tokenizer.eos_token_id = 0
    check_tokenizer(tokenizer, "some/model")
    tokenizer.bos_token_id, tokenizer.eos_token_id = 1, None
    check_tokenizer(tokenizer, "some/model")
