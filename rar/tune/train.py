"""Training itself: `transformers.Trainer` over peft LoRA, in each worker of a Ray Train `TorchTrainer`.

What makes a resumed training the one that was not stopped: the order of lists is a function of seed and step (draw), the
trainer takes up optimizer, schedule and random states from the last whole checkpoint, and nothing else is random. Two workers
are one of twice the batch, as every loss is a mean over lists and each worker takes the next part of a step's lists.

A checkpoint counts once its trainer_state.json can be read, which is written last; a partial one is thrown away. A loss or a
gradient that is no number ends the training before it reaches a weight.
"""

from __future__ import annotations

import copy
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import torch.distributed as dist
from transformers import EarlyStoppingCallback, PrinterCallback, Trainer, TrainerCallback, TrainingArguments, set_seed

from rar import config
from rar.config import Config
from rar.ranker.mllm import Mllm
from rar.ranker.rank import MllmRanker
from rar.schema import UserError, first_line
from rar.tune import draw, losses, recipe, spoken
from rar.tune.draw import Lesson
from rar.tune.features import Features
from rar.tune.lessons import Course, Teacher
from rar.tune.pictures import Pictures

WARMUP = 0.05  # share of the steps until the learning rate is reached
PATIENCE = 5  # checkpoints without a better one after which training stops
VAL = 256  # pictures that a checkpoint is judged by, at most
METRIC = "rank_accuracy"
STATE = "trainer_state.json"
STEP = "step"


@dataclass(frozen=True)
class Job:
    """What a worker is told. Picklable. folder: `train/` of the run; rows: the data's parquet file."""

    settings: str  # Config as JSON
    model_path: str
    rows: str
    folder: str
    adapter: str
    threads: int | None


def work(job: Job) -> dict[str, Any]:
    """One worker's whole part. Returns what is told of the training. Raises UserError for what the user must mend."""
    if job.threads is not None:
        torch.set_num_threads(job.threads)
    settings = Config.model_validate_json(job.settings)
    ranker = MllmRanker(recipe.bare(settings), job.model_path)
    set_seed(settings.run.seed)
    frozen = settings.tune.weights == "lora" and not settings.tune.vision and Features.fit(ranker.mllm)
    ranker.mllm.model = trainable(ranker, settings.tune)
    ranker.mllm.features = Features(ranker.mllm) if frozen else None
    trained = sum(weight.numel() for weight in ranker.mllm.model.parameters() if weight.requires_grad)
    rows = pq.read_table(job.rows)
    trainer = _trainer(settings, ranker, rows, Path(job.folder))
    last = last_checkpoint(Path(job.folder))
    trainer.train(resume_from_checkpoint=str(last) if last else None)
    if trainer.is_world_process_zero():
        write_weights(ranker, settings.tune, Path(job.adapter))
    state = trainer.state
    return {"steps": state.global_step, "best_step": state.best_global_step, "best": state.best_metric, "trained": trained}


def trainable(ranker: MllmRanker, tune: config.Tune) -> Any:
    """The model with what is to be trained marked: a LoRA adapter on linear layers (of the language model, of what sees, or of
    both), or weights.

    Raises UserError where peft is missing or the model's language part cannot be found.
    """
    model = ranker.mllm.model
    decoder = model.get_decoder()
    inside = {id(module) for module in decoder.modules()}
    head = model.get_output_embeddings()
    if tune.weights == "full":
        speaking = [*decoder.parameters(), *head.parameters()]
        frozen = {False: vision_weights(model), True: [], "only": speaking}[tune.vision]
        still = {id(weight) for weight in frozen}
        for weight in model.parameters():
            weight.requires_grad_(id(weight) not in still)
        return model
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError:
        raise UserError("rar tune needs the package peft: pip install 'rar[adapters]'") from None
    wanted = [
        name
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear)
        and module is not head
        and (tune.vision is True or (id(module) in inside) is (tune.vision is False))
    ]
    lora = LoraConfig(r=tune.lora_rank, lora_alpha=tune.lora_alpha, target_modules=compact(wanted))
    return get_peft_model(model, lora)


