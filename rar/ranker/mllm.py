"""A multimodal LLM of transformers: any image-text-to-text checkpoint, loaded, rendered to, encoded for and asked.

Everything goes through the checkpoint's own processor and chat template, which is slower than a hand-made batch and right for
all families (`rar bench rank` shows what it costs). A prompt longer than the model's window is not cut, as that would drop
candidates unseen: it is left out, and its row falls back.

Quantisation is bitsandbytes' (int8: LLM.int8, 2208.07339; int4: NF4, 2305.14314), on the CPU too. An adapter is merged into the
weights where they are not quantised, so that it costs nothing at run time.
"""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from threading import Lock
from typing import Any, NamedTuple

import numpy as np
import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoModelForImageTextToText, BitsAndBytesConfig, GenerationConfig

from rar import checkpoint
from rar.config import Ranker
from rar.device import dtype_of, pick_device
from rar.ranker import labels
from rar.ranker.wording import PICTURE
from rar.schema import UserError, first_line

MAX_ASPECT = 100  # some processors refuse stripes (Qwen's from 200:1 on); thinner images are thickened


class Prompt(NamedTuple):
    """One question: the row it is for, which of the row's questions it is, its pictures in order, and the rendered chat."""

    row: int
    place: int
    images: list[np.ndarray]  # each (H, W, 3) uint8 RGB
    text: str


