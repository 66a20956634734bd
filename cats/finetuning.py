"""Fine-tuning of a model with LoRA adapters (`cats.lora`), patched or not, through transformers' Trainer.

Thresholds are fixed before training, as in the paper; the gradient is that of the masked function (equation 4), because
training takes the dense masked path. Every run with the same settings starts from the same adapters, sees the same data
in the same order, and goes on from its last checkpoint after an interruption with the same numbers. Under `accelerate
launch` the same global batch is split among the processes.
"""

import contextlib
import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import Dataset
from transformers import Trainer, TrainerCallback, TrainerState, TrainingArguments
from transformers.trainer_callback import PrinterCallback

from cats.compiled_layers import compiled_layers
from cats.extras import missing
from cats.files import write_text_atomically
from cats.levels import calibrate_in_force
from cats.observe import Batches
from cats.patching import swap_thresholds
from cats.random_states import random_states_kept
from cats.text_config import no_cache
from cats.thresholds import Thresholds

try:
    import accelerate
    from peft import PeftModel, load_peft_weights, set_peft_model_state_dict
except ImportError as error:
    raise missing(__name__, "experiments", error) from error


@dataclass(frozen=True)
class TrainSettings:
    """Hyper-parameters of one run; ``batch_size`` is global, in sequences a step.

    ``micro_batch_size`` (None: the whole share of a process) limits what goes through the model at once. The rate is
    constant after ``warmup_steps``, so that the state at any step does not depend on how long the run goes on.
    ``compiled``: decoder layers and loss as compiled code (`cats.compiled_layers`); None: on a GPU, where a run is long
    enough for it to pay.
    """

    steps: int
    batch_size: int
    learning_rate: float
    weight_decay: float = 0.01
    warmup_steps: int = 10
    micro_batch_size: int | None = None
    seed: int = 0
    compiled: bool | None = None


COMPILED_FROM = 100
"""Passes of a run on a GPU from which on it is compiled: each saves about 80 ms, compiling takes 4 to 20 s."""


def recalibrate(model: nn.Module, batches: Batches, sparsity: float) -> Thresholds:
    """Move the thresholds of a patched model, perhaps inside peft, back onto the target: calibrate again and swap them.

    The sites that have thresholds get new ones; levels per layer and the kernel stay as they were.

    Fine-tuning shifts the activations under thresholds that stay (the paper's CATS-50 Mistral-7B drifted to 41 %).
    To be called after training, or during it from ``measure`` of `finetune`.

    Returns:
        The new thresholds, now in force.

    Raises:
        ValueError: as `cats.levels.calibrate_in_force`.
    """
    thresholds = calibrate_in_force(model, batches, sparsity)
    swap_thresholds(model, thresholds)
    return thresholds


class DivergedError(ValueError):
    """Training has left the finite numbers."""


def finetune(
    model: PeftModel,
    data: Dataset | Sequence[dict[str, Any]],
    settings: TrainSettings,
    workdir: Path,
    steps: Sequence[int] = (),
    measure: Callable[[], dict[str, Any]] | None = None,
    collator: Callable[[list[dict[str, Any]]], dict[str, Any]] | None = None,
) -> list[dict[str, Any]]:
    """Train the adapters of ``model`` in place; the shuffled ``data`` is gone through again when it is too short.

    Args:
        model: from `cats.lora.add_lora`.
        data: items with ``input_ids`` and ``labels``.
        settings: hyper-parameters.
        workdir: checkpoints are written here at each of ``steps``; one found here, of a run with the same settings,
            steps and number of items, is resumed from.
        steps: after which steps to measure and save; the last step always is among them.
        measure: called then, with the model as it is; returns what JSON can hold.
        collator: makes a batch of items; the default stacks tensors of equal length.

    Returns:
        One mapping for each of ``steps`` in order: ``step``, ``train_loss`` (mean over the steps since the one before)
        and what ``measure`` returned, whether measured now or before an interruption.

    cuDNN's attention is not used meanwhile: with a mask of padding its gradients are NaN on an H100 where a batch is 64
    tokens longer than a multiple of 128 (https://github.com/pytorch/pytorch/issues/196678).

    Raises:
        ValueError: no data, a step outside the run, a batch that the processes cannot share evenly, or a ``workdir``
            with checkpoints of another run.
        DivergedError: adapters that are not finite any more, at one of ``steps``; nothing is saved then.
    """
    wanted = sorted({*steps, settings.steps})
    if settings.steps < 1 or wanted[0] < 1 or wanted[-1] > settings.steps:
        raise ValueError(f"steps to measure at must lie in 1 to {settings.steps}, not {list(steps)}")
    if not len(data):  # type: ignore[arg-type]
        raise ValueError("there is no training data: give at least one item")
    arguments, checkpoint = _arguments(model, settings, workdir), _last_checkpoint(workdir)
    run = {**asdict(settings), "measured steps": wanted, "items": len(data)}  # type: ignore[arg-type]
    _claim(workdir, run, resuming=checkpoint is not None)
    if checkpoint is not None and checkpoint.name == f"checkpoint-{settings.steps}":
        # given a checkpoint of its last step, Trainer would take one step more
        set_peft_model_state_dict(
            model, load_peft_weights(str(checkpoint), device=str(next(model.parameters()).device))
        )
        model.eval()
        return _records(TrainerState.load_from_json(str(checkpoint / "trainer_state.json")))
    try:
        with random_states_kept(), no_cache(model), _no_cudnn_attention(), _compiled(model, settings, arguments):
            recorder = _Recorder(wanted, measure)
            trainer = Trainer(model, arguments, collator, data, callbacks=[recorder])
            trainer.remove_callback(PrinterCallback)
            trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    finally:
        model.eval()
    return _records(trainer.state)


