"""The download path: real clients against a hub on loopback, with cut connections, refusals and damaged files.

One child interpreter whose HF_ENDPOINT is the loopback hub runs all scenarios, since importing the clients takes
seconds; each scenario has repositories of its own in the child's cache.
"""

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from .fake_hub import COMMIT, TOKEN, FakeHub, Repo
from .hub_content import ITEMS, TASKS, make_hub

ROOT = Path(__file__).parents[1]

CLIENT = """
import json, sys
from huggingface_hub import constants
constants.DOWNLOAD_CHUNK_SIZE = 4096  # downloads resume at a multiple of this; 10 MB unless set
from cats.models import load_model

def attempt(name, load=load_model):
    try:
        load(name)
    except Exception as error:
        return [type(error).__name__, str(error)]
    return "loaded"

for line in sys.stdin:
    scope = {"attempt": attempt, "load_model": load_model}
    exec(json.loads(line), scope)
    print("RESULT", json.dumps(scope["said"]), flush=True)
"""


def environment(url: str, home: Path) -> dict[str, str]:
    """Variables of a process that uses the hub at ``url`` and keeps its cache in ``home``."""
    keep = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "HUGGING_FACE"))}
    return {**keep, "HF_ENDPOINT": url, "HF_HOME": str(home), "HF_HUB_DISABLE_TELEMETRY": "1"}


class Client:
    """An interpreter that uses the hub at ``url``; `run` executes code there and returns its variable ``said``."""

    def __init__(self, url: str, home: Path) -> None:
        self.home = home
        self.errors = (home.parent / "client errors").open("w+")
        self.process = subprocess.Popen(
            [sys.executable, "-c", CLIENT], cwd=ROOT, env=environment(url, home), text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.errors,
        )  # fmt: skip

    def run(self, code: str):
        assert self.process.stdin and self.process.stdout
        self.process.stdin.write(json.dumps(code) + "\n")
        self.process.stdin.flush()
        for line in self.process.stdout:
            if line.startswith("RESULT"):
                return json.loads(line.removeprefix("RESULT"))
        self.errors.seek(0)
        raise AssertionError(self.errors.read()[-3000:])

    def close(self) -> None:
        assert self.process.stdin and self.process.stdout
        self.process.stdin.close()
        self.process.wait(30)
        self.process.stdout.close()
        self.errors.close()


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory):
    with make_hub(tmp_path_factory.mktemp("hub")) as running:
        yield running


@pytest.fixture(scope="module")
def client(hub: FakeHub, tmp_path_factory: pytest.TempPathFactory):
    running = Client(hub.url, tmp_path_factory.mktemp("client") / "home")
    yield running
    running.close()


def weights_of(hub: FakeHub, name: str) -> list[tuple[str | None, int]]:
    """(Range header, bytes) of every request for the weights of a model."""
    return [(r, n) for path, r, n in hub.downloads("model.safetensors") if path.startswith(f"/{name}/")]


