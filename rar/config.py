"""One YAML file configures every verb; unknown keys are errors that name the nearest valid key.

`load` reads YAML, applies `--set dotted.key=value` and validates.
"""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from textwrap import wrap
from typing import Any, Literal, TypeVar, get_args, get_origin

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, field_validator, model_validator
from pydantic.fields import FieldInfo

from rar import hardware
from rar.schema import UserError

LETTERS = 26  # A to Z
CREDENTIALS = re.compile(r"://[^/@\s]*:[^/@\s]*@")
PAPER_WINDOW = {"outside": "blur"}  # what the paper says of its crops, beside their growth by size; it gives no values

Checked = TypeVar("Checked", bound=BaseModel)


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    @field_validator("*", mode="before")
    @classmethod
    def _as_meant(cls, value: Any, field: ValidationInfo) -> Any:
        """`~/x` is the user's home wherever a path may stand: nothing else begins so. And yes or no is no number."""
        if any(isinstance(one, str) and CREDENTIALS.search(one) for one in (value if isinstance(value, list) else [value])):
            raise ValueError("an address with a password would lie in run folders and logs; give it by the environment")
        assert field.field_name is not None
        kind = cls.model_fields[field.field_name].annotation
        if isinstance(value, bool) and {int, float}.intersection((kind, *get_args(kind))):
            raise ValueError(f"a number is needed, and YAML reads {value} here (as of yes, no, on, off)")
        if isinstance(value, dict):
            return {key: _home(one) for key, one in value.items()}
        return _home(value)


def _home(value: Any) -> Any:
    return os.path.expanduser(value) if isinstance(value, str) and value.startswith("~/") else value


class Corpus(Strict):
    """Images to read: a folder, a manifest, WebDataset tars, parquet with bytes, or COCO/LVIS JSON; any fsspec path.

    `embeddings` brings vectors instead of images (encoder.model: precomputed): .npz, .npy with `ids`, or parquet.
    """

    uri: str = Field(
        "", description="folder (labels = sub-folder names), .csv/.tsv/.parquet table, .tar (globs allowed), .json (COCO/LVIS)"
    )
    dataset: str | None = Field(
        None, description="instead of uri: a data set by name, in its usual files; `rar data` lists them"
    )
    root: str = Field("", description="of a data set: the folder that holds the data set's folder, or that folder itself")
    split: str = Field("", description="of a data set: train, val, test, ...; a missing split file is refused")
    classes: Literal["all", "base", "novel"] = Field(
        "all", description="of a data set: base is the first half of its classes, rounded up, and novel the rest"
    )
    format: Literal["auto", "folder", "manifest", "webdataset", "parquet", "coco", "embeddings"] = Field(
        "auto", description="how to read `uri`; auto: by its suffix and content"
    )
    images: str | None = Field(
        None, description="folder of a manifest's or COCO file's relative names; default: the file's own"
    )
    uri_column: str = Field("uri", description="of a manifest or parquet: the pictures' names")
    label_column: str = Field("label", description="of a manifest or parquet: the labels")
    label_key: str | None = Field(
        None,
        description="of WebDataset tars: the member (cls, txt) or field of the .json that holds the class; default: .cls, then "
        "the .json's class_name, label, class or category, then a .txt that looks like a class",
    )
    bytes_column: str = Field("bytes", description="of a parquet: the encoded pictures")
    vector_column: str = Field("vector", description="of a parquet file of embeddings")
    ids: str | None = Field(None, description="manifest (CSV or parquet) naming the rows of an .npy of embeddings, in order")
    limit: int | None = Field(None, ge=1, description="read only the first N images, for a quick look")

    @model_validator(mode="after")
    def _one_source(self) -> Corpus:
        if bool(self.uri) == (self.dataset is not None):
            raise ValueError("give uri (where the images lie) or dataset (a name, with root and split)")
        if self.dataset is not None and not (self.root and self.split):
            raise ValueError("a dataset needs root, the folder that holds it, and split, e.g. test")
        if self.dataset is None and (self.root or self.split or self.classes != "all"):
            raise ValueError("root, split and classes belong to a dataset; a uri names its own images")
        return self


