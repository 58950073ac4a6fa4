"""Trains the miniature MLLM: stock LLaVA classes, a CLIP vision tower and a five-layer Llama, on ranking prompts.

A step asks one kind of question: the picture's name (a caption), which of the candidates it is (one letter; two shuffled
orders an image, so that the tower's work is used twice), or the sorted list (the paper's request). Loss is taken on answers
alone. Letter questions come in three grades: single words ("moon" or "ring"?), names drawn at random, and the CLIP's own
confusions within a random part of the training vocabulary. Asked for confusions from the start, which mostly differ in the
marking, a trial stayed at chance for 450 steps: matching is learned on easy questions first. The order is always
shuffled, so that neither position nor retrieval order gives the answer away. While training, a throw-away linear probe of the
middle layer also has to tell at the end of each listed name whether it is the right one: one letter is a thin signal for
learning to compare names with a picture; without the probe (and with a weaker tower) a trial was at chance after 650 steps.

The tower starts from a CLIP of the same resolution, as LLaVA's does; the control is that same CLIP trained on for as long
as the MLLM is, so pixels and minutes are equal and only the ranking differs.
"""

from __future__ import annotations

import re
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import open_clip
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
)

from rar.hardware import multiplies
from rar.miniature.tokens import CAPTION, mllm_tokenizer
from rar.miniature.train_clip import MEAN, STD, Images
from rar.miniature.world import COLOURS, MARKINGS, PATTERNS, SHAPES, Spec
from rar.ranker.prompt import generate_answer, generate_prompt, letters_prompt
from rar.ranker.wording import LABELS