def compact(names: list[str]) -> str:
    """A pattern for module names: layers by any number, so that an adapter's config stays short."""
    return "|".join(dict.fromkeys(re.sub(r"\\\.\d+\\\.", r"\\.\\d+\\.", re.escape(name)) for name in names))


def vision_weights(model: Any) -> list[torch.nn.Parameter]:
    """Weights outside the language model and what leads into it: those of modules that are named for sight."""
    named = ("vision_tower", "vision_model", "visual", "vision_encoder", "image_encoder")
    return [weight for name, weight in model.named_parameters() if any(part in named for part in name.split("."))]


def course(settings: Config, rows: pa.Table) -> tuple[Course, int]:
    """(all lists of the training, steps)."""
    tune, fresh = settings.tune, draw.epoch_of(settings, rows)

    def epoch(number: int) -> list[Lesson]:
        return draw.bucketed(fresh(number), tune.batch_size, settings.run.seed, number)

    size = len(epoch(0))
    steps = tune.max_steps or tune.epochs * size // tune.batch_size
    return Course(epoch, steps * tune.batch_size), steps


def _trainer(settings: Config, ranker: MllmRanker, rows: pa.Table, folder: Path) -> RankTrainer:
    tune, method = settings.tune, settings.ranker.method
    text = tune.loss == "text" or tune.preset != "rar"
    pictures, anchored = Pictures(rows), bool(tune.anchor)
    teacher = Teacher(ranker.mllm, ranker.wording, pictures, method=method, as_text=text, anchored=anchored)
    lists, steps = course(settings, rows)
    longest = max((lists[place] for place in range(min(len(lists), lists.size))), key=lambda lesson: lesson.length)
    teacher([longest])  # beyond the window? better now than in an hour
    share = _share(tune)
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        per_device_train_batch_size=share,
        gradient_accumulation_steps=tune.accumulate,
        learning_rate=tune.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=int(np.ceil(WARMUP * steps)),
        weight_decay=0.0,
        optim="adamw_torch",
        bf16=tune.weights == "full" and settings.ranker.precision == "bf16",
        gradient_checkpointing=tune.gradient_checkpointing,
        train_sampling_strategy="sequential",
        eval_strategy="steps",
        save_strategy="steps",
        eval_steps=min(tune.check_every, steps),
        save_steps=min(tune.check_every, steps),
        save_total_limit=2,
        load_best_model_at_end=True,
        metric_for_best_model=METRIC,
        greater_is_better=True,
        logging_steps=1,
        logging_nan_inf_filter=False,
        disable_tqdm=True,
        report_to="none",
        remove_unused_columns=False,
        use_cpu=ranker.mllm.device.type == "cpu",
        dataloader_pin_memory=ranker.mllm.device.type != "cpu" and ranker.mllm.features is None,
        ddp_find_unused_parameters=False,
        ddp_broadcast_buffers=False,  # workers may take different numbers of passes a step; buffers here are constants
        seed=settings.run.seed,
    )
    val = draw.judged(rows, "val", draw.longest(settings), settings.run.seed, VAL)
    trainer = RankTrainer(
        teacher=teacher,
        ranker=ranker,
        val=val,
        tune=tune,
        model=ranker.mllm.model,
        args=arguments,
        train_dataset=lists,
        eval_dataset=val,
        data_collator=teacher,
        callbacks=[EarlyStoppingCallback(PATIENCE), Finite(), Note()],
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def _share(tune: config.Tune) -> int:
    """Lists of a forward pass in this worker."""
    world = dist.get_world_size() if dist.is_initialized() else 1
    share, left = divmod(tune.batch_size, world * tune.accumulate)
    if left:
        raise UserError(
            f"tune.batch_size {tune.batch_size} cannot be cut into tune.workers {world} times tune.accumulate "
            f"{tune.accumulate} equal parts: choose a multiple"
        )
    return share


class RankTrainer(Trainer):
    """A Trainer whose loss is of rankings, and which is judged by ranking."""

    def __init__(self, *, teacher: Teacher, ranker: MllmRanker, val: list[Lesson], tune: config.Tune, **more: Any) -> None:
        super().__init__(**more)
        self.teacher, self.ranker, self.val, self.tune = teacher, ranker, val, tune
        self.model_accepts_loss_kwargs = False  # else a loss is not divided over accumulated passes
        forms = getattr(ranker, "label_forms", None)
        self.table = losses.label_table(forms, self.args.device) if forms else None

    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None) -> Any:
        asked = copy.copy(self.teacher.mllm)
        asked.model = model  # as several workers wrap it
        parts = [*self._of_names(asked, inputs), *([self._of_one_pass(asked, inputs)] if "model" in inputs else [])]
        loss = torch.stack(parts).sum()
        if not torch.isfinite(loss):
            raise UserError(
                f"the loss is no number at step {self.state.global_step + 1}: lower tune.learning_rate{kept(self.args)}"
            )
        return (loss, None) if return_outputs else loss

    def _of_one_pass(self, asked: Mllm, inputs: Any) -> torch.Tensor:
        """Of label tokens, or of replies as text."""
        given = asked.placed(inputs["model"])
        keep = int(inputs["reply"].max()) + 1 if "reply" in inputs else 1
        last = {"logits_to_keep": keep} if asked.last_only else {}
        logits = asked.model(**given, **last, use_cache=False).logits
        if "reply" in inputs:
            return losses.of_text(logits, given["input_ids"], inputs["reply"])
        assert self.table is not None
        shown, answer, order = (inputs[name] for name in ("shown", "answer", "order"))
        return losses.of_labels(
            logits[:, -1], self.table, shown, answer, order, mass=self.tune.mass, listwise=self.tune.listwise
        )

    def _of_names(self, asked: Mllm, inputs: Any) -> Iterator[torch.Tensor]:
        """Of names as labels; of how far the model drifted."""
        listed, anchor = inputs.get("spoken"), inputs.get("anchor")
        logs = spoken.logs_of(asked, listed) if listed else None
        if logs is not None:
            yield losses.of_names(spoken.written(logs, listed), mean=self.ranker.config.method == "likelihood")
        if anchor is not None:
            before = self.teacher.mllm
            with torch.no_grad(), before.model.disable_adapter():
                then = spoken.logs_of(before, anchor)
            now = logs if logs is not None and anchor is listed else spoken.logs_of(asked, anchor)
            yield self.tune.anchor * losses.drift(then, now)

    def evaluate(self, *_: Any, **__: Any) -> dict[str, float]:
        """Rank accuracy on lists kept out, by the ranker itself; the lists are cut over the workers."""
        self.teacher.mllm.model.eval()
        mine = self.val[self.args.process_index :: self.args.world_size]
        sums = torch.tensor([*self._judged(mine), float(len(mine))], dtype=torch.float64, device=self.args.device)
        if dist.is_initialized() and self.args.world_size > 1:
            dist.all_reduce(sums)
        right, mass, count = sums.tolist()
        metrics = {f"eval_{METRIC}": right / max(count, 1), "eval_label_mass": mass / max(count, 1)}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _load_best_model(self) -> None:
        """The best checkpoint's weights; the last's where the difference says nothing."""
        last = next(entry[f"eval_{METRIC}"] for entry in reversed(self.state.log_history) if f"eval_{METRIC}" in entry)
        best = self.state.best_metric
        if best is not None and clearly_below(last, best, len(self.val)):
            super()._load_best_model()
        else:
            self.state.best_global_step, self.state.best_metric = self.state.global_step, last

    def _judged(self, lessons: list[Lesson]) -> tuple[float, float]:
        """(right answers, sum of the labels' mass)."""
        right = mass = 0.0
        size = 4 * self.ranker.config.batch_size
        for start in range(0, len(lessons), size):
            part = lessons[start : start + size]
            images = self.teacher.pictures([lesson.row for lesson in part])
            for ranking, lesson in zip(self.ranker.rank(images, [lesson.names for lesson in part]), part, strict=True):
                right += ranking.order[0] == lesson.answer
                mass += ranking.label_mass or 0.0
        return right, mass

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        """A whole model keeps the names that its weights have here: the trainer finds no others when it resumes from them."""
        if self.tune.weights == "full" and self.args.should_save:
            self.teacher.mllm.model.save_pretrained(str(output_dir), state_dict=state_dict, save_original_format=False)
        elif self.tune.weights == "lora":
            super()._save(output_dir, state_dict)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        left = kept(self.args)
        try:
            super()._save_checkpoint(model, trial)
        except Exception as error:  # a full disk is an OSError, a RuntimeError of torch or one of safetensors
            folder = Path(str(self.args.output_dir)) / f"checkpoint-{self.state.global_step}"
            shutil.rmtree(folder, ignore_errors=True)
            raise UserError(
                f"no checkpoint could be written to {folder}: {first_line(error)}; make room, and the same "
                f"command goes on{left}"
            ) from None


