"""Rows of questions from `datasets` (Hugging Face) and `tensorflow_datasets`."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from seal_jax.extensions import import_optional

# The first of these that a library's dataset has is the one that is read.
SPLIT_NAMES = {"train": ("train",), "eval": ("validation", "eval", "test", "dev")}
FILE_KINDS = {".parquet": "parquet", ".jsonl": "json", ".json": "json", ".csv": "csv"}


def part(size: int, share: tuple[int, int]) -> range:
    """Return the i-th of n equal parts of so many items, for a share (i, n)."""
    i, n = share
    return range(size * i // n, size * (i + 1) // n)


def hf_items(reference: str, split: str, share: tuple[int, int]) -> Iterable[tuple[str, Any]]:
    """Return where each row stands, and the row, of NAME_OR_PATH[:CONFIG]."""
    source = f"hf:{reference}"
    datasets = import_optional("datasets", f"{source}: reading it", "datasets")
    name, _, config = reference.rpartition(":")
    if not name or Path(reference).exists():
        name, config = reference, ""
    path = Path(name)
    if not path.exists() and (name[0] in "./~" or path.suffix in FILE_KINDS):
        raise FileNotFoundError(f"{source}: no such file or folder: {name}")
    try:
        if path.is_file():
            if path.suffix not in FILE_KINDS:
                raise ValueError(f"{source}: expected a file ending in {', '.join(FILE_KINDS)}")
            kind = FILE_KINDS[path.suffix]
            loaded = datasets.load_dataset(kind, data_files=name, split="train")
        elif (path / "dataset_dict.json").exists() or (path / "state.json").exists():
            loaded = datasets.load_from_disk(name)
        else:
            loaded = datasets.load_dataset(name, config or None)
    except (FileNotFoundError, ConnectionError) as error:
        raise FileNotFoundError(f"{source}: {error}") from error
    except datasets.exceptions.DatasetsError as error:
        raise ValueError(f"{source}: {error.__cause__ or error}") from error
    if isinstance(loaded, dict):  # a DatasetDict; a Dataset has no splits and serves both
        split = _pick_split(loaded, split, source)
        loaded = loaded[split]
    indices = part(len(loaded), share)
    rows = zip(indices, loaded.select(indices), strict=True)
    return ((f"{source}: {split}[{index}]", row) for index, row in rows)


def tfds_items(reference: str, split: str, share: tuple[int, int]) -> Iterable[tuple[str, Any]]:
    """Return where each row stands, and the row, of NAME[@DATA_DIR].

    A data source needs no TensorFlow, unlike `tfds.load`, but reads no tfrecord: a dataset that is
    not there yet is downloaded and stored as array_record.
    """
    source = f"tfds:{reference}"
    library = "tensorflow_datasets"
    tfds = import_optional(library, f"{source}: reading it", library)
    name, _, data_dir = reference.partition("@")
    if data_dir and not Path(data_dir).is_dir():
        raise FileNotFoundError(f"{source}: no such folder: {data_dir}")
    try:
        builder = tfds.builder(name, data_dir=data_dir or None)
        if not builder.is_prepared():
            builder = tfds.builder(name, data_dir=data_dir or None, file_format="array_record")
            builder.download_and_prepare()
        split = _pick_split(builder.info.splits, split, source)
        rows = builder.as_data_source(split)
    except tfds.core.DatasetNotFoundError as error:
        raise FileNotFoundError(f"{source}: {str(error).strip().splitlines()[0]}") from error
    except OSError as error:
        raise FileNotFoundError(f"{source}: could not be read or downloaded: {error}") from error
    except NotImplementedError as error:
        raise ValueError(f"{source}: {error}") from error
    return ((f"{source}: {split}[{index}]", rows[index]) for index in part(len(rows), share))


def _pick_split(available: Iterable[str], split: str, source: str) -> str:
    available = list(available)
    for name in SPLIT_NAMES[split]:
        if name in available:
            return name
    raise ValueError(
        f"{source}: no split for {split!r}: looked for {', '.join(SPLIT_NAMES[split])}; "
        f"it has {', '.join(available) or 'none'}"
    )