class Placed(Strict):
    """Where a model's processes run."""

    device: str = Field("auto", description="auto, cpu, cuda or mps")
    num_gpus: float | None = Field(
        None, ge=0, description="GPUs (or a fraction of one) each; default: one, where there are any"
    )
    num_cpus: float | None = Field(
        None, ge=0, description="CPUs each, on a cluster; default: one, and none beside a GPU, so that none is waited for"
    )
    resources: dict[str, float] = Field(
        {}, description='Ray\'s custom resources each, e.g. {"accelerator_type:A100": 0.001} for a kind of GPU'
    )


class Precise(Placed):
    """A model whose weights are narrowed where that is fast."""

    precision: Literal["auto", "fp32", "bf16", "fp16"] = Field(
        "auto",
        description="of the weights; auto: bf16 where the GPU or processor of the machine that starts the command multiplies "
        "it (fp32 for a miniature), else fp32, which is exact",
    )

    @model_validator(mode="before")
    @classmethod
    def _as_the_machine_has_it(cls, data: Any) -> Any:
        """`auto` is gone once a config is read (hardware): what is kept and sent says which numbers it means."""
        if not isinstance(data, dict) or data.get("precision", "auto") != "auto":
            return data
        model, device, gpus = (data.get(key, cls.model_fields[key].default) for key in ("model", "device", "num_gpus"))
        exact = model in ("miniature", "precomputed") or data.get("method") in ("none", "endpoint")
        where = "cpu" if device == "auto" and gpus == 0 else device  # a process that is given no GPU sees none
        return {**data, "precision": "fp32" if exact else hardware.native(where)}


class Encoder(Precise):
    """The CLIP that embeds images and class names."""

    model: str = Field(
        "miniature",
        description="open_clip 'architecture/pretrained' or local open_clip folder; 'timm/NAME' or a local timm folder (images "
        "alone); 'miniature'; or 'precomputed': the corpora hold embeddings",
    )
    source: str = Field("", description="for precomputed embeddings: a name of what made them, part of the fingerprint")
    batch_size: int = Field(64, ge=1, description="images per forward pass")
    templates: str | list[str] = Field(
        ["a photo of a {}."], min_length=1, description="averaged into one prototype a class; or a data set's name, e.g. pets"
    )
    descriptions: str | None = Field(None, description='JSON of {"class name": ["sentence", ...]}, averaged into prototypes')
    views: Literal["one", "flip", "crops"] = Field(
        "one", description="of a query image, averaged: crops are five and their flips"
    )
    scaled_decode: bool = Field(
        False,
        description="decode large JPEGs at 1/2 to 1/8 of their size, as far as the input allows: cheaper, but embeddings move "
        "(cosine below .999 for some photos)",
    )
    compile: bool = Field(False, description="torch.compile: slow to start, faster on long runs")
    workers: int = Field(1, ge=1, description="processes that embed at the same time, at least")
    max_workers: int | None = Field(None, ge=1, description="at most, while pictures wait for them; default: `workers`")


class Index(Strict):
    """The index inside Milvus. FLAT is exact; HNSW is for large memories; HNSW_SQ8 keeps a byte a dimension, on newer servers.

    REDUCED is the paper's 1/9: HNSW over a fitted projection to d/9, and the shortlist rescored with the full vectors.
    """

    kind: Literal["auto", "FLAT", "HNSW", "HNSW_SQ8", "REDUCED"] = Field(
        "auto", description="auto: FLAT for small memories, HNSW for large ones"
    )
    m: int = Field(16, ge=4, le=64, description="HNSW: links a vector keeps")
    ef_construction: int = Field(200, ge=8, le=512, description="HNSW: breadth of the search while building")
    ef: int = Field(128, ge=8, description="HNSW: breadth of the search while asking; more finds more, slower")
    reduction: int = Field(9, ge=2, description="of REDUCED: the graph holds vectors of 1/reduction of the dimensions")
    shortlist: int = Field(30, ge=1, description="of REDUCED: neighbors rescored for each one returned")


