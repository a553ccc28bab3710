"""A folder of a teacher's answers: whole views, each a file with its hash, and parts of others.

store.json                what decides its rows, their shape, the recipe that made it
head.safetensors          the classifier that was fitted, if one was
view-000.safetensors      rows of one view of all images, in the order of the training split
view-000.json             its hash, which makes it complete
parts/view-001-*.safetensors    rows of a view that is being asked for
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file

from gld_zoo.hub import save_tensors
from gld_zoo.training.common.disk import lock, replacing, sha256, write_json, writing
from gld_zoo.training.common.errors import DiskError, HeldError, StoreError
from gld_zoo.training.teaching.key import differences, key_of

INFO, PARTS, LOCK = "store.json", "parts", ".lock"
UNFINISHED = ".tmp*"  # files that safetensors was writing when it was killed


class DamagedStoreError(StoreError):
    """What describes a store is not what was written."""


class Store:
    """A teacher's answers in a folder, for one key.

    `head` is the hash of the classifier that was fitted, where its logits are kept; parts of
    another are as if they were not there.

    Args:
        folder: Where they are, or are to be.
        info: What `store.json` holds.
    """

    def __init__(self, folder: Path, info: dict[str, Any]) -> None:
        self.folder, self.info = folder, info
        self.head: str | None = None
        made_of = info["made_of"]
        self.count: int = made_of["count"]
        self.shape = tuple(made_of["kept"]["shape"])
        self.views: int = made_of["views"]
        self._lock: Any = None

    @classmethod
    def read(cls, folder: Path) -> Store:
        """Return the store in a folder.

        Raises:
            DiskError: If the disk does not give its `store.json`.
            StoreError: If there is none, or it is damaged.
        """
        try:
            text = (folder / INFO).read_text(encoding="utf-8")
        except (FileNotFoundError, NotADirectoryError) as error:
            raise StoreError(
                f"{folder} holds no teacher's store; gld-zoo store build makes one"
            ) from error
        except OSError as error:
            raise DiskError(f"{folder / INFO} cannot be read: {error.strerror}") from error
        except ValueError as error:  # no UTF-8
            raise _damaged(folder, error) from error
        try:
            info = json.loads(text)
            if key_of(info["made_of"]) != info["key"]:
                raise ValueError("what it is made of changed since it was written")
            return cls(folder, info)
        except (ValueError, KeyError, TypeError) as error:
            raise _damaged(folder, error) from error

    @classmethod
    def open(cls, folder: Path, info: dict[str, Any]) -> Store:
        """Return the store in a folder, where there is none a new one that is not yet written.

        Raises:
            StoreError: If the folder holds other files, a damaged store, or one of other rows.
        """
        try:
            is_new = not os.path.lexists(folder) or (folder.is_dir() and not _content(folder))
        except OSError as error:
            raise StoreError(f"{folder} cannot be read: {error.strerror}") from error
        if is_new:
            return cls(folder, info)
        if not (folder / INFO).is_file():
            raise StoreError(
                f"teacher_store={str(folder)!r} is no teacher's store and not empty; name another "
                "folder, or auto"
            )
        there = cls.read(folder)
        there._check_same(info)
        return there

    def _check_same(self, info: dict[str, Any]) -> None:
        """Refuse what a `store.json` would hold of other rows.

        Raises:
            StoreError: If it does; it tells what differs.
        """
        if self.info["key"] != info["key"]:
            told = "; ".join(differences(info["made_of"], self.info["made_of"]))
            raise StoreError(
                f"teacher_store={str(self.folder)!r} holds other rows than this run's ({told}); "
                "name another folder, or auto"
            )

    def check_own(self) -> None:
        """Refuse the folder if another run has made its own store there since this one was opened.

        Raises:
            DiskError: If the disk does not tell.
            StoreError: If it has.
        """
        if (self.folder / INFO).is_file():
            Store.read(self.folder)._check_same(self.info)

    def begin_writing(self) -> str | None:
        """Take the store for this process to write, and make it if it is new.

        Returns:
            Why that cannot be; None where it is done.

        Raises:
            StoreError: As `check_own`.
        """
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._lock = lock(self.folder / LOCK)
            self.check_own()
            if not (self.folder / INFO).is_file():
                write_json(self.folder / INFO, self.info)
            (self.folder / PARTS).mkdir(exist_ok=True)
            for left in [*self.folder.glob(UNFINISHED), *(self.folder / PARTS).glob(UNFINISHED)]:
                left.unlink(missing_ok=True)
        except HeldError as error:
            return f"{error} is writing it"
        except OSError as error:
            return error.strerror or str(error)
        except DiskError as error:
            return str(error)
        return None

    def path(self, view: int) -> Path:
        """Return the file of a view."""
        return self.folder / f"view-{view:03d}.safetensors"

    def record(self, view: int) -> dict[str, Any] | None:
        """Return what is written of a view that is complete; None of any other."""
        try:
            found = json.loads(self.path(view).with_suffix(".json").read_text(encoding="utf-8"))
            return found if self.path(view).is_file() and "sha256" in found else None
        except (OSError, ValueError):
            return None

    def complete(self) -> list[int]:
        """Return the views that are."""
        return [view for view in range(self.views) if self.record(view)]

    def check(self, view: int) -> None:
        """Read a complete view's file and compare it with its hash.

        Raises:
            DiskError: If the disk does not give it.
            StoreError: If it is not what was written.
        """
        record, path = self.record(view), self.path(view)
        try:
            good = record is not None and sha256(path) == record["sha256"]
        except OSError as error:  # it may pass: no reason to give a view up
            raise DiskError(f"{path} cannot be read: {error.strerror}") from error
        if not good:
            raise StoreError(f"{path} is damaged: it is not what was written")

    def rows(self, view: int) -> torch.Tensor:
        """Return the rows of a complete view `[N, R, W]`, read from the disk as they are used.

        Raises:
            StoreError: If the file is not of this store.
        """
        try:
            with safe_open(self.path(view), framework="pt") as file:
                found = file.get_tensor("rows")
        except (OSError, SafetensorError) as error:
            raise StoreError(f"{self.path(view)} cannot be read: {error}") from error
        if found.shape != (self.count, *self.shape):
            raise StoreError(
                f"{self.path(view)} holds rows {list(found.shape)}, not those of "
                f"{self.count} images"
            )
        return found

    def forget(self, view: int) -> None:
        """Take a damaged view out of those that are complete, its file set aside.

        Raises:
            DiskError: If the disk refuses.
        """
        with writing(self.folder):
            self.path(view).with_suffix(".json").unlink(missing_ok=True)
            if self.path(view).is_file():
                os.replace(self.path(view), self.path(view).with_suffix(".damaged"))

    def half_complete(self) -> list[int]:
        """Return the views of which there is a file alone, or its record, or that is damaged."""
        there = [
            any(
                self.path(view).with_suffix(ending).is_file()
                for ending in (".safetensors", ".json")
            )
            for view in range(self.views)
        ]
        return [view for view, any_ in enumerate(there) if any_ and not self.record(view)]

    def write_part(
        self, view: int, numbers: torch.Tensor, rows: torch.Tensor, seconds: float = 0.0
    ) -> None:
        """Write rows `[n, R, W]` of some images, by their numbers `[n]`, of a view.

        Args:
            view: Which.
            numbers: Of the images.
            rows: Of them.
            seconds: That the teacher took for them.

        Raises:
            DiskError: If the disk refuses; what was written before is untouched.
        """
        tensors = dict(numbers=numbers, rows=rows)
        # a name that no other process has had, whatever its number
        path = self.folder / PARTS / f"view-{view:03d}-{uuid.uuid4().hex}.safetensors"
        with replacing(path) as temporary:
            told = dict(sha256=_digest(tensors), seconds=str(seconds), head=str(self.head))
            save_tensors(tensors, temporary, told)

    def parts(self, view: int) -> Iterator[tuple[torch.Tensor, torch.Tensor, float]]:
        """Yield the parts of a view, oldest first, with the seconds that the teacher took.

        One that is damaged, or of another head, is left out.
        """
        paths = list((self.folder / PARTS).glob(f"view-{view:03d}-*.safetensors"))
        for path in sorted(paths, key=lambda each: (each.stat().st_mtime_ns, each.name)):
            with contextlib.suppress(SafetensorError, OSError, KeyError, ValueError):
                tensors = load_file(path)
                with safe_open(path, framework="pt") as file:
                    told = file.metadata() or {}
                numbers, rows = tensors["numbers"], tensors["rows"]
                fits = len(numbers) > 0 and rows.shape == (len(numbers), *self.shape)
                whole = fits and _digest(tensors) == told["sha256"]
                if whole and told["head"] == str(self.head) and numbers.max() < self.count:
                    yield numbers, rows, float(told["seconds"])

    def missing(self, view: int) -> torch.Tensor:
        """Return the numbers of the images of which no part of a view has the rows."""
        have = torch.zeros(self.count, dtype=torch.bool)
        for numbers, *_ in self.parts(view):
            have[numbers] = True
        return (~have).nonzero().flatten()

    def join(self, view: int, dtype: torch.dtype, **record: Any) -> None:
        """Make a view complete of its parts, which have the rows of all images.

        Raises:
            DiskError: If the disk refuses; the parts are untouched.
            StoreError: If a part has been lost.
        """
        whole = torch.empty((self.count, *self.shape), dtype=dtype)
        have = torch.zeros(self.count, dtype=torch.bool)
        seconds = 0.0
        for numbers, rows, spent in self.parts(view):
            whole[numbers] = rows
            have[numbers] = True
            seconds += spent
        if not have.all():
            raise StoreError(
                f"{self.folder} lacks {int((~have).sum())} rows of view {view}, which were there"
            )
        with replacing(self.path(view)) as temporary:
            save_tensors(dict(rows=whole), temporary)
        told = dict(sha256=sha256(self.path(view)), seconds=round(seconds, 2), head=self.head)
        write_json(self.path(view).with_suffix(".json"), dict(told, **record))
        self.drop_parts(view)
        self.path(view).with_suffix(".damaged").unlink(missing_ok=True)

    def drop_parts(self, view: int) -> None:
        """Remove a view's parts, and what an earlier crash left of them."""
        for pattern in (f"view-{view:03d}-*.safetensors", f".view-{view:03d}-*.partial"):
            for path in (self.folder / PARTS).glob(pattern):
                with contextlib.suppress(OSError):
                    path.unlink()

    def bytes(self) -> int:
        """Return what the complete views take on the disk."""
        return sum(self.path(view).stat().st_size for view in self.complete())


def _content(folder: Path) -> list[Path]:
    """Return a folder's files but those that a store leaves which was begun and not described."""
    return [
        path for path in folder.iterdir() if not path.name.startswith(".") and path.name != PARTS
    ]


def _damaged(folder: Path, error: Exception) -> DamagedStoreError:
    return DamagedStoreError(
        f"{folder / INFO} is damaged ({error}), so nothing in its folder is read; delete the "
        "folder or name another"
    )


def _digest(tensors: dict[str, torch.Tensor]) -> str:
    digest = hashlib.sha256()
    for name in ("numbers", "rows"):
        digest.update(tensors[name].contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()
