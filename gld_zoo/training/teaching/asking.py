"""A run's teacher as it is asked: at each step, or once for each view and then read."""

from __future__ import annotations

import time
from collections.abc import Iterator

import torch
from accelerate import Accelerator

from gld_zoo.distillation.teacher import Teacher
from gld_zoo.training.common.errors import DiskError, StoreError, TrainingError
from gld_zoo.training.data.batches import NumberedBatches, Share
from gld_zoo.training.teaching.answers import DTYPES, Answers
from gld_zoo.training.teaching.store import Store
from gld_zoo.training.teaching.together import on_main

IN_HAND = 256  # batches of rows that are kept on their device before they are moved to the CPU
ON_DEVICE = 1 << 30  # bytes of a view that a GPU holds
PART_SECONDS = 60.0  # of asking for missing rows, after which they are written


class AskedOnce:
    """Gives a run the rows of its teacher, which it asks for those that are not kept.

    What the student learns from are the rows as they are kept, whether they were read or have just
    been asked for, so that it makes no difference when a run's own view became complete. Rows that
    were asked for beside other images, as by another run, may differ in the last bits of float32.

    Args:
        teacher: Whom to ask.
        store: What is kept, or is to be.
        answers: How.
        batches: The training images.
        accelerator: Of the run; the teacher is asked in its precision.
        batch_size: Images a process shows at a time.
        head: Hash of the head that was fitted, if one was.

    Raises:
        StoreError: If a view that is kept was answered by another head.
    """

    def __init__(
        self,
        teacher: Teacher,
        store: Store,
        answers: Answers,
        batches: NumberedBatches,
        accelerator: Accelerator,
        batch_size: int,
        *,
        head: str | None = None,
    ) -> None:
        self.teacher, self.store, self.answers = teacher, store, answers
        self.batches, self.accelerator, self.batch_size = batches, accelerator, batch_size
        self.share = Share(accelerator.process_index, accelerator.num_processes)
        self.view, self.seconds = 0, 0.0
        self.known: torch.Tensor | None = None
        self.asked: list[tuple[torch.Tensor, torch.Tensor]] = []
        self.checked: set[int] = set()
        store.head = head if answers.what == "logits" else None
        self.told = False
        self.refusal: str | None = "it is only read"
        on_main(self.accelerator, self._check_heads)

    def begin_writing(self) -> None:
        """Take the store for this run to write, if that can be."""
        self.refusal = on_main(self.accelerator, self.store.begin_writing)

    @property
    def writes(self) -> bool:
        """Whether what is asked for is kept."""
        return not self.refusal

    def _check_heads(self) -> None:
        for view in self.store.complete():
            self._check_head(view)

    def _check_head(self, view: int) -> None:
        own = self.store.head
        if (self.store.record(view) or {}).get("head", own) != own:
            raise StoreError(
                f"{self.store.path(view)} holds the answers of another head than was fitted here; "
                "name another teacher_store"
            )

    def begin(self, view: int) -> None:
        """Read a view if it is complete; else ask the teacher for it."""
        self.view, self.seconds, self.known = view, 0.0, None
        if on_main(self.accelerator, lambda: self._usable(view)):
            self.known = self.store.rows(view)
            here = self.accelerator.device
            if here.type == "cuda" and self.known.nbytes <= ON_DEVICE:
                self.known = self.known.to(here)

    def _usable(self, view: int) -> bool:
        """Tell whether a view is complete and can be read; else it is made anew."""
        try:
            self.store.check_own()
        except DiskError as error:
            self.accelerator.print(f"{error}; the teacher is asked")
            return False
        if not self.store.record(view):
            return False
        self._check_head(view)
        if self.writes:
            self.store.drop_parts(view)  # which a crash may have left
        if view in self.checked:
            return True
        try:
            self.store.check(view)
        except (DiskError, StoreError) as error:
            self.accelerator.print(f"{error}; the teacher is asked for it again")
            if self.writes and isinstance(error, StoreError):
                try:
                    self.store.forget(view)
                except DiskError as refused:
                    self.refusal = str(refused)
            return False
        self.checked.add(view)
        return True

    @torch.no_grad()
    def rows(self, images: torch.Tensor, numbers: torch.Tensor) -> torch.Tensor:
        """Return a batch's rows `[B, 1+L, W]` to learn from.

        Args:
            images: The student's.
            numbers: Which they are, of the training split, on the CPU.
        """
        if self.known is not None:
            kept = self.known[numbers.to(self.known.device)].to(images.device)
        else:
            kept = self.ask(images)
            if self.writes:
                self.asked.append((numbers, kept))
                if len(self.asked) % IN_HAND == 0:
                    self.asked = [(which, rows.cpu()) for which, rows in self.asked]
        found = self.answers.decode(kept)
        return self.teacher.classify_rows(found) if self.answers.what == "features" else found

    @torch.no_grad()
    def ask(self, images: torch.Tensor) -> torch.Tensor:
        """Return what is kept of the teacher's answer to images."""
        began = time.perf_counter()
        with self.accelerator.autocast():
            found = self.teacher.features(images)
        if self.answers.what == "logits":
            found = self.teacher.classify_rows(found)
        kept = self.answers.encode(found)
        if kept.is_cuda:
            torch.cuda.synchronize()  # in the first pass over a view alone
        self.seconds += time.perf_counter() - began
        return kept

    def save(self) -> None:
        """Write the rows asked for since the last time as a part of their view.

        A disk that refuses costs the store, not the run.
        """
        if not self.asked or not self.writes:
            return
        numbers, rows = (torch.cat([pair[part].cpu() for pair in self.asked]) for part in (0, 1))
        seconds, self.asked, self.seconds = self.seconds, [], 0.0
        try:
            self.store.write_part(self.view, numbers, rows, seconds)
        except DiskError as error:
            self.refusal = str(error)

    def end(self) -> str | None:
        """Complete the view: ask for the rows that are missing, and join its parts.

        Returns:
            A line to tell, if something came of it.
        """
        if self.known is not None:
            return None
        self.save()
        if self._stopped():
            return None
        try:
            for _ in self._missing():
                self.save()
        except StoreError as error:  # on all processes
            self.refusal = str(error)
        self.save()
        if self._stopped():
            return None
        on_main(self.accelerator, self._join)
        told = f"view {self.view + 1} of {self.store.views} is kept in {self.store.folder}"
        return None if self._stopped() else told

    def _missing(self) -> Iterator[None]:
        """Ask for this process's share of the rows that no part has; stop to have them written."""
        missing = on_main(self.accelerator, lambda: self.store.missing(self.view).tolist())
        own = self.share.of(torch.tensor(missing, dtype=torch.int64))
        written = time.monotonic()
        if not len(own):
            return
        for numbers, images in self.batches.of_view(self.view, own, self.batch_size):
            self.asked.append((numbers, self.ask(images)))
            if time.monotonic() - written > PART_SECONDS:
                written = time.monotonic()
                yield

    def _join(self) -> None:
        try:
            processes = self.share.world_size
            self.store.join(self.view, DTYPES[self.answers.dtype], processes=processes)
        except (TrainingError, OSError) as error:
            self.refusal = str(error)

    def _stopped(self) -> bool:
        """Tell whether a process cannot write; then none does, and people are told once."""
        refused = torch.tensor(float(bool(self.refusal)), device=self.accelerator.device)
        if not self.accelerator.reduce(refused).item():
            return False
        self.refusal = self.refusal or "a process cannot write it"
        if not self.told:
            self.accelerator.print(self.standing())
        self.asked = []
        return True

    def standing(self) -> str:
        """Return a line on the store as it is."""
        store, done = self.store, len(self.store.complete())
        kind = f"{self.answers.what} in {self.answers.dtype}"
        line = f"teacher's store {store.folder}: {kind}, {done} of {store.views} views complete"
        if self.refusal:
            self.told = True
            line += f"; it is left as it is ({self.refusal}), and what it lacks asked at each step"
        return line