class Memory(Strict):
    """The external memory: image entries (few-shot) and text entries (zero-shot) in Milvus collections."""

    name: str = Field("memory", pattern=r"^[A-Za-z_][A-Za-z0-9_]{0,63}$", description="of the memory inside Milvus")
    uri: str = Field("runs/memory.milvus", description="a folder (Milvus Lite), or http(s)://host:port of a Milvus server")
    token: str | None = Field(None, description="server credentials; default: the environment's MILVUS_TOKEN")
    support: Corpus | None = Field(
        None,
        description="labelled support images, or boxes (COCO, LVIS, V3Det .json; .parquet of uri, label and box_xyxy or bbox), "
        "which are cut out by detect.crop; none: a text memory",
    )
    min_side: float = Field(8, ge=0, description="of support boxes: those with a shorter side of fewer pixels are left out")
    shots: int | None = Field(None, ge=1, description="images per class drawn from `support` with the run's seed; default all")
    draw: Literal["random", "first"] = Field(
        "random",
        description="which `shots`: by the run's seed, those of fewer shots among them; or each class's first, as listed",
    )
    classes: str | list[str] | None = Field(
        None, description="class names, or a file with one a line; default: the support's labels, or its data set's classes"
    )
    class_embeddings: str | None = Field(
        None, description="with precomputed embeddings: .npy of (classes, D) text vectors in the order of `classes`"
    )
    version: int | None = Field(
        None, ge=1, description="a snapshot to read (`rar memory --snapshot`); default: the live memory"
    )
    index: Index = Index()


class Retriever(Strict):
    """Proposes candidates. `all` proposes the whole vocabulary (the MLLM-only arm)."""

    mode: Literal["fused", "text", "knn", "centroid", "tip", "lda", "all"] = Field(
        "fused", description="fused weighs text and images as fitted on the memory; all proposes every class"
    )
    top_k: int = Field(5, ge=1, le=1000, description="candidates kept per image")
    n_neighbors: int = Field(20, ge=1, le=16384, description="search depth of `knn` and `tip`")
    sharpness: float | None = Field(
        None, gt=0, description="of the votes of `knn` and `tip`; default: fitted on the memory; 1000: the nearest alone counts"
    )


