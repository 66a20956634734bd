"""A model object as lm-eval's language model, with the scores of `cats.request_scores`."""

import logging
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from cats.extras import missing
from cats.perplexity import LOGITS_BYTES, vocabulary_size
from cats.progress import ItemsDone
from cats.request_scores import Score, batches_of, inputs_of, output_matrix, score_batch

try:
    import accelerate
    from accelerate.utils import gather
    from lm_eval.models.huggingface import HFLM
except ImportError as error:
    raise missing(__name__, "experiments", error) from error

LOG = logging.getLogger(__name__)
AT_ONCE = 4096
"""Texts that are given to the tokenizer at once."""


class LanguageModel(HFLM):
    """HFLM around a model object that also splits items among accelerate's processes (HFLM does so only for hub ids).

    Encodings are remembered in ``cache``: fine-tuning asks for the same items at every evaluated step.
    """

    def __init__(self, model: nn.Module, tokenizer: Any, batch_size: int, cache: dict[str, list[int]]) -> None:
        super().__init__(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)
        self.state = accelerate.PartialState()
        self.cache = cache

    @property
    def rank(self) -> int:
        return self.state.process_index

    @property
    def world_size(self) -> int:
        return self.state.num_processes

    def all_gather(self, tensor: Tensor) -> Tensor:
        return gather(tensor.reshape(1)).reshape(-1)

    def barrier(self) -> None:
        self.state.wait_for_everyone()

    def loglikelihood(self, requests: Any, disable_tqdm: bool = False) -> Any:
        self._show_progress(requests)
        self._encode_ahead([request.args for request in requests])
        return super().loglikelihood(requests, disable_tqdm)

    def generate_until(self, requests: Any, disable_tqdm: bool = False) -> Any:
        self._show_progress(requests)
        return super().generate_until(requests, disable_tqdm)

    def _show_progress(self, requests: Any) -> None:
        if self.rank == 0:
            self.set_cache_hook(ItemsDone(requests))

    def _loglikelihood_tokens(self, requests: Any, disable_tqdm: bool = False, override_bs: int | None = None) -> Any:
        head = output_matrix(self.model)
        if head is None:
            return super()._loglikelihood_tokens(requests, disable_tqdm, override_bs)
        longer = sum(len(context) + len(end) > self.max_length + 1 for _, context, end in requests)
        if longer:
            LOG.warning(
                f"{longer} of {len(requests)} requests are longer than the model's {self.max_length} positions: "
                "their beginning is cut off"
            )
        scores: list[Score] = [(0.0, False)] * len(requests)
        most_scored = max(1, LOGITS_BYTES // (4 * vocabulary_size(self.model)))
        for batch in batches_of(inputs_of(requests, self.max_length), self.batch_size, most_scored):
            numbers = [number for one in batch for number, _ in one.requests]
            for number, score in zip(numbers, score_batch(self._model_call, head, batch, self.device), strict=True):
                scores[number] = score
                if requests[number][0] is not None:
                    self.cache_hook.add_partial("loglikelihood", requests[number][0], score)
        return scores

    def _encode_ahead(self, pairs: Sequence[tuple[str, str]]) -> None:
        """Encode what lm-eval will ask for one by one, in lists, which fast tokenizers spread over the cores."""
        wanted = {text for one, end in pairs if one for text in (one.rstrip(), one + end)} - self.cache.keys()
        first = self.tokenizer.decode(self.prefix_token_id)  # `tok_encode` looks for it at the beginning of a text
        texts = sorted(text for text in wanted if not text.startswith(first))
        options = {} if self.add_bos_token is None else {"add_special_tokens": self.add_bos_token}
        for start in range(0, len(texts), AT_ONCE):
            some = texts[start : start + AT_ONCE]
            self.cache.update(zip(some, self.tokenizer(some, **options)["input_ids"], strict=True))

    def tok_encode(self, string: str, *args: Any, **kwargs: Any) -> list[int]:
        if args or kwargs:
            return super().tok_encode(string, *args, **kwargs)
        if string not in self.cache:
            self.cache[string] = super().tok_encode(string)
        return self.cache[string]
