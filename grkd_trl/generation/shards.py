"""A folder of groups that survives interruptions: Parquet shards, each complete or absent, and a manifest."""

import json
import os
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Dataset, Features
from transformers.utils import logging


logger = logging.get_logger(__name__)

_COUNTS = b"grkd_trl.counts"


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
    What was dropped and counted while it was made is stored in it.

    Args:
        folder (`str` or `Path`):
            Folder, made if need be.
        num_shards (`int`):
            Number of shards.
        manifest (`dict[str, Any]`):
            Parameters that decide the content, as JSON can hold them.
    """

    def __init__(self, folder: str | Path, num_shards: int, manifest: dict[str, Any]):
        self.folder, self.num_shards = Path(folder), num_shards
        self.manifest = json.loads(json.dumps(manifest, default=str))

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
            `ValueError`: If it was created with different parameters; the message names them.
            `OSError`: If it cannot be written to.
        """
        path = self.folder / "manifest.json"
        try:
            if path.exists():
                made_with = json.loads(path.read_text(encoding="utf-8"))
                made_with.pop("counts", None)
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
                Whether to read the whole shard and verify its checksums.

        Returns:
            `Counter`, *optional*: `None` if the shard is absent or damaged.
        """
        path = self.path(shard)
        if not path.exists():
            return None
        try:
            if verify:
                pq.read_table(path, page_checksum_verification=True)
            return Counter(json.loads(pq.read_schema(path).metadata[_COUNTS]))
        except (pa.ArrowException, OSError, KeyError, ValueError) as error:
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
            self._write_whole(self.path(shard), sink.getvalue())
        except OSError as error:
            raise self._explain(error) from error

    def finish(self, counts: Counter) -> None:
        """
        Close the manifest.

        Args:
            counts (`Counter`):
                What all shards counted.
        """
        closed = self.manifest | {"counts": dict(sorted(counts.items()))}
        self._write_whole(self.folder / "manifest.json", (json.dumps(closed, indent=2) + "\n").encode())

    def load(self) -> Dataset:
        """
        The groups of all shards.

        Returns:
            [`~datasets.Dataset`]: Group after group, in the order of the prompts.
        """
        return Dataset.from_parquet([str(self.path(shard)) for shard in range(self.num_shards)])

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