class Ranker(Precise):
    """The MLLM that ranks candidates. `none` keeps the retriever's order; `endpoint` asks an OpenAI-compatible server."""

    model: str = Field(
        "miniature",
        description="hub name or local folder of an image-text-to-text model, 'miniature', or the endpoint's model name",
    )
    method: Literal["letters", "likelihood", "yes_no", "first", "generate", "endpoint", "none"] = Field(
        "letters",
        description="letters reads one token; generate is the paper's free text, first its first name; none keeps the "
        "retriever's order",
    )
    prompts: str | None = Field(None, description="YAML of prompt templates; default: the built-in ones")
    none_of_these: bool = Field(False, description="letters: one more label for an image that shows no candidate")
    image_processor: dict[str, Any] = Field(
        {},
        description="of the model's image processor, in its own words, and so how many tokens a picture takes: e.g. "
        "{max_pixels: 401408} (Qwen), {max_patches: 4} (InternVL), {do_image_splitting: false} (SmolVLM)",
    )
    exemplars: int = Field(0, ge=0, le=4, description="pictures of each candidate from the image memory, shown beside its name")
    permutations: int = Field(1, ge=1, le=26, description="rotations of the candidates whose letter scores are averaged")
    debias: Literal["none", "prior"] = Field(
        "none", description="prior: divide by the label prior of a small unlabelled sample"
    )
    adapter: str | None = Field(None, description="folder of a LoRA adapter (peft)")
    quantization: Literal["none", "int8", "int4"] = Field("none", description="of the weights, by bitsandbytes")
    batch_size: int = Field(32, ge=1, description="images per forward pass, and per request to a replica")
    max_new_tokens: int = Field(256, ge=1, description="generate, endpoint: longest reply")
    trust_remote_code: bool = Field(False, description="run code that a model's folder brings along")
    base_url: str | list[str] | None = Field(
        None,
        description="endpoint: e.g. http://host:8000/v1, or several servers of one model; key: the environment's RAR_API_KEY",
    )
    engine: Literal["vllm", "sglang", "transformers"] | None = Field(
        None, description="endpoint: instead of base_url, an engine whose min_replicas servers the command starts and ends"
    )
    engine_args: dict[str, Any] = Field(
        {}, description="of the engine's own server, e.g. {tensor_parallel_size: 2, max_model_len: 8192}; see its manual"
    )
    tokenizer: str | None = Field(
        None, description="endpoint: folder or hub name of the model's tokenizer, for servers that have no /tokenize"
    )
    concurrency: int = Field(
        64, ge=1, description="endpoint: most requests a worker keeps in flight at each server; fewer where it does not keep up"
    )
    max_calls: int | None = Field(
        None, ge=1, description="endpoint: calls that a run may make each time it is started; then it stops, to be resumed"
    )
    token_budget: int | None = Field(
        None,
        ge=1,
        description="endpoint: tokens, read and written, after which a run begins no more shards; then it stops, to be resumed",
    )
    timeout_s: float = Field(60.0, gt=0, description="endpoint: of one request")
    attempts: int = Field(5, ge=1, description="endpoint: tries of one request before its image is a fallback")
    cache: str | None = Field(None, description="folder of answers by content, shared by runs; deterministic requests only")
    min_replicas: int = Field(1, ge=1, description="replicas of the ranker that stay up")
    max_replicas: int = Field(1, ge=1, description="replicas of the ranker under load")
    num_gpus: float | None = Field(
        0.0, ge=0, description="GPUs (or a fraction of one) per replica; null: one, where there are any"
    )
    keep: bool = Field(
        False, description="on a cluster: the application outlives the job, for others, without replicas while nobody asks"
    )
    in_flight: int = Field(4, ge=1, description="batches each pipeline worker keeps in flight at the replicas of a local model")

    @property
    def starts_models(self) -> bool:
        """Whether a command that ranks starts processes with the model."""
        return self.engine is not None or self.method not in ("none", "endpoint")


class Route(Strict):
    """Whether the MLLM is asked and how its answer is used.

    `calibrated`: fusion weights and the routing threshold are fitted on the memory's own entries (leave-one-out).
    `always`: the MLLM is asked for every image and its order is final, as in the paper.
    """

    mode: Literal["calibrated", "always"] = Field(
        "calibrated",
        description="calibrated: ask only where it pays, as fitted on the memory; always: every image, as in the paper",
    )
    coverage: float | None = Field(
        None,
        gt=0,
        lt=1,
        description="conformal: show the ranker as few candidates as hold the truth this often; default: top_k",
    )
    max_calibration_images: int = Field(
        1024, ge=0, description="entries of the memory that the fit may use; 0: no fit with the MLLM"
    )


class Window(Strict):
    """What is cut out around a box (paper 3.2): grown, squared, resized, hidden outside."""

    size: int | None = Field(None, ge=16, description="side of the square crop in pixels; default: the encoder's input")
    outside: Literal["blur", "grey", "none", "black"] = Field(
        "grey", description="what stands around the box: blurred, grey or black, or none: left as it is"
    )


class Crop(Window):
    """What the retriever sees of a box, and of the support boxes of a memory. `paper` is the paper's own setting."""

    views: list[Literal["adaptive", "tight", "context"]] = Field(
        ["adaptive"], min_length=1, max_length=3, description="windows averaged by the retriever"
    )

    def sized(self, side: int) -> Crop:
        """With the encoder's side, where none is set."""
        return self if self.size is not None else self.model_copy(update={"size": side})


class Shown(Window):
    """What the ranker sees of a box: a model that reads may need more pixels, or more around the box, than a retriever."""

    size: int = Field(336, ge=16, description="side of the square crop in pixels")
    outside: Literal["blur", "grey", "none", "black"] = Field("blur", description="what stands around the box, as of crop")
    view: Literal["adaptive", "tight", "context"] = Field("adaptive", description="the window, as of crop.views")


