"""Two processes (gloo, CPU) give what one gives: the same accuracies in e02, the same loss curve in e03."""

import os
import subprocess
import sys

import pytest
import torch

from experiments.framework.runner import run_experiment
from tests.accuracy_world import build_world, config_of, profile, table


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    root = build_world(tmp_path_factory.mktemp("world"))
    (root / "tiny.toml").write_text(profile(root))
    return root


@pytest.fixture(autouse=True)
def one_thread():
    """As the launched processes have."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def alone(world, experiment, **changes):
    """Run an experiment in this process; its tables by name."""
    output = world / f"{experiment}-alone"
    run_experiment(config_of(world, experiment, output, **changes))
    return tables_in(output)


def tables_in(output):
    return {path.stem: table(output, path.stem) for path in (output / "results").glob("*.csv")}


def launch(world, experiment, *options):
    """Run an experiment in two processes through accelerate's launcher; its tables by name."""
    output = world / experiment
    command = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_machines", "1"]
    command += ["--num_processes", "2", "--main_process_port", "0", "--mixed_precision", "no"]
    command += ["--dynamo_backend", "no", "-m", "experiments", "run", experiment, "--output", str(output)]
    command += ["--profile", str(world / "tiny.toml"), *options]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_DATASETS_OFFLINE": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("wrote ") == len(list((output / "results").rglob("*.csv*"))), "only rank 0 writes"
    return tables_in(output)


@pytest.mark.slow
def test_e02_is_identical_in_two_processes(world):
    one, two = (run(world, "e02")["e02_zero_shot"] for run in (alone, launch))
    assert len(one) == len(two) == 15
    # once more over the finished run: all processes must agree to measure again, or they wait for each other
    assert launch(world, "e02", "--force")["e02_zero_shot"] == two
    for a, b in zip(one, two, strict=True):
        if a["metric"] == "acc":
            assert a == b
        else:
            for number in ("value", "difference", "difference_stderr"):
                assert float(a.pop(number)) == pytest.approx(float(b.pop(number)), rel=1e-5, abs=1e-5)
            assert a == b


@pytest.mark.slow
def test_e03_has_the_same_loss_curve_in_two_processes(world):
    one, two = alone(world, "e03", seeds=[0]), launch(world, "e03", "--set", "e03.seeds=[0]")
    assert one.keys() == two.keys()
    for a, b in zip(one["e03_finetuning"], two["e03_finetuning"], strict=True):
        assert [a[key] for key in ("variant", "step", "learning_rate")] == [
            b[key] for key in ("variant", "step", "learning_rate")
        ]
        for loss in ("train_loss", "eval_loss"):
            if a[loss]:
                assert float(a[loss]) == pytest.approx(float(b[loss]), rel=1e-4)
    for a, b in zip(one["e03_sparsity"], two["e03_sparsity"], strict=True):
        assert float(a["sparsity_measured"]) == pytest.approx(float(b["sparsity_measured"]), abs=2e-3)