class Mllm:
    """A loaded checkpoint. Raises UserError for one that cannot be loaded or has no chat template."""

    def __init__(self, config: Ranker, model_path: str) -> None:
        """model_path: a local folder or a hub name (config.model may be 'miniature', which the caller resolves)."""
        self.config = config
        self.model_path = model_path
        self.device = pick_device(config.device, "ranker.device")
        self.processor, self.model = _load(config, model_path, self.device)
        self.window: int | None = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        self.lead, self.end_id = _reply_frame(self.processor, self.model)
        forward = inspect.signature(self.model.forward).parameters
        self.last_only = {"logits_to_keep": 1} if "logits_to_keep" in forward else {}
        tokens = {*self.processor.tokenizer.all_special_tokens, getattr(self.processor, "image_token", None), PICTURE} - {
            None,
            "",
        }
        # Qwen's models keep where a prompt's positions begin on the model itself, so one batch at a time goes through them
        self.keeps_positions = next((module for module in self.model.modules() if hasattr(module, "rope_deltas")), None)
        # frozen for good, a tower is asked once a picture: (prompts, inputs) -> inputs with its answers in place of pixels
        self.features: Callable[[Sequence[Prompt], dict[str, Any]], dict[str, Any]] | None = None
        self._tokenizing = Lock()  # a tokenizer's padding is set on it, and must not change while another thread uses it
        self._special = re.compile("|".join(re.escape(token) for token in sorted(tokens, key=len, reverse=True)))
        if config.image_processor:
            self._check_pictures()

    def harmless(self, name: str) -> str:
        """A class name must not smuggle in an image or end the user's turn."""
        return self._special.sub(" ", name)

    def render(self, texts: Sequence[str]) -> list[str]:
        """Chats of one user turn that shows a picture, then says the text; a PICTURE mark in the text is one more picture."""
        if not texts:
            return []
        turns = [_user_turn(text) for text in texts]
        return self.processor.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)

    def label_forms(self) -> list[tuple[int, ...]]:
        """Token ids of A, B, ... as the first token of a reply, as many labels as the tokenizer tells apart; maybe none.

        The template's own way to begin a reply counts, and so do no space and a space before the label.
        """
        tokenizer, prompt = self.processor.tokenizer, self.render(["?"])[0]
        leads = list(dict.fromkeys([self.lead, *labels.LEADS]))
        texts = labels.label_texts(prompt, leads)
        ids_of = dict(zip(texts, tokenizer(texts, add_special_tokens=False)["input_ids"], strict=True))
        return labels.label_forms(ids_of, prompt, leads, tokenizer.unk_token_id)

    def first_ids(self, word: str) -> list[int]:
        """Token ids that begin the reply `word`, as written and capitalised, less those that the tokenizer does not know."""
        tokenizer, prompt = self.processor.tokenizer, self.render(["?"])[0]
        before = tokenizer(prompt, add_special_tokens=False)["input_ids"]
        written = [
            tokenizer(prompt + self.lead + form, add_special_tokens=False)["input_ids"] for form in (word, word.capitalize())
        ]
        ids = [after[len(before)] for after in written if after[: len(before)] == before and len(after) > len(before)]
        return [token for token in dict.fromkeys(ids) if token != tokenizer.unk_token_id]

    def _check_pictures(self) -> None:
        """Raises UserError where the model cannot see what `ranker.image_processor` makes of a picture, wide or high."""
        text = self.render(["?"])[0]
        try:
            for shape in ((64, 640, 3), (640, 64, 3)):
                if not list(self.next_logits([Prompt(0, 0, [np.zeros(shape, np.uint8)], text)], [])):
                    raise ValueError(f"a picture does not fit into its window of {self.window} tokens")
        except (StrictDataclassError, ValueError, IndexError, TypeError, RuntimeError) as error:
            told = f"ranker.image_processor {self.config.image_processor} does not fit {self.model_path!r}"
            raise UserError(f"{told}: {first_line(error.__cause__ or error)}") from None

    def check_many_pictures(self) -> None:
        """Raises UserError for a model whose template or processor does not keep pictures where they stand in a prompt."""
        why = f"ranker.exemplars: {self.model_path!r} cannot show several pictures in a prompt"
        text = self.render([f"one{PICTURE}two"])[0]
        mark = self.render([""])[0]
        between = text[text.index("one") + 3 : text.index("two")]
        if not between.strip() or between not in mark:
            raise UserError(f"{why} (its chat template moves or drops them); set ranker.exemplars to 0")
        tiny = np.zeros((64, 64, 3), np.uint8)
        try:
            self.encode([Prompt(0, 0, [tiny, tiny], text)])
        except (ValueError, IndexError, TypeError, RuntimeError) as error:
            raise UserError(f"{why}: {first_line(error)}; set ranker.exemplars to 0") from None

    def batches(self, prompts: Sequence[Prompt], room: int) -> Iterator[tuple[list[Prompt], dict[str, Any], list[int]]]:
        """Yield (prompts, model inputs, prompt lengths in tokens) with prompts of like length together, as padding costs time.

        Prompts that leave less than `room` tokens of the window are left out.
        """
        window = self.window or np.inf
        waiting = sorted(prompts, key=lambda prompt: len(prompt.text))
        for start in range(0, len(waiting), self.config.batch_size):
            batch = waiting[start : start + self.config.batch_size]
            inputs, lengths = self.encode(batch)
            fitting = [prompt for prompt, length in zip(batch, lengths, strict=True) if length + room <= window]
            if fitting and len(fitting) < len(batch):
                inputs, lengths = self.encode(fitting)
            if fitting:
                yield fitting, self.placed(inputs), lengths

    def encode(self, prompts: Sequence[Prompt]) -> tuple[dict[str, Any], list[int]]:
        """(inputs on the CPU, lengths), rows padded on the left; pictures as pixels, or as `features` has them."""
        inputs = self.processed(prompts)
        lengths = inputs["attention_mask"].sum(dim=1).tolist()
        return (self.features(prompts, inputs) if self.features else inputs), lengths

    def processed(self, prompts: Sequence[Prompt]) -> dict[str, Any]:
        """Inputs by the processor's own call: images resized and normalised in one go, image tokens expanded."""
        with self._tokenizing:
            inputs = self.processor(
                images=[[thickened(image) for image in prompt.images] for prompt in prompts],
                text=[prompt.text for prompt in prompts],
                padding=True,
                padding_side="left",
                add_special_tokens=self._adds_special(prompts[0].text),
                input_data_format="channels_last",
                return_tensors="pt",
            )
        return dict(inputs)

    def token_ids(self, texts: list[str]) -> list[list[int]]:
        """Tokens of rendered chats as `encode` makes them, but with each image token left unexpanded."""
        with self._tokenizing:
            return self.processor.tokenizer(texts, add_special_tokens=self._adds_special(texts[0]))["input_ids"]

    def _adds_special(self, text: str) -> bool:
        bos = self.processor.tokenizer.bos_token
        return not (bos and text.startswith(bos))

    def placed(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """On the model's device, real numbers in its precision; features are where they are needed already."""
        dtype = dtype_of(self.config.precision)
        return {
            key: value.to(self.device, dtype if value.is_floating_point() else None)
            if isinstance(value, torch.Tensor)
            else value
            for key, value in inputs.items()
        }

    @torch.inference_mode()
    def next_logits(self, prompts: Sequence[Prompt], ids: list[int]) -> Iterator[tuple[Prompt, np.ndarray, int]]:
        """Yield (prompt, `of_ids` (len(ids) + 1,) of the reply's first token, prompt length), in no special order."""
        for batch, inputs, lengths in self.batches(prompts, 1):
            logits = self.model(**inputs, **self.last_only, use_cache=False).logits[:, -1]  # (B, V)
            yield from zip(batch, of_ids(logits, ids), lengths, strict=True)

    @torch.inference_mode()
    def write(self, prompts: Sequence[Prompt]) -> Iterator[tuple[Prompt, str, int, int]]:
        """Yield (prompt, greedy reply, tokens written, prompt length), in no special order."""
        for batch, inputs, lengths in self.batches(prompts, self.config.max_new_tokens):
            written = self.model.generate(**inputs)[:, inputs["input_ids"].shape[1] :].cpu()  # (B, new)
            replies = self.processor.tokenizer.batch_decode(written, skip_special_tokens=True)
            yield from zip(batch, replies, [self._written(new) for new in written], lengths, strict=True)

    def _written(self, new: torch.Tensor) -> int:
        """Tokens the model wrote, the end token included and the padding after it left out."""
        ends = torch.tensor(_end_ids(self.model), dtype=new.dtype)
        ended = torch.isin(new, ends).nonzero()
        return int(ended[0]) + 1 if len(ended) else len(new)


def of_ids(logits: torch.Tensor, ids: list[int]) -> np.ndarray:
    """(B, V) logits -> (B, len(ids) + 1) float64: log-probabilities of the tokens `ids`, then that of the likeliest token."""
    logits = logits.double()
    chosen = torch.cat([logits[:, ids], logits.amax(dim=1, keepdim=True)], dim=1)
    return (chosen - logits.logsumexp(dim=1, keepdim=True)).cpu().numpy()


def thickened(image: np.ndarray) -> np.ndarray:
    """(H, W, 3) with its short side repeated until no side is over MAX_ASPECT times the other."""
    height, width = image.shape[:2]
    rows, columns = -(-width // (height * MAX_ASPECT)), -(-height // (width * MAX_ASPECT))
    return image if rows == columns == 1 else image.repeat(rows, axis=0).repeat(columns, axis=1)


def _user_turn(text: str) -> list[dict[str, Any]]:
    head, *others = text.split(PICTURE)
    content = [{"type": "image"}, {"type": "text", "text": head}]
    for part in others:
        content += [{"type": "image"}, {"type": "text", "text": part}]
    return [{"role": "user", "content": [part for part in content if part.get("text") != ""]}]


def _load(config: Ranker, model_path: str, device: torch.device) -> tuple[Any, Any]:
    """(processor, model in inference mode), greedy, with the adapter in it."""
    more = {"trust_remote_code": config.trust_remote_code, **_quantized(config, device)}
    processor, model = checkpoint.load(
        model_path, "ranker.model", AutoModelForImageTextToText, config.precision, pictures=config.image_processor, **more
    )
    if not getattr(processor, "chat_template", None):
        raise UserError(f"ranker.model {model_path!r} has no chat template; use an instruction-tuned model")
    _make_greedy(processor.tokenizer, model, config.max_new_tokens)
    if config.adapter is not None:
        model = _adapted(model, Path(config.adapter), merge=config.quantization == "none")
    return processor, (model.to(device) if config.quantization == "none" else model).eval()


def _quantized(config: Ranker, device: torch.device) -> dict[str, Any]:
    """Arguments of `from_pretrained`. Raises UserError where bitsandbytes is not installed."""
    if config.quantization == "none":
        return {}
    try:
        import accelerate  # noqa: F401
        import bitsandbytes  # noqa: F401
    except ImportError as error:
        raise UserError(f"ranker.quantization needs the package {error.name}: pip install bitsandbytes accelerate") from None
    if config.quantization == "int8":
        return {"quantization_config": BitsAndBytesConfig(load_in_8bit=True), "device_map": {"": device}}
    int4 = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype_of(config.precision))
    return {"quantization_config": int4, "device_map": {"": device}}


def _adapted(model: Any, folder: Path, merge: bool) -> Any:
    """The model with a LoRA adapter in it. Raises UserError for a folder that holds none, or that of another model."""
    try:
        from peft import PeftModel
    except ImportError:
        raise UserError("ranker.adapter needs the package peft: pip install 'rar[adapters]'") from None
    try:
        kind = json.loads((folder / "adapter_config.json").read_text())["peft_type"]
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(f"ranker.adapter {str(folder)!r} is no adapter: it has no adapter_config.json of peft") from None
    if kind != "LORA":
        raise UserError(f"ranker.adapter {str(folder)!r} is a {kind} adapter; only LORA is supported")
    try:
        adapted: Any = PeftModel.from_pretrained(model, str(folder), local_files_only=True)
        unused = adapted.load_adapter(str(folder), "default").unexpected_keys
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        raise UserError(f"ranker.adapter {str(folder)!r} does not fit ranker.model: {first_line(error)}") from None
    if unused:
        raise UserError(f"ranker.adapter {str(folder)!r} does not fit ranker.model, which has no {unused[0]!r}")
    return adapted.merge_and_unload() if merge else adapted.get_base_model()


def _make_greedy(tokenizer: Any, model: Any, max_new_tokens: int) -> None:
    """Replace the checkpoint's sampling settings (temperature, penalties), keeping the tokens that end a reply."""
    eos = model.generation_config.eos_token_id
    eos = eos if eos is not None else tokenizer.eos_token_id
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    model.generation_config = GenerationConfig(
        do_sample=False, max_new_tokens=max_new_tokens, eos_token_id=eos, pad_token_id=tokenizer.pad_token_id
    )


def _end_ids(model: Any) -> list[int]:
    ends = model.generation_config.eos_token_id
    return [] if ends is None else ends if isinstance(ends, list) else [ends]


def _reply_frame(processor: Any, model: Any) -> tuple[str, int | None]:
    """(what stands between the generation prompt and a reply, the token that ends a reply), as the chat template has them.

    "ASSISTANT:" + " A" has a space as its lead. A template that ends replies by no end token leaves that to the checkpoint's.
    """
    turn = _user_turn("?")
    prompt = processor.apply_chat_template(turn, add_generation_prompt=True, tokenize=False)
    reply = {"role": "assistant", "content": [{"type": "text", "text": "A"}]}
    whole = processor.apply_chat_template([*turn, reply], tokenize=False)
    lead, found, tail = whole.removeprefix(prompt).partition("A")
    ends = _end_ids(model)
    after = processor.tokenizer(tail, add_special_tokens=False)["input_ids"][:1] if found else []
    end = next((token for token in [*after, *ends] if token in ends), None)
    return (lead if found and not lead.strip() else ""), end