class Detector(Placed):
    """A class-agnostic proposal stage of our own: an open detector of transformers."""

    model: str = Field(description="hub name or local folder of a Grounding DINO, MM-Grounding DINO or OWLv2 model")
    prompt: str = Field("object", description="what Grounding DINO is asked for; OWLv2's objectness needs none")
    threshold: float = Field(0.05, ge=0, le=1, description="least score of a box")
    nms_iou: float = Field(0.7, gt=0, le=1, description="of two boxes that overlap more, the better one stays")
    batch_size: int = Field(8, ge=1, description="images per forward pass")
    precision: Literal["fp32", "bf16", "fp16"] = Field("fp32", description="of the weights on a GPU")
    workers: int = Field(1, ge=1, description="processes that detect at the same time, at least")
    max_workers: int | None = Field(None, ge=1, description="at most, while pictures wait for them; default: `workers`")


class Detect(Strict):
    """Boxes to recognise: the corpus' own ground-truth boxes, or a detector's proposals."""

    proposals: str | None = Field(
        None, description="COCO-results JSON or parquet; default: the ground-truth boxes of the corpus"
    )
    detector: Detector | None = Field(None, description="makes the proposals itself, instead of `proposals`")
    proposal_scores: Literal["probability", "logit"] = Field(
        "probability", description="what the scores of `proposals` are; logits become probabilities by a sigmoid"
    )
    style: Literal["coco", "lvis", "v3det"] = Field("coco", description="definition of AP")
    crop: Crop = Crop()
    shown: Shown = Shown()
    max_boxes: int = Field(300, ge=1, description="proposals kept per image, best first")
    classes_per_box: int = Field(5, ge=1, description="candidates of a box that become detections")
    score: Literal["product", "geometric", "class", "proposal"] = Field(
        "product", description="how proposal score and class probability make a detection's score"
    )

    @field_validator("crop", "shown", mode="before")
    @classmethod
    def _preset(cls, value: Any) -> Any:
        """`paper`: grown by the object's size and blurred outside, for retriever and ranker alike (RAR 3.2)."""
        return dict(PAPER_WINDOW) if value == "paper" else value


class Serve(Strict):
    """`rar serve`: the HTTP API. Its bearer token, where it asks for one, is the environment's RAR_API_TOKEN."""

    host: str = Field("127.0.0.1", description="address to listen on; any but loopback needs RAR_API_TOKEN")
    port: int = Field(8000, ge=1, le=65535, description="to listen on")
    endpoints: list[Literal["rank", "recognize", "detect"]] = Field(
        ["rank", "recognize", "detect"], min_length=1, description="`rank` alone needs no memory"
    )
    url_prefixes: list[str] = Field([], description="images may be named by URLs that begin so; default: no URL is fetched")
    max_body_bytes: int = Field(16 << 20, ge=1024, description="of one request; larger ones are refused unread")
    max_pixels: int = Field(50_000_000, ge=1, description="of one picture")
    max_candidates: int = Field(100, ge=1, description="names in one request")
    max_boxes: int = Field(100, ge=1, description="boxes in one request")
    max_pictures: int = Field(32, ge=1, description="pictures in one request")
    support_pictures: int = Field(
        2, ge=0, le=8, description="pictures of the memory that the page shows beside a name; 0: none can be seen"
    )
    adapters: dict[str, str] = Field({}, description="name a request may ask for -> folder of a LoRA adapter")
    max_queued: int = Field(256, ge=0, description="requests a gateway keeps waiting; beyond, 429 with Retry-After")
    timeout_s: float = Field(60.0, gt=0, description="of one request, waiting included; beyond, 503")
    min_gateways: int = Field(1, ge=1, description="HTTP gateways that stay up")
    max_gateways: int = Field(1, ge=1, description="HTTP gateways under load")
    upscale_delay_s: float = Field(10.0, ge=0, description="load must last this long before a replica is added")
    downscale_delay_s: float = Field(120.0, ge=0, description="quiet must last this long before a replica is taken away")

    @property
    def recognizes(self) -> bool:
        return bool({"recognize", "detect"} & set(self.endpoints))