def clearly_below(last: float, best: float, count: int) -> bool:
    """Whether a share of `count` lists is more than a standard error below the best one: of some dozen lists, the best of
    several checkpoints is the luckiest, and the last has learned most."""
    return best - last > float(np.sqrt(best * (1 - best) / count))


class Note(TrainerCallback):
    """Notes the step for whoever waits; the last step is judged, too, whatever `check_every` is."""

    def on_step_end(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        control.should_evaluate |= state.global_step == state.max_steps

    def on_log(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        if state.is_world_process_zero:
            (Path(args.output_dir) / STEP).write_text(str(state.global_step))


class Finite(TrainerCallback):
    """Stops before a gradient that is no number reaches the weights."""

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        gradients = [weight.grad for weight in more["model"].parameters() if weight.grad is not None]
        if not torch.isfinite(torch.stack([gradient.float().norm() for gradient in gradients]).sum()):
            raise UserError(f"a gradient is no number at step {state.global_step + 1}: lower tune.learning_rate{kept(args)}")


def last_checkpoint(folder: Path) -> Path | None:
    """The newest whole checkpoint; None where there is none."""
    whole = [one for one in folder.glob("checkpoint-*") if _is_whole(one)]
    return max(whole, key=lambda one: int(one.name.rsplit("-", 1)[1]), default=None)


def kept(args: TrainingArguments) -> str:
    """What there is to go back to, in words; "" where there is nothing."""
    last = last_checkpoint(Path(str(args.output_dir)))
    return f"; {last} is the last good checkpoint" if last else ""


def clear_partial(folder: Path) -> None:
    """Throw away what a killed training has written of a checkpoint."""
    for one in folder.glob("checkpoint-*"):
        if not _is_whole(one):
            shutil.rmtree(one)


def _is_whole(checkpoint: Path) -> bool:
    try:
        return "global_step" in json.loads((checkpoint / STATE).read_text())
    except (OSError, ValueError):
        return False


def write_weights(ranker: MllmRanker, tune: config.Tune, target: Path) -> None:
    """The adapter (or, of full training, the model), whole or not at all; with `merged`, the model with the adapter in it."""
    model = ranker.mllm.model
    if tune.weights == "full":
        _put(target, lambda folder: _save_model(model, ranker, folder))
        return
    _put(target, lambda folder: model.save_pretrained(str(folder)))
    if tune.merged:
        whole = model.merge_and_unload()
        _put(target.parent / "merged", lambda folder: _save_model(whole, ranker, folder))


def _save_model(model: Any, ranker: MllmRanker, folder: Path) -> None:
    model.save_pretrained(str(folder))
    ranker.mllm.processor.save_pretrained(str(folder))


def _put(target: Path, write: Callable[[Path], None]) -> None:
    draft = target.with_name(f".{target.name}.{os.getpid()}")
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir(parents=True)
    write(draft)
    shutil.rmtree(target, ignore_errors=True)
    draft.rename(target)
