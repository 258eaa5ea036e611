"""A folder of groups that survives interruptions: Parquet shards, each complete or absent, and a manifest."""

import hashlib
import json
import os
import shutil
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Dataset, Features, config
from transformers.utils import logging


logger = logging.get_logger(__name__)

_COUNTS = b"grkd_trl.counts"


def readable_folder(folder: str | Path) -> Path:
    """
    A folder that `datasets` can read.

    Args:
        folder (`str` or `Path`):
            Folder, in which `~` is the home folder.

    Returns:
        `Path`: Its absolute path.

    Raises:
        `ValueError`: If its path holds what `datasets` reads as a pattern.
    """
    path = Path(folder).expanduser().absolute()
    if found := [mark for mark in ("*", "?", "[", "]", "::") if mark in str(path)]:
        raise ValueError(
            f"The path {path} holds {', '.join(map(repr, found))}, which `datasets` reads as a pattern, so that the groups "
            "could be written and not read. Choose another `output_dir`."
        )
    return path


def differences(made_with: Any, given: Any, name: str = "") -> list[str]:
    """
    Differences between two manifests.

    Args:
        made_with (`Any`):
            Parameters that the folder was created with.
        given (`Any`):
            Parameters of this run.
        name (`str`, *optional*, defaults to `""`):
            Name of the value, for nested ones.

    Returns:
        `list[str]`: `"name: value then, value now"` of each value that differs.
    """
    if isinstance(made_with, dict) and isinstance(given, dict):
        names = sorted({*made_with, *given})
        nested = [differences(made_with.get(key), given.get(key), f"{name}.{key}".lstrip(".")) for key in names]
        return [line for lines in nested for line in lines]
    return [] if made_with == given else [f"`{name}`: {made_with!r} then, {given!r} now"]


