"""Lines about a long evaluation: items, not requests; rarely; and only what is true."""

import pytest
from lm_eval.api.instance import Instance

import cats.progress
from cats.evaluation import evaluate
from cats.models import load_model
from cats.progress import SECONDS, ItemsDone
from tests.accuracy_world import ITEMS, build_world


def request(task: str, item: int, *arguments) -> Instance:
    return Instance("loglikelihood", {}, arguments, 0, (task, item, 1))


def test_an_item_is_done_with_the_last_of_its_requests() -> None:
    lines: list[str] = []
    requests = [request("a", i, f"question {i}", choice) for i in range(3) for choice in (" yes", " no")]
    requests += [request("b", 0, "same", " x"), request("b", 1, "same", " x"), request("b", 2, "text", {"until": []})]
    now = iter(range(0, 10_000, int(SECONDS)))
    hook = ItemsDone(requests, lines.append, lambda: next(now))
    for one in (requests[0], requests[5], requests[1], requests[6], requests[7], requests[8]):
        hook.add_partial("loglikelihood", one.args, (0.0, True))
    hook.add_partial("loglikelihood", ("unknown", ""), (0.0, True))
    assert lines == [
        f"items done: {counts}"
        for counts in ("a 0/3, b 0/3", "a 0/3, b 0/3", "a 1/3, b 0/3", "a 1/3, b 1/3", "a 1/3, b 2/3", "a 1/3, b 3/3")
    ]


def test_lines_come_rarely() -> None:
    lines: list[str] = []
    requests = [request("a", i, str(i)) for i in range(100)]
    now = iter(range(101))  # an item a second
    hook = ItemsDone(requests, lines.append, lambda: next(now))
    for one in requests:
        hook.add_partial("loglikelihood", one.args, None)
    assert lines == [f"items done: a {n}/100" for n in range(int(SECONDS), 100, int(SECONDS))]


@pytest.mark.parametrize("seconds", [0.0, 1e9])
def test_an_evaluation_shows_them_on_stderr(seconds: float, tmp_path, capsys, monkeypatch) -> None:
    world = build_world(tmp_path)
    model, tokenizer = load_model(str(world / "model"), "float32")
    monkeypatch.setattr(cats.progress, "SECONDS", seconds)
    evaluate(model, tokenizer, ["tiny_words"], include_path=world / "tasks", batch_size=5)
    out, err = capsys.readouterr()
    shown = [line for line in err.splitlines() if line.startswith("items done")]
    assert "items done" not in out
    assert (shown[-1] == f"items done: tiny_words {ITEMS}/{ITEMS}") if not seconds else shown == []