class Tune(Strict):
    """`rar tune`: fine-tuning the ranker on lists that the retriever confuses, judged before and after."""

    preset: Literal["rar", "paper-code", "paper-text"] = Field(
        "rar", description="how lists are made; paper-*: windows of five over 20 neighbors, for ranker.method generate or first"
    )
    corpus: Corpus | None = Field(None, description="labelled pictures to learn from; default: memory.support")
    others: dict[str, str] = Field({}, description="more data sets to judge by: name -> their config (corpus and memory)")
    novel_classes: float = Field(
        0.2, ge=0, lt=1, description="share of the classes kept out of training, to judge by as `novel`"
    )
    held_out: float = Field(
        0.2,
        gt=0,
        lt=1,
        description="share of the other classes' pictures kept out: half to stop by, half to judge by as `seen`",
    )
    judged: int = Field(400, ge=1, description="pictures of a set that are judged, at most")
    lengths: list[int] = Field([], description="further lengths of lists to judge at; default: retriever.top_k alone")
    max_list: int | None = Field(None, ge=2, description="longest list trained on; default: retriever.top_k")
    easy: float = Field(
        0.3, ge=0, le=1, description="share of pictures of which the retriever is right anyway, as far as there are others"
    )
    rejections: float = Field(
        0.15, ge=0, lt=0.5, description="letters: share of lists without the truth, whose answer is `none of these`"
    )
    shuffle: bool = Field(True, description="whether candidates stand in random order; else in the retriever's")
    loss: Literal["labels", "text"] = Field(
        "labels", description="of what ranking reads among the listed labels or names, or of the reply as text; paper-*: text"
    )
    anchor: float = Field(
        0.0,
        ge=0,
        description="weight of the KL divergence from the untuned model's words for two listed names: keeps what it knew",
    )
    mass: float = Field(0.2, ge=0, description="of labels: weight of the loss that draws the reply's first token to some label")
    listwise: float = Field(
        0.0, ge=0, description="of labels: weight of RankNet over all pairs, the truth first, then the retriever's order"
    )
    weights: Literal["lora", "full"] = Field("lora", description="what is trained; full writes a model instead of an adapter")
    vision: Literal[False, True, "only"] = Field(
        False,
        description="train what sees (tower and projector), too; only: it alone, for pictures in other light, of another kind",
    )
    lora_rank: int = Field(32, ge=1, description="rank of the adapter")
    lora_alpha: int = Field(64, ge=1, description="its scale; updates are multiplied by lora_alpha / lora_rank")
    learning_rate: float = Field(1e-4, gt=0, description="highest; warmed up, then falling as a cosine")
    epochs: int = Field(1, ge=1, description="times that each picture is shown, about; every time with another list")
    max_steps: int | None = Field(None, ge=1, description="train for so many steps instead, however many epochs that is")
    batch_size: int = Field(32, ge=1, description="lists per step, over all workers")
    accumulate: int = Field(1, ge=1, description="forward passes that a worker's part of a step is cut into")
    check_every: int = Field(50, ge=1, description="steps between checkpoints, each judged on pictures kept out")
    gradient_checkpointing: bool = Field(False, description="compute activations twice instead of keeping them")
    workers: int = Field(1, ge=1, description="processes that train together")
    num_gpus: float | None = Field(None, ge=0, description="GPUs of each worker; default: one, where there are any")
    merged: bool = Field(False, description="also write the model with the adapter merged, for servers that load no adapters")


class Run(Strict):
    """How a run is cut into pieces, drawn and judged."""

    shard_size: int = Field(256, ge=1, description="images per shard: the unit of work, of writing and of resuming")
    max_failed_fraction: float = Field(0.05, ge=0, le=1, description="a run with more failed rows ends with exit code 3")
    seed: int = Field(0, description="of every draw: shots, splits, calibration")
    patience_s: float = Field(
        300.0, gt=0, description="how long a model, Milvus, a replica of the ranker or an answer is waited for"
    )
    vocabulary_free: bool = Field(
        False,
        description="the memory's names are guesses: metrics.json has cluster_accuracy and semantic_similarity, too",
    )
    sentence_encoder: str | None = Field(
        None,
        description="of vocabulary_free: folder of a sentence encoder (transformers or sentence-transformers) that judges "
        "semantic_similarity; default: the encoder's text tower, where it has one",
    )