class Shards:
    """
    The shards of a folder. A shard is complete or absent: it is written under another name, flushed to disk and renamed.
    What was dropped and counted while it was made is stored in it, and its checksum beside it, then in the manifest.

    Args:
        folder (`str` or `Path`):
            Folder, made if need be.
        num_shards (`int`):
            Number of shards.
        manifest (`dict[str, Any]`):
            Parameters that decide the content, as JSON can hold them.
    """

    def __init__(self, folder: str | Path, num_shards: int, manifest: dict[str, Any]):
        self.folder, self.num_shards = readable_folder(folder), num_shards
        self.manifest = json.loads(json.dumps(manifest, default=str))
        self._closed: dict[str, str] | None = None

    def path(self, shard: int) -> Path:
        """
        File of a shard.

        Args:
            shard (`int`):
                Number of the shard.

        Returns:
            `Path`: The file, whether it exists or not.
        """
        return self.folder / "data" / f"groups-{shard:05d}-of-{self.num_shards:05d}.parquet"

    def open(self) -> None:
        """
        Start the folder, or resume in it.

        Raises:
            `ValueError`: If it was created with different parameters, which the message names, or its manifest is damaged.
            `OSError`: If it, or the cache of `datasets`, cannot be written to.
        """
        _check_cache()
        path = self.folder / "manifest.json"
        try:
            if path.exists():
                made_with = self._read_manifest()
                made_with.pop("counts", None)
                made_with.pop("checksums", None)
                differing = differences(made_with, self.manifest)
                if differing:
                    raise ValueError(
                        f"{self.folder} was created with different parameters: {'; '.join(differing)}. Choose another "
                        "`output_dir`, or rerun with those parameters to resume."
                    )
            else:
                (self.folder / "data").mkdir(parents=True, exist_ok=True)
                if any((self.folder / "data").glob("*.parquet")):
                    raise ValueError(
                        f"{self.folder} holds Parquet files and no manifest. Choose another `output_dir`."
                    )
                self._write_whole(path, (json.dumps(self.manifest, indent=2) + "\n").encode())
            for leftover in self.folder.rglob("*.tmp"):
                leftover.unlink()
        except OSError as error:
            raise self._explain(error) from error

    def read_counts(self, shard: int, *, verify: bool = True) -> Counter | None:
        """
        What was counted while a shard was made.

        Args:
            shard (`int`):
                Number of the shard.
            verify (`bool`, *optional*, defaults to `True`):
                Whether to read the whole shard and compare its checksum with the recorded one.

        Returns:
            `Counter`, *optional*: `None` if the shard is absent or damaged.
        """
        path = self.path(shard)
        if not path.exists():
            return None
        try:
            if verify and _checksum(path.read_bytes()) != self._recorded_checksum(shard):
                raise ValueError("its checksum is not the one that was recorded when it was written")
            return Counter(json.loads(pq.read_schema(path).metadata[_COUNTS]))
        except (pa.ArrowException, OSError, KeyError, TypeError, ValueError) as error:
            logger.warning(f"{path} is damaged and will be made again: {error}")
            return None

    def write(self, shard: int, rows: list[dict[str, Any]], features: Features, counts: Counter) -> None:
        """
        Write a shard.

        Args:
            shard (`int`):
                Number of the shard.
            rows (`list[dict]`):
                Its groups, which may be none.
            features ([`~datasets.Features`]):
                Columns, the same in every shard.
            counts (`Counter`):
                What it counted.

        Raises:
            `OSError`: If the disk is full or cannot be written to. All shards that were written are kept.
        """
        columns = {name: [row[name] for row in rows] for name in features}
        table = Dataset.from_dict(columns, features=features).data.table.combine_chunks()
        table = table.replace_schema_metadata(
            table.schema.metadata | {_COUNTS: json.dumps(dict(sorted(counts.items()))).encode()}
        )
        sink = pa.BufferOutputStream()
        pq.write_table(table, sink, compression="zstd", write_page_checksum=True)
        try:
            content = sink.getvalue().to_pybytes()
            record = self._record(shard)
            record.parent.mkdir(exist_ok=True)
            self._write_whole(record, _checksum(content).encode())  # first: a shard without one counts as damaged
            self._write_whole(self.path(shard), content)
        except OSError as error:
            raise self._explain(error) from error

    def finish(self, counts: Counter) -> None:
        """
        Close the manifest, with the checksum of each shard.

        Args:
            counts (`Counter`):
                What all shards counted.

        Raises:
            `OSError`: If it cannot be written to. All shards are kept.
        """
        checksums = {self.path(shard).name: self._recorded_checksum(shard) for shard in range(self.num_shards)}
        closed = self.manifest | {"counts": dict(sorted(counts.items())), "checksums": checksums}
        try:
            self._write_whole(self.folder / "manifest.json", (json.dumps(closed, indent=2) + "\n").encode())
        except OSError as error:
            raise self._explain(error) from error
        shutil.rmtree(self._record(0).parent, ignore_errors=True)

    def load(self) -> Dataset:
        """
        The groups of all shards.

        Returns:
            [`~datasets.Dataset`]: Group after group, in the order of the prompts.
        """
        return Dataset.from_parquet([str(self.path(shard)) for shard in range(self.num_shards)])

    def _record(self, shard: int) -> Path:
        """Where the checksum of a shard is until the manifest is closed."""
        return self.folder / ".checksums" / f"{self.path(shard).name}.sha256"

    def _recorded_checksum(self, shard: int) -> str | None:
        record = self._record(shard)
        if record.exists():
            return record.read_text(encoding="utf-8")
        if self._closed is None:
            self._closed = self._read_manifest().get("checksums", {})
        return self._closed.get(self.path(shard).name)

    def _read_manifest(self) -> dict[str, Any]:
        path = self.folder / "manifest.json"
        try:
            manifest = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            manifest = error
        if not isinstance(manifest, dict):
            raise ValueError(
                f"The manifest {path} is damaged ({manifest if isinstance(manifest, ValueError) else 'it is no JSON object'}), so what the shards beside it were made with is not known. "
                "Restore it, or choose another `output_dir`."
            )
        return manifest

    def _write_whole(self, path: Path, content: Any) -> None:
        part = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        try:
            with open(part, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            os.replace(part, path)
        except BaseException:
            part.unlink(missing_ok=True)
            raise

    def _explain(self, error: OSError) -> OSError:
        done = len(list((self.folder / "data").glob("*.parquet"))) if (self.folder / "data").is_dir() else 0
        return OSError(
            error.errno,
            f"Cannot write to {self.folder} ({error.strerror or error}). {done} of {self.num_shards} shards are "
            "finished and kept. Free some space or choose a folder that can be written to, then rerun to resume",
        )


def _checksum(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _check_cache() -> None:
    """Refuse, before anything is generated, a cache that `datasets` could not read the groups into."""
    cache = Path(config.HF_DATASETS_CACHE)
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=cache):
            pass
    except OSError as error:
        raise OSError(
            error.errno,
            f"Cannot write to {cache} ({error.strerror or error}), into which `datasets` reads the groups. Set the "
            "environment variable HF_HOME or HF_DATASETS_CACHE to a folder that can be written to",
        ) from error
