"""ImageNet and its variants: one folder a class, named by WordNet id; `classnames.txt` has CLIP's name for each.

ImageNet-V2 names its folders by the class's place in that file instead (0 to 999). -A and -R have folders for 200 of the
classes and are numbered anew, so that their vocabulary is these 200.
"""

from __future__ import annotations

import pyarrow as pa
import pyarrow.compute as pc

from rar.config import Corpus
from rar.corpus import listing
from rar.corpus.datasets.known import Listed, Place, distinct


def read_folders(place: Place) -> Listed:
    """Pictures sorted by folder and name; classes are the folders that hold pictures, in the order of their ids."""
    rows = [line.partition(" ") for line in place.lines(place.labels)]
    names = dict(zip((wnid for wnid, _, _ in rows), distinct(name for _, _, name in rows), strict=True))
    index = listing.list_images(Corpus(uri=f"{place.folder}/{place.pictures}", format="folder"))
    folders = [folder for folder in index["label"].unique().to_pylist() if folder is not None]
    by_place = all(folder.isdigit() for folder in folders)
    name_of = {str(number): name for number, name in enumerate(names.values())} if by_place else names
    if strange := [folder for folder in folders if folder not in name_of]:
        raise place.fault(place.labels, f"has no name for the folder {strange[0]} of {place.pictures}")
    ordered = sorted(folders, key=int if by_place else None)
    codes = pc.index_in(index["label"], value_set=index["label"].unique())
    labels = pc.take(pa.array([name_of.get(folder) for folder in index["label"].unique().to_pylist()]), codes)
    index = index.set_column(index.schema.get_field_index("label"), "label", labels)
    return Listed(index, [name_of[folder] for folder in ordered], place.known.templates)
