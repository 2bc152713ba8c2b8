"""Data sets of TensorFlow Datasets, with random access and without TensorFlow.

The data set must be prepared as ArrayRecord: `tfds.data_source` supports random access for this format only. The
package is an extra (`pip install -e '.[tfds]'`) and is imported when such a source is built.
"""

import os
from collections.abc import Iterator

import numpy as np
from PIL import Image

from hybridgen.core.errors import UserError
from hybridgen.data import storage, transforms
from hybridgen.data.sources.folder import MAX_TEXT
from hybridgen.data.sources.protocol import BrokenRecord, known


class Tfds:
    """path: folder of a prepared data set (with dataset_info.json), or a name such as "mnist:3.0.1" with `data_dir`.

    image_key, text_key, label_key: the features with the image, the caption (None: no captions) and the class (None: no
    classes). splits: pairs of our and the data set's split, for other names or slices, such as (("validation",
    "train[90%:]"),). Items have the entries of a folder's. Raises UserError for a missing data set, split or feature.
    """

    def __init__(
        self,
        path: str,
        *,
        split: str = "train",
        resolution: int,
        data_dir: str | None = None,
        image_key: str = "image",
        text_key: str | None = None,
        label_key: str | None = None,
        splits: tuple[tuple[str, str], ...] = (),
    ):
        try:
            import tensorflow_datasets as tfds
        except ImportError as error:
            raise UserError(
                f"data.source 'tfds' needs tensorflow-datasets: pip install -e '.[tfds]' ({error})"
            ) from None
        self.resolution, self.image_key, self.text_key, self.label_key = resolution, image_key, text_key, label_key
        theirs = dict(splits).get(split, split)
        try:
            if os.path.isdir(path):
                builder = tfds.builder_from_directory(path)
                self._data = builder.as_data_source(theirs)
            else:
                builder = tfds.builder(path, data_dir=data_dir)
                self._data = tfds.data_source(path, split=theirs, data_dir=data_dir, download=False)
        except Exception as error:  # of many types, with a message for the user
            if storage.passing(error):
                raise
            raise UserError(
                f"no data set {path!r} with a split {theirs!r}: {' '.join(str(error).split())[:300]}"
            ) from None
        features = builder.info.features
        for key in filter(None, (image_key, text_key, label_key)):
            known(f"feature of {builder.info.name!r}:", [key], list(features))
        names = getattr(features[label_key], "names", None) if label_key else None
        self.class_names = list(names or range(getattr(features[label_key], "num_classes", 0))) if label_key else []
        self.identity = f"{builder.info.full_name} {theirs}"

    def __len__(self) -> int:
        return len(self._data)

    def name(self, index: int) -> str:
        """The name of a record: the data set and the record's number."""
        return f"{self.identity} number {index}"

    def digest(self) -> str:
        """Name, version and split: a prepared version does not change."""
        return self.identity

    def captions(self) -> Iterator[str]:
        """All captions; this decodes the records with their images."""
        for index in range(len(self) if self.text_key else 0):
            yield self._text(self._data[index])

    def _text(self, record: dict) -> str:
        value = record[self.text_key]
        return (value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value))[:MAX_TEXT]

    def __getitem__(self, index: int) -> dict:
        try:
            record = self._data[index]
            pixels = np.asarray(record[self.image_key])
            image = Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels)
            item = {
                "image": transforms.square(transforms.flatten(image), self.resolution),
                "text": self._text(record) if self.text_key else "",
            }
            return item | ({"label": int(record[self.label_key])} if self.label_key else {})
        except Exception as error:  # decoders raise exceptions of many types for broken data
            if storage.passing(error):
                raise
            reason = f"{type(error).__name__}: {error}"
        raise BrokenRecord(f"{self.name(index)}: {' '.join(reason.split())[:200]}")