def _records(state: TrainerState) -> list[dict[str, Any]]:
    entries: list[Any] = list(state.log_history)
    return [entry[_KEY] for entry in entries if _KEY in entry]


_KEY = "cats"


class _Recorder(TrainerCallback):
    """Logs, measures and saves at the wanted steps; records live in Trainer's own history, so in its checkpoints."""

    def __init__(self, steps: Sequence[int], measure: Callable[[], dict[str, Any]] | None) -> None:
        self.steps, self.measure = steps, measure

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step in self.steps:
            if not all(p.isfinite().all() for p in kwargs["model"].parameters() if p.requires_grad):
                rate = f"{args.learning_rate:g}"
                raise DivergedError(f"training at the rate {rate} has diverged: NaN by step {state.global_step}")
            control.should_log = control.should_save = True

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        if logs and "loss" in logs:  # not the summary at the end of training
            with torch.compiler.set_stance("force_eager"):  # its shapes and mode are others
                measured = self.measure() if self.measure else {}
            record = {"step": state.global_step, "train_loss": logs["loss"], **measured}
            state.log_history.append({"step": state.global_step, _KEY: record})


def _arguments(model: PeftModel, settings: TrainSettings, workdir: Path) -> TrainingArguments:
    processes = accelerate.PartialState().num_processes
    share, rest = divmod(settings.batch_size, processes)
    micro = min(settings.micro_batch_size or share, share)
    if rest or share < 1 or share % micro:
        raise ValueError(
            f"a batch of {settings.batch_size} cannot be split evenly over {processes} processes "
            f"in pieces of {settings.micro_batch_size or share}"
        )
    parameter = next(model.parameters())
    return TrainingArguments(
        output_dir=str(workdir),
        max_steps=settings.steps,
        per_device_train_batch_size=micro,
        gradient_accumulation_steps=share // micro,
        learning_rate=settings.learning_rate,
        weight_decay=settings.weight_decay,
        lr_scheduler_type="constant_with_warmup",
        warmup_steps=settings.warmup_steps,
        optim="adamw_torch",
        seed=settings.seed,
        data_seed=settings.seed,
        bf16=parameter.dtype == torch.bfloat16,
        use_cpu=parameter.device.type == "cpu",
        logging_strategy="no",
        save_strategy="no",  # _Recorder saves
        save_total_limit=2,
        report_to="none",
        disable_tqdm=True,
        remove_unused_columns=False,
        dataloader_pin_memory=parameter.device.type != "cpu",
        ddp_find_unused_parameters=False,
    )


def _claim(workdir: Path, run: dict[str, Any], resuming: bool) -> None:
    """Note in ``workdir`` what its run is; raise ValueError when it is resumed as another one."""
    path = workdir / "run.json"
    if resuming:
        found = json.loads(path.read_text()) if path.exists() else {}
        different = [key for key in run if found.get(key) != run[key]]
        if different:
            raise ValueError(
                f"{workdir} has checkpoints of a run with other {', '.join(different)}: empty it or name another folder"
            )
    elif accelerate.PartialState().is_main_process:
        write_text_atomically(path, json.dumps(run) + "\n")


def _last_checkpoint(workdir: Path) -> Path | None:
    """The last complete checkpoint; Trainer writes its state last, so one without it was cut short and goes away."""
    checkpoints = sorted(workdir.glob("checkpoint-*"), key=lambda path: int(path.name.rpartition("-")[2]))
    while checkpoints and not _is_complete(checkpoints[-1]):
        shutil.rmtree(checkpoints.pop(), ignore_errors=True)
    return checkpoints[-1] if checkpoints else None


def _is_complete(checkpoint: Path) -> bool:
    try:
        json.loads((checkpoint / "trainer_state.json").read_text())
    except (OSError, ValueError):
        return False
    return True


def _compiled(
    model: PeftModel, settings: TrainSettings, arguments: TrainingArguments
) -> contextlib.AbstractContextManager[None]:
    compiled = settings.compiled
    if compiled is None:
        passes = settings.steps * arguments.gradient_accumulation_steps
        compiled = model.device.type == "cuda" and passes >= COMPILED_FROM
    base: Any = model.get_base_model()
    return compiled_layers(base) if compiled else contextlib.nullcontext()


@contextlib.contextmanager
def _no_cudnn_attention() -> Iterator[None]:
    enabled = torch.backends.cuda.cudnn_sdp_enabled()
    torch.backends.cuda.enable_cudnn_sdp(False)
    try:
        yield
    finally:
        torch.backends.cuda.enable_cudnn_sdp(enabled)
