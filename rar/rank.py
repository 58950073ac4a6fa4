"""The MLLM ranker: any image-text-to-text checkpoint of transformers, asked about one image and a list of candidates a row.

`letters` labels the candidates A, B, ... and reads the label logits after one forward pass, so the answer is a permutation by
construction and has scores; permutations > 1 averages log-probabilities over rotations of the list, against the models' liking
for certain labels (Zheng et al. 2309.03882). `generate` is the paper's free text (3.2) with greedy decoding, read by
`prompt.parse`. Both go through the checkpoint's own processor and chat template: slower than a hand-made batch, right for all.

A row of one candidate costs no call. A prompt longer than the model's window is not cut, as that would drop candidates unseen:
its row is a FALLBACK with calls = 0, where a reply that nobody can read is a FALLBACK with calls = 1.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor, GenerationConfig
from transformers.utils import logging

from rar.config import Ranker
from rar.prompt import LABELS, generate_prompt, letters_prompt, parse
from rar.schema import Ranking, RankStatus, UserError

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")
MAX_ASPECT = 100  # some processors refuse stripes (Qwen's from 200:1 on); thinner images are thickened


class Prompt(NamedTuple):
    """One call: the row it is for, by how many places its candidates are rotated, and the rendered chat."""

    row: int
    shift: int
    text: str


class MllmRanker:
    """Ranks candidates by a local MLLM. Raises UserError for a model that cannot be loaded or asked in the configured way."""

    def __init__(self, config: Ranker, model_path: str) -> None:
        """model_path: a local folder or a hub name (config.model may be 'miniature', which the caller resolves)."""
        self.config = config
        self.device = _device(config.device)
        self.processor, self.model = _load(config, model_path, self.device)
        self.window: int | None = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        self.model_path = model_path
        self._special = _special_tokens(self.processor)
        if config.method == "letters":
            self._label_ids = _label_ids(self.processor)
            self._keep = {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(self.model.forward).parameters else {}

    def rank(self, images: Sequence[np.ndarray], names: Sequence[Sequence[str]]) -> list[Ranking]:
        """Rank the candidates of each image.

        images: (H, W, 3) uint8 RGB, any sizes. names: the candidates' names of each image in retrieval order; rows may differ
        in number. Returns one Ranking a row: `letters` with one score a candidate (a log-probability among the candidates,
        averaged over `permutations`; order sorts it, ties in retrieval order) and one output token a call, `generate` with the
        raw response. Rows of one candidate are RANKED without a call. Raises UserError where `letters` has more candidates
        than the model has labels.
        """
        asked = [row for row, listed in enumerate(names) if len(listed) > 1]
        answers = (self._letters if self.config.method == "letters" else self._generate)(
            [images[row] for row in asked], [[self._harmless(name) for name in names[row]] for row in asked]
        )
        rankings = dict(zip(asked, answers, strict=True))
        return [rankings.get(row) or self._trivial(len(listed)) for row, listed in enumerate(names)]

    def _trivial(self, count: int) -> Ranking:
        scores = (0.0,) * count if self.config.method == "letters" else ()  # the one candidate has probability 1
        return Ranking(tuple(range(count)), RankStatus.RANKED, scores)

    def _harmless(self, name: str) -> str:
        """A class name must not smuggle in an image or end the user's turn."""
        return self._special.sub(" ", name)

    @torch.inference_mode()
    def _letters(self, images: list[np.ndarray], names: list[list[str]]) -> list[Ranking]:
        self._check_label_count(max(map(len, names), default=0))
        shifts = [rotations(len(listed), self.config.permutations) for listed in names]
        turns = [(row, shift) for row in range(len(names)) for shift in shifts[row]]
        texts = self._render([letters_prompt(names[row][shift:] + names[row][:shift]) for row, shift in turns])
        totals = [np.zeros(len(listed)) for listed in names]
        calls, tokens = [0] * len(names), [0] * len(names)
        for batch, inputs, lengths in self._batches(
            images, [Prompt(*turn, text) for turn, text in zip(turns, texts, strict=True)], 1
        ):
            logits = self.model(**inputs, **self._keep, use_cache=False).logits[:, -1]  # (B, V)
            labels = logits[:, self._label_ids].double().cpu().numpy()  # (B, labels)
            for prompt, row_labels, length in zip(batch, labels, lengths, strict=True):
                totals[prompt.row] += np.roll(log_softmax(row_labels[: len(names[prompt.row])]), prompt.shift)
                calls[prompt.row] += 1
                tokens[prompt.row] += length
        return [
            _scored(total / len(shifts[row]), calls[row], tokens[row])
            if calls[row] == len(shifts[row])
            else _unasked(len(total))
            for row, total in enumerate(totals)
        ]

    def _check_label_count(self, count: int) -> None:
        if count > len(self._label_ids):
            raise UserError(
                f"ranker.method 'letters' can label {len(self._label_ids)} candidates with {self.model_path!r}, not {count}: "
                "lower retriever.top_k or set ranker.method to 'generate'"
            )

    @torch.inference_mode()
    def _generate(self, images: list[np.ndarray], names: list[list[str]]) -> list[Ranking]:
        texts = self._render([generate_prompt(listed) for listed in names])
        prompts = [Prompt(row, 0, text) for row, text in enumerate(texts)]
        rankings = [_unasked(len(listed)) for listed in names]
        for batch, inputs, lengths in self._batches(images, prompts, self.config.max_new_tokens):
            written = self.model.generate(**inputs)[:, inputs["input_ids"].shape[1] :].cpu()  # (B, new)
            responses = self.processor.tokenizer.batch_decode(written, skip_special_tokens=True)
            for prompt, response, new, length in zip(batch, responses, written, lengths, strict=True):
                order, status = parse(response, names[prompt.row])
                rankings[prompt.row] = Ranking(order, status, (), response, 1, length, self._written(new))
        return rankings

    def _written(self, new: torch.Tensor) -> int:
        """Tokens the model wrote, the end token included and the padding after it left out."""
        ends = self.model.generation_config.eos_token_id
        ended = torch.isin(new, torch.tensor(ends if ends is not None else [], dtype=new.dtype)).nonzero()
        return int(ended[0]) + 1 if len(ended) else len(new)

    def _render(self, texts: list[str]) -> list[str]:
        if not texts:
            return []
        return self.processor.apply_chat_template(
            [_user_turn(text) for text in texts], add_generation_prompt=True, tokenize=False
        )

    def _batches(
        self, images: list[np.ndarray], prompts: list[Prompt], room: int
    ) -> Iterator[tuple[list[Prompt], dict[str, torch.Tensor], list[int]]]:
        """Yield (prompts, model inputs, prompt lengths in tokens) with prompts of like length together, as padding costs time.

        Prompts that leave less than `room` tokens of the window are left out.
        """
        window = self.window or np.inf
        waiting = sorted(prompts, key=lambda prompt: len(prompt.text))
        for start in range(0, len(waiting), self.config.batch_size):
            batch = waiting[start : start + self.config.batch_size]
            inputs, lengths = self._encode(images, batch)
            fitting = [prompt for prompt, length in zip(batch, lengths, strict=True) if length + room <= window]
            if fitting and len(fitting) < len(batch):
                inputs, lengths = self._encode(images, fitting)
            if fitting:
                yield fitting, {key: self._placed(value) for key, value in inputs.items()}, lengths

    def _encode(self, images: list[np.ndarray], prompts: list[Prompt]) -> tuple[Any, list[int]]:
        """The processor's own call: images resized and normalised in one go, image tokens expanded, rows padded on the left."""
        bos = self.processor.tokenizer.bos_token
        inputs = self.processor(
            images=[[thickened(images[prompt.row])] for prompt in prompts],
            text=[prompt.text for prompt in prompts],
            padding=True,
            padding_side="left",
            add_special_tokens=not (bos and prompts[0].text.startswith(bos)),
            input_data_format="channels_last",
            return_tensors="pt",
        )
        return inputs, inputs["attention_mask"].sum(dim=1).tolist()

    def _placed(self, value: torch.Tensor) -> torch.Tensor:
        return value.to(self.device, self.model.dtype if value.is_floating_point() else None)


