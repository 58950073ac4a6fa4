"""What of a ranker's settings training keeps, and what cannot be trained."""

from __future__ import annotations

from rar.config import LETTERS, Config, Ranker
from rar.schema import UserError


def bare(settings: Config) -> Ranker:
    """The ranker that is trained: asked once a list. Raises UserError for what cannot be trained."""
    ranker, tune, top_k = settings.ranker, settings.tune, settings.retriever.top_k
    if ranker.method == "yes_no":
        raise UserError("rar tune trains ranker.method letters, first, likelihood or generate, not yes_no")
    if ranker.adapter is not None:
        raise UserError("rar tune begins with the model itself: leave ranker.adapter out, or name a merged model")
    if ranker.quantization != "none" or ranker.exemplars:
        raise UserError("rar tune trains models that are not quantised, without exemplars: leave both out of ranker")
    if ranker.precision == "fp16":
        raise UserError("ranker.precision fp16 overflows in training: use bf16, or fp32")
    if tune.preset != "rar" and ranker.method not in ("generate", "first"):
        raise UserError(f"tune.preset {tune.preset} trains the sorted list as text: set ranker.method: generate (or first)")
    if tune.anchor and tune.weights == "full":
        raise UserError("tune.anchor needs the model as it was, which tune.weights full does not keep: set tune.weights: lora")
    prefixed = tune.loss == "labels" and ranker.method != "letters" and tune.preset == "rar"
    if tune.gradient_checkpointing and (prefixed or tune.anchor):
        raise UserError(
            "tune.gradient_checkpointing keeps no prefix of a prompt, which names as labels and tune.anchor need: leave it "
            "out, or set tune.loss: text and tune.anchor: 0"
        )
    longest = max([tune.max_list or top_k, *tune.lengths]) + 1  # and "none of these"
    if ranker.method == "letters" and longest > LETTERS:
        raise UserError(
            f"rar tune labels up to {LETTERS - 1} candidates and `none of these`: lower retriever.top_k, tune.max_list and "
            "tune.lengths, or set ranker.method: generate"
        )
    precision = "fp32" if tune.weights == "full" else ranker.precision  # bf16 then comes by autocast
    plain = {"permutations": 1, "debias": "none", "cache": None, "none_of_these": False, "precision": precision}
    return ranker.model_copy(update=plain)