class Config(Strict):
    corpus: Corpus | None = None
    memory: Memory = Memory()
    encoder: Encoder = Encoder()
    retriever: Retriever = Retriever()
    ranker: Ranker = Ranker()
    route: Route = Route()
    detect: Detect = Detect()
    serve: Serve = Serve()
    tune: Tune = Tune()
    run: Run = Run()

    @model_validator(mode="after")
    def _fits_together(self) -> Config:
        """Settings that contradict each other, each in one line that says what to change."""
        if self.encoder.model == "precomputed" and self.ranker.method != "none":
            raise ValueError("encoder.model precomputed leaves no pictures to rank: set ranker.method: none")
        if self.route.coverage is not None and self.route.mode == "always":
            raise ValueError("route.coverage needs route.mode: calibrated")
        if self.detect.proposals is not None and self.detect.detector is not None:
            raise ValueError("set detect.proposals (a file) or detect.detector (a model), not both")
        shown = self.retriever.top_k + self.ranker.none_of_these
        if self.ranker.method == "letters" and self.retriever.mode != "all" and shown > LETTERS:
            raise ValueError(
                f"ranker.method letters has {LETTERS} labels, too few for retriever.top_k {self.retriever.top_k}"
                f"{' with ranker.none_of_these' * self.ranker.none_of_these}: lower it, or set ranker.method to likelihood"
            )
        if self.ranker.method == "endpoint" and (self.ranker.base_url is None) == (self.ranker.engine is None):
            raise ValueError("ranker.method endpoint needs ranker.base_url, e.g. http://host:8000/v1, or ranker.engine")
        if self.ranker.engine is not None and self.ranker.method != "endpoint":
            raise ValueError("ranker.engine is of ranker.method endpoint")
        return self


class KeyTwice(Exception):
    """One mapping holds a key twice; YAML itself would forget the first."""


class UniqueKeys(yaml.SafeLoader):
    """YAML in which nothing is lost in silence. Raises KeyTwice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        lines: dict[str, int] = {}
        for key, _ in node.value:
            line = key.start_mark.line + 1
            if key.value != "<<" and isinstance(key, yaml.ScalarNode) and lines.setdefault(key.value, line) != line:
                raise KeyTwice(f"{key.value!r} stands twice, in lines {lines[key.value]} and {line}; put both parts under one")
        return super().construct_mapping(node, deep)


def load(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Read a YAML config and apply overrides of the form `dotted.key=value` (values are YAML). Raises UserError."""
    return validated(Config, read(path), overrides)


def read(path: str | Path) -> dict[str, Any]:
    """The mapping in a YAML file, as it stands. Raises UserError."""
    file = Path(path)
    if not file.is_file():
        raise UserError(f"config file not found: {path}")
    try:
        data = yaml.load(file.read_text(encoding="utf-8-sig"), UniqueKeys) or {}
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError, ValueError) as error:
        raise UserError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from None
    except KeyTwice as error:
        raise UserError(f"{path}: {error}") from None
    if not isinstance(data, dict):
        raise UserError(f"{path} must hold a mapping of settings, not a {type(data).__name__}")
    return data


def validated(model: type[Checked], data: dict[str, Any], overrides: Sequence[str] = ()) -> Checked:
    """Apply overrides to a mapping and validate it as a model of settings. Raises UserError with one line
    per mistake's first cause."""
    for override in overrides:
        key, equals, value = override.partition("=")
        if not equals:
            raise UserError(f"--set needs dotted.key=value, got {override!r}")
        try:
            _assign(data, key.strip().split("."), yaml.load(value, UniqueKeys))
        except (yaml.YAMLError, RecursionError, ValueError):
            raise UserError(f"--set {key}: {value!r} is not valid YAML; put it in quotes") from None
        except KeyTwice as error:
            raise UserError(f"--set {key}: {error}") from None
    try:
        return model.model_validate(data)
    except ValidationError as error:
        raise UserError(_explain(error, model)) from None