def rotations(count: int, permutations: int) -> list[int]:
    """Evenly spaced rotations of `count` candidates, the given order first: rotations(5, 2) = [0, 2]."""
    used = min(count, permutations)
    return [turn * count // used for turn in range(used)]


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """(n,) logits -> (n,) log-probabilities."""
    shifted = logits - logits.max()
    return shifted - np.log(np.exp(shifted).sum())


def thickened(image: np.ndarray) -> np.ndarray:
    """(H, W, 3) with its short side repeated until no side is over MAX_ASPECT times the other."""
    height, width = image.shape[:2]
    rows, columns = -(-width // (height * MAX_ASPECT)), -(-height // (width * MAX_ASPECT))
    return image if rows == columns == 1 else image.repeat(rows, axis=0).repeat(columns, axis=1)


def _scored(scores: np.ndarray, calls: int, tokens: int) -> Ranking:
    """By score, best first. Scores that are no numbers (a half-precision overflow) rank nothing."""
    if not np.isfinite(scores).all():
        return Ranking(tuple(range(len(scores))), RankStatus.FALLBACK, (), "", calls, tokens, calls)
    order = tuple(np.argsort(-scores, kind="stable").tolist())
    return Ranking(order, RankStatus.RANKED, tuple(scores.tolist()), "", calls, tokens, calls)


def _unasked(count: int) -> Ranking:
    return Ranking(tuple(range(count)), RankStatus.FALLBACK)


def _user_turn(text: str) -> list[dict[str, Any]]:
    return [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": text}]}]


def _device(name: str) -> torch.device:
    """The configured device; 'auto' is the first of cuda, mps, cpu that is there. Raises UserError for one that is not."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"ranker.device {name!r} cannot be used here: {_first_line(error)}") from None


def _load(config: Ranker, model_path: str, device: torch.device) -> tuple[Any, Any]:
    """(processor, model in inference mode). A checkpoint with weights missing is refused: it would rank at random."""
    local = Path(model_path).is_dir()
    if not local and not HUB_NAME.fullmatch(model_path):
        raise UserError(f"ranker.model {model_path!r} is no folder; give a local model folder or a hub name")
    logging.disable_progress_bar()
    options = {"trust_remote_code": config.trust_remote_code, "local_files_only": local}
    try:
        processor = AutoProcessor.from_pretrained(model_path, **options)
        dtype = PRECISIONS[config.precision]
        loaded: Any = AutoModelForImageTextToText.from_pretrained(model_path, dtype=dtype, output_loading_info=True, **options)
    except (OSError, ValueError, ImportError) as error:
        raise UserError(f"ranker.model {model_path!r} cannot be loaded: {_first_line(error)}") from None
    model, missing = loaded[0], sorted(loaded[1]["missing_keys"])
    if missing:
        raise UserError(f"ranker.model {model_path!r} lacks {len(missing)} of its weights, the first is {missing[0]!r}")
    if not getattr(processor, "chat_template", None):
        raise UserError(f"ranker.model {model_path!r} has no chat template; use an instruction-tuned model")
    _make_greedy(processor.tokenizer, model, config.max_new_tokens)
    return processor, model.to(device).eval()


def _make_greedy(tokenizer: Any, model: Any, max_new_tokens: int) -> None:
    """Replace the checkpoint's sampling settings (temperature, penalties), keeping the tokens that end a reply."""
    eos = model.generation_config.eos_token_id
    eos = eos if eos is not None else tokenizer.eos_token_id
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    model.generation_config = GenerationConfig(
        do_sample=False, max_new_tokens=max_new_tokens, eos_token_id=eos, pad_token_id=tokenizer.pad_token_id
    )


def _label_ids(processor: Any) -> list[int]:
    """Token ids of A, B, ... as the first token of a reply, as many as the tokenizer tells apart; UserError for under two.

    Whether a reply begins with a space is read from the chat template itself: what it puts between the generation prompt and an
    assistant's text ("ASSISTANT:" + " A"). Where that gives no single tokens, no space and a space are tried.
    """
    turn = _user_turn("?")
    prompt = processor.apply_chat_template(turn, add_generation_prompt=True, tokenize=False)
    reply = {"role": "assistant", "content": [{"type": "text", "text": "A"}]}
    lead, found, _ = processor.apply_chat_template([*turn, reply], tokenize=False).removeprefix(prompt).partition("A")
    leads = [lead] if found and not lead.strip() else []
    best = max((_single_tokens(processor.tokenizer, prompt, lead) for lead in [*leads, "", " "]), key=len)
    if len(best) < 2:
        raise UserError("this model's tokenizer has no single tokens for the labels A, B, ...; set ranker.method to 'generate'")
    return best


def _single_tokens(tokenizer: Any, prompt: str, lead: str) -> list[int]:
    """Ids of the labels, in order, up to the first that is no single token of its own after prompt + lead."""
    before = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    ids: list[int] = []
    for label in LABELS:
        *start, last = tokenizer(prompt + lead + label, add_special_tokens=False)["input_ids"]
        if start != before or last in (*ids, tokenizer.unk_token_id):
            break
        ids.append(last)
    return ids


def _special_tokens(processor: Any) -> re.Pattern[str]:
    tokens = {*processor.tokenizer.all_special_tokens, getattr(processor, "image_token", None)} - {None, ""}
    return re.compile("|".join(re.escape(token) for token in sorted(tokens, key=len, reverse=True)) or r"(?!)")


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