def test_a_cut_download_goes_on_and_is_cached(hub: FakeHub, client: Client, tmp_path: Path) -> None:
    weights = hub.models["tiny/mistral"].folder / "model.safetensors"
    size = weights.stat().st_size
    hub.cut["model.safetensors"] = size // 3
    saved = tmp_path / "state.pt"
    found = client.run(f"""
import cats, torch
model, tokenizer = load_model("tiny/mistral", "float32")
torch.save(model.state_dict(), {str(saved)!r})
thresholds = cats.calibrate(model, [tokenizer("some text to calibrate on", return_tensors="pt")["input_ids"]])
said = [type(model).__name__, len(thresholds.gate)]
""")
    assert found == ["MistralForCausalLM", 3]
    kept = size // 3 // 4096 * 4096
    assert weights_of(hub, "tiny/mistral") == [(None, size // 3), (f"bytes={kept}-", size - kept)]
    state, original = torch.load(saved, weights_only=True), load_file(weights)
    assert original.keys() <= state.keys() and all(torch.equal(state[key], original[key]) for key in original)
    assert client.run('said = attempt("tiny/mistral")') == "loaded"
    assert len(weights_of(hub, "tiny/mistral")) == 2  # the second time it came from the cache


def test_the_identity_of_a_hub_model_names_its_revision(hub: FakeHub, client: Client) -> None:
    hub.models["tiny/known"] = hub.models["tiny/llama"]
    code = 'from cats.models import identity; said = attempt("tiny/known", identity)'
    kind, message = client.run(code)
    assert kind == "OSError" and "tiny/known is not in the download cache" in message
    assert client.run('said = attempt("tiny/known")') == "loaded"
    known = client.run('from cats.models import identity; said = identity("tiny/known")')
    weights = hub.models["tiny/known"].folder / "model.safetensors"
    assert known["weights"] == {"model.safetensors": hashlib.sha256(weights.read_bytes()).hexdigest()}
    assert known["revision"] == COMMIT and known["kind"] == "hub" and "tokenizer.json" in known["tokenizer"]


def test_ctrl_c_in_a_download_keeps_the_files_that_are_whole(hub: FakeHub, client: Client) -> None:
    hub.models["tiny/stalled"] = hub.models["tiny/mistral"]
    hub.stall["model.safetensors"] = 50_000
    process = subprocess.Popen(
        [sys.executable, "-m", "cats", "calibrate", "tiny/stalled"], cwd=ROOT, text=True, stderr=subprocess.PIPE,
        env=environment(hub.url, client.home), preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip
    while not weights_of(hub, "tiny/stalled"):
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130 and "interrupted" in err and "Traceback" not in err
    assert not list(client.home.rglob("*.incomplete"))
    assert client.run('said = attempt("tiny/stalled")') == "loaded"
    assert len(weights_of(hub, "tiny/stalled")) == 2
    assert len([path for path, *_ in hub.downloads("/config.json") if path.startswith("/tiny/stalled/")]) == 1


def test_the_eight_tasks_and_a_corpus_come_from_the_hub(hub: FakeHub, client: Client) -> None:
    found = client.run(f"""
import itertools
from cats.evaluation import evaluate, load_tasks
from experiments.data import blocks, texts
model, tokenizer = load_model("tiny/llama", "float32")
tasks = load_tasks({TASKS!r})
results = evaluate(model, tokenizer, tasks, limit=4)
data = {{"path": "tiny/corpus", "split": "train", "column": "content", "heldout_documents": 20}}
documents = {{p: sorted(texts(data, p, seed=0)) for p in ("train", "heldout")}}
said = {{
    "tasks": {{r.task: [r.items, round(1 / r.chance)] for r in results}},
    "all items": len(tasks["piqa"].eval_docs),
    "documents": documents,
    "blocks": list(blocks(texts(data, "train", 0), tokenizer, 5, 64).shape),
}}
""")
    choices = {"sciq": 4}
    assert found["tasks"] == {task: [4, choices.get(task, 2)] for task in TASKS}
    assert found["all items"] == ITEMS
    train, heldout = found["documents"]["train"], found["documents"]["heldout"]
    assert (len(train), len(heldout)) == (40, 20) and not set(train) & set(heldout)
    assert found["blocks"] == [5, 64]
    assert not any(path.endswith(".py") for _, path, *_ in hub.requests if "/api/" not in path and "GET" in _)


def test_a_gated_model_is_refused_with_one_sentence_and_served_with_a_token(hub: FakeHub, client: Client) -> None:
    kind, message = client.run('said = attempt("gated/llama")')
    assert kind == "OSError" and "gated/llama" in message and "gated" in message and "\n" not in message
    assert not weights_of(hub, "gated/llama")
    with_token = 'import os; os.environ["HF_TOKEN"] = "%s"; said = attempt("gated/llama"); del os.environ["HF_TOKEN"]'
    assert client.run(with_token % TOKEN) == "loaded"


def test_pickles_and_code_from_a_repository_are_refused(hub: FakeHub, client: Client, tmp_path: Path) -> None:
    pickled, coded = tmp_path / "pickled", tmp_path / "coded"
    for folder in (pickled, coded):
        shutil.copytree(hub.models["tiny/llama"].folder, folder)
    torch.save(load_file(pickled / "model.safetensors"), pickled / "pytorch_model.bin")
    (pickled / "model.safetensors").unlink()
    config = json.loads((coded / "config.json").read_text())
    config |= {"model_type": "strange", "auto_map": {"AutoConfig": "code.C", "AutoModelForCausalLM": "code.M"}}
    (coded / "config.json").write_text(json.dumps(config))
    (coded / "code.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    hub.models.update({"tiny/pickled": Repo(pickled), "tiny/coded": Repo(coded)})
    kind, message = client.run('said = attempt("tiny/pickled")')
    assert kind == "OSError" and "tiny/pickled" in message and "safetensors" in message and "\n" not in message
    assert not hub.downloads("pytorch_model.bin")
    kind, message = client.run('said = attempt("tiny/coded")')
    assert kind in ("OSError", "ValueError") and "tiny/coded" in message
    assert not hub.downloads("code.py") and not (tmp_path / "ran").exists()


def test_damaged_weights_are_named(hub: FakeHub, client: Client, tmp_path: Path) -> None:
    """Weights truncated in the cache, and weights whose tensors do not fit the configuration."""
    hub.models["tiny/damaged"] = Repo(hub.models["tiny/llama"].folder)
    assert client.run('said = attempt("tiny/damaged")') == "loaded"
    cached = next((client.home / "hub" / "models--tiny--damaged").rglob("model.safetensors")).resolve()
    os.truncate(cached, cached.stat().st_size // 2)
    kind, message = client.run('said = attempt("tiny/damaged")')
    assert kind == "OSError" and "tiny/damaged" in message and "damaged" in message and "\n" not in message
    for name, damage in {"config.json": "{", "tokenizer.json": '{"version"', "tokenizer_config.json": "["}.items():
        folder = shutil.copytree(hub.models["tiny/llama"].folder, tmp_path / f"damaged {name}")
        (folder / name).write_text(damage)
        kind, message = client.run(f"said = attempt({str(folder)!r})")
        assert kind == "OSError" and "has a damaged file" in message and "\n" not in message
    other = tmp_path / "other"
    shutil.copytree(hub.models["tiny/llama"].folder, other)
    tensors = load_file(other / "model.safetensors")
    removed = next(name for name in tensors if name.endswith("gate_proj.weight"))
    save_file({k: v for k, v in tensors.items() if k != removed}, other / "model.safetensors", {"format": "pt"})
    kind, message = client.run(f"said = attempt({str(other)!r})")
    assert kind == "OSError" and removed in message and "\n" not in message


CORPUS = """
from experiments.data import texts
said = attempt(None, lambda _: list(texts({"path": "tiny/corpus", "split": "train", **%r}, "train", seed=0)))
"""


def test_text_that_cannot_be_had_is_one_sentence(hub: FakeHub, client: Client) -> None:
    assert client.run(CORPUS % {"column": "content", "heldout_documents": 9}) == "loaded"
    kind, message = client.run(CORPUS % {"column": "body", "heldout_documents": 9})
    assert kind == "ValueError" and "'body'" in message and "it has content" in message
    hub.stop()
    try:
        kind, message = client.run(CORPUS % {"column": "content"})
    finally:
        hub.start()
    assert kind == "OSError" and message.startswith("the text of tiny/corpus") and "cannot be reached" in message


PLAN = """
import contextlib, io
from pathlib import Path
from experiments.e02_zero_shot import Options
from experiments.framework.config import Config
from experiments.framework.plan import print_plan
data = {"source": "hub", "path": "tiny/corpus", "split": "train"}
options = Options(tasks=("arc_easy", "boolq"), levels=(0.5,), length=64, calibration_blocks=4)
configs = [Config("e02", "toy", Path("nowhere/run"), models=%r, data=data, options=options)]
out, err = io.StringIO(), io.StringIO()
with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
    status = print_plan(configs)
said = [status, out.getvalue(), err.getvalue()]
"""


def test_the_plan_checks_access_and_downloads_nothing(hub: FakeHub, client: Client) -> None:
    fetched = len(hub.downloads())
    status, out, err = client.run(PLAN % ["tiny/llama", "shape:mistral-7b"])
    assert status == 0 and not err
    lines = {line.split()[0]: line for line in out.splitlines() if line}
    parameters = sum(t.numel() for t in load_file(hub.models["tiny/llama"].folder / "model.safetensors").values())
    assert f"{parameters / 1e6:.3g} M" in lines["tiny/llama"] and lines["tiny/llama"].endswith("yes")
    assert "7.24 B" in lines["shape:mistral-7b"]  # as the model's card says
    assert "read as it is used" in lines["tiny/corpus"]
    assert {"allenai/ai2_arc", "aps/super_glue", "e02", "downloads"} <= set(lines)
    local = str(hub.datasets["tiny/corpus"].folder)
    for path in ("json", local):  # not of the hub: nothing to ask there
        status, out, err = client.run((PLAN % ["tiny/llama"]).replace("tiny/corpus", path))
        assert status == 0 and not err and path not in out
    status, out, err = client.run(PLAN % ["gated/llama", "tiny/llama", "tiny/misspelt"])
    assert status == 1 and [line.split(":")[0] for line in err.splitlines()] == ["gated/llama", "tiny/misspelt"]
    assert "is gated: ask for access at https://huggingface.co/gated/llama" in err and "is not on the hub" in err
    assert next(line for line in out.splitlines() if line.startswith("gated")).endswith("NO")
    assert len(hub.downloads()) == fetched


def test_the_plan_without_a_network_is_one_sentence(hub: FakeHub, client: Client) -> None:
    hub.stop()
    try:
        status, out, err = client.run(PLAN % ["tiny/llama"])
    finally:
        hub.start()
    assert status == 1 and err.count("\n") == 1 and err.startswith("the hub cannot be reached")
    assert "e02" in out and "on one H200; finished units are kept" in out  # the total, known if the model is cached


def test_without_a_network_cached_models_load_and_others_are_one_sentence(hub: FakeHub, client: Client) -> None:
    hub.models["tiny/cached"] = hub.models["tiny/llama"]
    assert client.run('said = attempt("tiny/cached")') == "loaded"
    hub.stop()
    try:
        cached, (kind, message) = client.run('said = [attempt("tiny/cached"), attempt("tiny/uncached")]')
    finally:
        hub.start()
    assert cached == "loaded"
    assert (
        kind == "OSError"
        and "tiny/uncached" in message
        and "connect" in message
        and "cached" in message
        and "\n" not in message
    )
