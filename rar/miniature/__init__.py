"""The miniature world: rendered fine-grained images, and the small CLIP and MLLM trained on them."""

from pathlib import Path

WEIGHTS = Path(__file__).parent / "weights"
CLIP = WEIGHTS / "clip"
MLLM = WEIGHTS / "mllm"