def _assign(data: dict[str, Any], keys: list[str], value: Any) -> None:
    for key in keys[:-1]:
        data = data.setdefault(key, {})
        if not isinstance(data, dict):
            raise UserError(f"--set {'.'.join(keys)}: {key!r} is a value, not a section")
    data[keys[-1]] = value


def _explain(error: ValidationError, model: type[BaseModel]) -> str:
    """The first fault in plain words; for an unknown key, the nearest valid one."""
    faults = error.errors()
    fault = next((one for one in faults if _no_text(one)), faults[0])
    where = ".".join(str(part) for part in fault["loc"] if part not in ("[key]", "str", "list[str]"))
    if _no_text(fault):
        return (
            f"config: {where}: YAML reads {fault['input']!r} here, which is no text; put it in quotes, "
            'as in ["yes", "no"] (so too on, off, true, false, null, numbers and dates)'
        )
    if not where:
        return f"config: {fault['msg'].removeprefix('Value error, ')}"
    if fault["type"] != "extra_forbidden":
        given = CREDENTIALS.sub("://***@", repr(fault.get("input")))
        return f"config: {where}: {fault['msg'].removeprefix('Value error, ')}, got {given}"
    nearest = difflib.get_close_matches(where, _known_keys(model), n=1, cutoff=0.0)
    return f"config: unknown key {where!r}; did you mean {nearest[0]!r}?"


def _no_text(fault: Any) -> bool:
    """Whether a fault is a value that YAML made of an unquoted word (yes, no, on, off, 12, 2024-01-01)."""
    value = fault.get("input")
    return fault["type"] in ("string_type", "invalid_key") and not isinstance(value, str | list | dict | BaseModel)


def reference() -> str:
    """Every key with its default and meaning, as YAML that loads as the defaults; sections that are off are comments."""
    return "# Every key of a config, with its default. A file holds only what it changes.\n" + "\n".join(_lines(Config, ""))


def _lines(model: type[BaseModel], indent: str) -> Iterator[str]:
    inherited = [name for name in model.model_fields if name not in model.__annotations__]
    for name in [*model.__annotations__, *inherited]:
        field = model.model_fields.get(name)
        if field is None:
            continue
        kinds = (field.annotation, *getattr(field.annotation, "__args__", ()))
        section = next((kind for kind in kinds if isinstance(kind, type) and issubclass(kind, Strict)), None)
        if section is None:
            yield from wrap(_meaning(field), 118, initial_indent=f"{indent}# ", subsequent_indent=f"{indent}# ")
            yield f"{indent}{name}: {_shown(field)}"
            continue
        if not indent:
            yield ""
        what = field.description or " ".join((section.__doc__ or "").split("\n\n")[0].split())
        yield from wrap(what, 118, initial_indent=f"{indent}# ", subsequent_indent=f"{indent}# ")
        yield f"{indent}{name}:" if field.default is not None else f"{indent}# {name}:"
        if field.default is not None:
            yield from _lines(section, f"{indent}  ")
        elif section is Corpus and model is not Config:
            yield f"{indent}#   (the keys of corpus)"
        else:
            yield from (f"{indent}# {line}" for line in _lines(section, "  "))


def _meaning(field: FieldInfo) -> str:
    """The description, and the choices where there are some."""
    kinds = (field.annotation, *getattr(field.annotation, "__args__", ()))
    choices = next((kind.__args__ for kind in kinds if get_origin(kind) is Literal), ())
    return f"{field.description}" + (f" ({', '.join(map(str, choices))})" if choices else "")


def _shown(field: FieldInfo) -> str:
    """A default in one line of YAML."""
    value = "..." if field.is_required() else field.default
    return yaml.safe_dump(value, default_flow_style=True, width=10**6).removesuffix("\n").removesuffix("\n...")


def _known_keys(model: type[BaseModel], prefix: str = "") -> list[str]:
    keys: list[str] = []
    for name, field in model.model_fields.items():
        keys.append(prefix + name)
        for kind in (field.annotation, *getattr(field.annotation, "__args__", ())):
            if isinstance(kind, type) and issubclass(kind, Strict):
                keys += _known_keys(kind, f"{prefix}{name}.")
    return keys
