"""clip_benchmark's WebDataset folders: `wds_NAME/{train,test}/{nshards.txt,0.tar,1.tar,...}`, pictures with `.cls` numbers.

They bring their own class names (`classnames.txt`, a line a number) and templates (`zeroshot_classification_templates.txt`,
`{c}` stands for the name). Shards are read in the order of their numbers, and labels as numbers: ImageNet's names are not
distinct there.
"""

from __future__ import annotations

from rar import storage
from rar.corpus import tars
from rar.corpus.datasets.known import Listed, distinct, index_of
from rar.schema import UserError

SOURCE = "https://huggingface.co/clip-benchmark"


def read(name: str, folder: str, split: str) -> Listed:
    """One split. Raises UserError for a missing file or shard, and for a label that is no number of a class."""
    classes = distinct(_lines(name, folder, "classnames.txt"))
    shards = _lines(name, folder, f"{split}/nshards.txt")
    if len(shards) != 1 or not shards[0].isdigit() or shards[0] == "0":
        raise UserError(f"{name}: {folder}/{split}/nshards.txt must hold one number of shards, at least 1")
    for number in range(int(shards[0])):
        _need(name, folder, f"{split}/{number}.tar")
    uris, labels, offsets, sizes = [], [], [], []
    for number in range(int(shards[0])):
        file = f"{folder}/{split}/{number}.tar"
        with storage.explained(name, file):
            members = tars.read_members(file, (".cls",))
        for picture, offset, size in members.pictures:
            text = (members.texts.get(f"{picture.rpartition('.')[0]}.cls") or [""])[0]
            if not text.isdecimal() or int(text) >= len(classes):
                raise UserError(f"{name}: {file}: the label {text!r} of {picture} is no number below {len(classes)} of a class")
            uris.append(f"{file}#{picture}")
            labels.append(classes[int(text)])
            offsets.append(offset)
            sizes.append(size)
    return Listed(index_of(uris, labels, offsets, sizes), classes, templates(folder))


def templates(folder: str) -> list[str]:
    """The folder's own templates, with {} for the name; none where it has no file of them."""
    file = f"{folder}/zeroshot_classification_templates.txt"
    if not storage.kind_of(*storage.locate(file)):
        return []
    return [line.replace("{c}", "{}") for line in _lines("", folder, "zeroshot_classification_templates.txt")]


def _need(name: str, folder: str, file: str) -> None:
    if not storage.kind_of(*storage.locate(f"{folder}/{file}")):
        raise UserError(f"{name}: {folder}/{file} is missing; get it from {SOURCE}")


def _lines(name: str, folder: str, file: str) -> list[str]:
    _need(name, folder, file)
    with storage.open_file(f"{folder}/{file}") as stream:
        return [line.strip() for line in stream.read().decode("utf-8-sig").splitlines() if line.strip()]