SIDE, PATCH = 64, 16
IMAGE_TOKENS = (SIDE // PATCH) ** 2 + 1
TEMPLATE = (
    "{% for m in messages %}{% if m['role'] == 'user' %}USER: {% else %}ASSISTANT: {% endif %}"
    "{% for c in m['content'] %}{% if c['type'] == 'image' %}<image>{% else %} {{ c['text'] }}{% endif %}{% endfor %} "
    "{% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)
IGNORE = -100
TOWER = re.compile(r"^vision_tower\.(?!vision_model\.)")
MATCH_LAYER = 3  # of five: after it two layers are left to find the label of the candidate that matches
ATTRIBUTES = (("shape", SHAPES), ("colour", COLOURS), ("pattern", PATTERNS), ("marking", MARKINGS), ("marking", MARKINGS))
KINDS = ("caption", "word", "random", "letter", "list")
Stages = tuple[tuple[float, tuple[float, ...]], ...]  # up to which part of the training, share of each kind
RANKER: Stages = (
    (0.25, (0.3, 0.7, 0.0, 0.0, 0.0)),
    (0.4, (0.2, 0.35, 0.45, 0.0, 0.0)),
    (1.0, (0.1, 0.15, 0.1, 0.53, 0.12)),
)
DESCRIBER: Stages = ((1.0, (1.0, 0.0, 0.0, 0.0, 0.0)),)  # it names what it sees, and was never shown a list


def new_model(vocabulary: int, image_token: int, hidden: int = 128) -> LlavaForConditionalGeneration:
    """An untrained miniature LLaVA."""
    vision = CLIPVisionConfig(
        hidden_size=192, intermediate_size=768, num_hidden_layers=4, num_attention_heads=6, image_size=SIDE,
        patch_size=PATCH, hidden_act="gelu", layer_norm_eps=1e-5,
    )  # fmt: skip
    text = LlamaConfig(
        vocab_size=vocabulary, hidden_size=hidden, intermediate_size=3 * hidden, num_hidden_layers=5,
        num_attention_heads=hidden // 32, num_key_value_heads=hidden // 32, max_position_embeddings=2048,
        pad_token_id=0, bos_token_id=2, eos_token_id=3, tie_word_embeddings=True,
        initializer_range=0.06,  # 0.02 suits hidden sizes of thousands; attention of 128 would start out flat
    )  # fmt: skip
    config = LlavaConfig(
        vision_config=vision, text_config=text, image_token_index=image_token, image_seq_length=IMAGE_TOKENS,
        vision_feature_layer=-1, vision_feature_select_strategy="full", tie_word_embeddings=True,
    )  # fmt: skip
    return LlavaForConditionalGeneration(config)


def start_tower(model: LlavaForConditionalGeneration, clip: open_clip.CLIP) -> None:
    """Copy the vision tower of an open_clip model of the same shape."""
    source = clip.visual.state_dict()
    names = {"conv1.weight": "embeddings.patch_embedding.weight", "class_embedding": "embeddings.class_embedding",
             "positional_embedding": "embeddings.position_embedding.weight", "ln_pre": "pre_layrnorm",
             "ln_post": "post_layernorm"}  # fmt: skip
    weights = {}
    for name, tensor in source.items():
        if name == "proj":
            continue
        if name.startswith("transformer.resblocks."):
            _, _, layer, rest = name.split(".", 3)
            prefix = f"encoder.layers.{layer}."
            if rest.startswith("attn.in_proj_"):
                kind = rest.removeprefix("attn.in_proj_")
                for part, piece in zip("qkv", tensor.chunk(3), strict=True):
                    weights[f"{prefix}self_attn.{part}_proj.{kind}"] = piece
                continue
            for old, new in {"ln_1": "layer_norm1", "ln_2": "layer_norm2", "attn.out_proj": "self_attn.out_proj",
                             "mlp.c_fc": "mlp.fc1", "mlp.c_proj": "mlp.fc2"}.items():  # fmt: skip
                rest = rest.replace(old, new)
            weights[prefix + rest] = tensor
        else:
            stem = name if name in names else name.rsplit(".", 1)[0]
            weights[name.replace(stem, names[stem])] = tensor
    tower = model.model.vision_tower
    own = getattr(tower, "vision_model", tower)
    missing, unexpected = own.load_state_dict(weights, strict=False)
    assert not unexpected and all("position_ids" in name for name in missing), (missing, unexpected)


@dataclass(frozen=True)
class Confusions:
    """What the retriever would propose: similarities of every training image's CLIP embedding to every class text."""

    image: torch.Tensor  # (N, D) unit norm
    text: torch.Tensor  # (C, D) unit norm

    def candidates(self, rows: np.ndarray, classes: np.ndarray, k: int, rng: np.random.Generator) -> np.ndarray:
        """(B, k) class numbers, most similar first, the true class among them, drawn within a random part of the classes."""
        scores = self.image[rows] @ self.text.T
        truth = torch.from_numpy(classes)
        share = float(rng.choice([0.02, 0.06, 0.2]))
        hidden = torch.rand(scores.shape, generator=torch.Generator().manual_seed(int(rng.integers(2**31)))) > share
        group = torch.arange(scores.shape[1]) // 9
        siblings = group[None] == truth[:, None] // 9
        hidden &= ~(siblings & (torch.from_numpy(rng.random(scores.shape, np.float32)) < 0.4))
        scores = scores.masked_fill(hidden, -9.0)
        scores[torch.arange(len(rows)), truth] = (self.image[rows] * self.text[truth]).sum(1)
        top = scores.topk(k, dim=1).indices.numpy()
        lost = ~(top == classes[:, None]).any(1)
        top[lost, -1] = classes[lost]
        return top


class Asker:
    """Turns true classes and candidates into token ids: image prefix, question, answer."""

    def __init__(self, specs: list[Spec]) -> None:
        self.specs = specs
        self.tokenizer = mllm_tokenizer()
        image = int(self.tokenizer.convert_tokens_to_ids("<image>"))  # type: ignore[arg-type]
        self.prefix = [*self._ids("USER:"), *[image] * IMAGE_TOKENS]
        self.first_label, self.answer = (self._ids(word)[0] for word in ("A", "Answer"))

    def caption(self, truth: int) -> tuple[list[int], list[int]]:
        return self._turn(CAPTION, self.specs[truth].name)

    def letter(self, truth: int, order: np.ndarray) -> tuple[list[int], list[int]]:
        names = [self.specs[c].name for c in order]
        return self._turn(letters_prompt(names), LABELS[list(order).index(truth)])

    def word(self, truth: int, k: int, rng: np.random.Generator) -> tuple[list[int], list[int]]:
        """Which colour (shape, pattern, marking) is it, among k."""
        part, values = ATTRIBUTES[rng.integers(len(ATTRIBUTES))]
        right = getattr(self.specs[truth], part)
        words = [str(w) for w in rng.permutation([right, *rng.permutation([v for v in values if v != right])[: k - 1]])]
        return self._turn(letters_prompt(words), LABELS[words.index(right)])

    def sorted_list(self, truth: int, order: np.ndarray) -> tuple[list[int], list[int]]:
        """The target puts the truth first and the others by the attributes they share with it."""
        answer = sorted(order, key=lambda c: -self._alike(truth, c))
        names, sorted_names = ([self.specs[c].name for c in some] for some in (order, answer))
        return self._turn(generate_prompt(names), generate_answer(sorted_names))

    def _alike(self, a: int, b: int) -> int:
        first, second = self.specs[a], self.specs[b]
        return sum(getattr(first, part) == getattr(second, part) for part in ("shape", "colour", "pattern", "marking"))

    def _turn(self, prompt: str, answer: str) -> tuple[list[int], list[int]]:
        """Token ids of a turn, and its labels (the answer and the end alone)."""
        asked = [*self.prefix, *self._ids(prompt + " ASSISTANT:")]
        answered = [*self._ids(answer), self.tokenizer.eos_token_id]
        return asked + answered, [IGNORE] * len(asked) + answered

    def _ids(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False).input_ids


def stack(turns: list[tuple[list[int], list[int]]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Right-padded ids and labels (B, T). Under a causal mask, padding on the right is never seen."""
    length = max(len(ids) for ids, _ in turns)
    ids = torch.tensor([row + [0] * (length - len(row)) for row, _ in turns])
    return ids, torch.tensor([row + [IGNORE] * (length - len(row)) for _, row in turns])


def name_ends(ids: torch.Tensor, labels: torch.Tensor, first_label: int, answer: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Where each candidate of letter questions ends, (B, T) bool, and which of those is the right one, (B, T) bool.

    A candidate ends before the next label, the last one before the word Answer (token `answer`).
    """
    asked = (labels == IGNORE) & (ids != 0)
    label = asked & (ids >= first_label) & (ids < first_label + len(LABELS))
    count = label.cumsum(1)
    following = torch.roll((label & (count > 1)) | (asked & (ids == answer)), -1, 1)
    right = torch.where((labels >= first_label) & (labels < first_label + len(LABELS)), labels - first_label + 1, 0).amax(1)
    return following, following & (count == right[:, None])


def forward(model: LlavaForConditionalGeneration, pixels: torch.Tensor, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Last and middle states (B, T, hidden). pixels (B / q, 3, S, S): each image serves q consecutive rows of ids (B, T)."""
    features = model.get_image_features(pixel_values=pixels).pooler_output
    features = torch.stack(list(features)).repeat_interleave(len(ids) // len(pixels), 0)
    embeds = model.get_input_embeddings()(ids)
    start = int((ids[0] == model.config.image_token_id).nonzero()[0, 0])
    embeds = torch.cat([embeds[:, :start], features.to(embeds.dtype), embeds[:, start + IMAGE_TOKENS :]], 1)
    output = model.model.language_model(inputs_embeds=embeds, use_cache=False, output_hidden_states=True)
    return output.last_hidden_state, output.hidden_states[MATCH_LAYER]


def train(
    model: LlavaForConditionalGeneration,
    images: Images,
    confusions: Confusions | None,
    steps: int,
    seed: int,
    *,
    stages: Stages = RANKER,
    lr: float = 1.5e-3,
) -> None:
    """Train in place for a number of steps; prints a line every fifty. confusions: None where no stage has letters or lists."""
    torch.manual_seed(seed)
    rng = np.random.default_rng([seed, 12])
    asker = Asker(images.specs)
    tower = list(model.model.vision_tower.parameters())
    rest = [p for name, p in model.named_parameters() if "vision_tower" not in name]
    match = torch.nn.Linear(model.lm_head.in_features, 1)  # an aid of training, thrown away
    rest += match.parameters()
    groups = [{"params": tower, "lr": lr / 3}, {"params": rest, "lr": lr}]
    optimiser = torch.optim.AdamW(groups, weight_decay=0.05, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, [lr / 3, lr], steps + 1, pct_start=0.06)
    started = time.time()
    seen: dict[str, list[float]] = {kind: [] for kind in (*KINDS, "match")}
    model.train()
    for step in range(steps):
        shares = next(shares for until, shares in stages if step < until * steps)
        kind = str(rng.choice(KINDS, p=shares))
        k = int(rng.choice([2, 3, 4] if step < stages[0][0] * steps else [3, 4, 5, 5, 5, 6]))
        pixels, ids, labels = _batch(kind, k, asker, images, confusions, rng)
        with sdpa_kernel(SDPBackend.MATH):
            with torch.autocast("cpu", torch.bfloat16, enabled=multiplies("bf16")):
                hidden, middle = forward(model, pixels, ids)
                answers = labels[:, 1:] != IGNORE
                logits = model.lm_head(hidden[:, :-1][answers]).float()
            target = labels[:, 1:][answers]
            loss = F.cross_entropy(logits, target)
            if kind not in ("caption", "list"):
                ends, right = name_ends(ids, labels, asker.first_label, asker.answer)
                matched = match(middle[ends].float())[:, 0]
                loss = loss + F.binary_cross_entropy_with_logits(matched, right[ends].float())
                seen["match"].append(((matched > 0) == right[ends]).float().mean().item())
            optimiser.zero_grad()
            loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        schedule.step()
        correct = (logits.argmax(1) == target).float()
        # of a letter question, the letter alone; the end of the turn is always right
        seen[kind].append((correct if kind in ("caption", "list") else correct.view(-1, 2)[:, 0]).mean().item())
        if step % 50 == 49:
            rates = " ".join(f"{name} {np.mean(values or [0]):.3f}" for name, values in seen.items())
            print(f"mllm step {step + 1}/{steps} {rates} {time.time() - started:.0f} s", flush=True)
            seen = {name: [] for name in seen}
    model.eval()


def _batch(
    kind: str, k: int, asker: Asker, images: Images, confusions: Confusions | None, rng: np.random.Generator, batch: int = 96
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    classes = rng.integers(0, len(images.specs), batch)
    rows = classes * images.per_class + rng.integers(0, images.per_class, batch)
    if kind in ("letter", "list"):
        assert confusions is not None
        proposed = confusions.candidates(rows, classes, k, rng)
    else:
        proposed = np.column_stack([classes, rng.integers(0, len(images.specs), (batch, k - 1))])
    turns = []
    for truth, row in zip(classes.tolist(), proposed, strict=True):
        if kind == "caption":
            turns.append(asker.caption(truth))
        elif kind == "word":
            turns += [asker.word(truth, k, rng) for _ in range(2)]
        elif kind == "list":
            turns.append(asker.sorted_list(truth, rng.permutation(row)))
        else:
            turns += [asker.letter(truth, rng.permutation(row)) for _ in range(2)]
    return images.take(rows, rng), *stack(turns)


@torch.inference_mode()
def letters_accuracy(
    model: LlavaForConditionalGeneration,
    pixels: np.ndarray,
    truth: np.ndarray,
    specs: list[Spec],
    candidates: np.ndarray,
    seed: int,
) -> float:
    """Top-1 of one-letter ranking on shuffled candidates. pixels (N, 64, 64, 3); candidates (N, k) positions in specs."""
    asker, rng, right = Asker(specs), np.random.default_rng(seed), 0
    first = asker.tokenizer.convert_tokens_to_ids("A")
    for start in range(0, len(pixels), 128):
        part = slice(start, start + 128)
        orders = [rng.permutation(row) for row in candidates[part]]
        ids, labels = stack([asker.letter(int(order[0]), order) for order in orders])
        batch = torch.from_numpy(np.array(pixels[part])).permute(0, 3, 1, 2).float() / 127.5 - 1
        hidden, _ = forward(model, batch, ids)
        last = (labels != IGNORE).float().argmax(1) - 1
        logits = model.lm_head(hidden[torch.arange(len(last)), last])[:, first : first + candidates.shape[1]]
        picked = logits.argmax(1).numpy()
        right += sum(order[p] == t for order, p, t in zip(orders, picked, truth[part], strict=True))
    return right / len(pixels)


def save(model: LlavaForConditionalGeneration, folder: Path) -> None:
    """Write the standard transformers folder: config, bf16 weights, processor with chat template.

    The tower's tensors get the prefix `vision_model.` that checkpoints of CLIP have always had: transformers reads both names,
    vLLM only this one.
    """
    processor = LlavaProcessor(
        image_processor=CLIPImageProcessor(
            size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE}, image_mean=list(MEAN), image_std=list(STD)
        ),
        tokenizer=mllm_tokenizer(),
        patch_size=PATCH,
        vision_feature_select_strategy="full",
        num_additional_image_tokens=1,
        chat_template=TEMPLATE,
    )
    folder.mkdir(parents=True, exist_ok=True)
    model.bfloat16().save_pretrained(folder)
    processor.save_pretrained(folder)
    weights = load_file(folder / "model.safetensors")
    named = {TOWER.sub("vision_tower.vision_model.", name): tensor for name, tensor in weights.items()}
    save_file(named, folder / "model.safetensors", metadata={"format": "pt"})
    model.float()
