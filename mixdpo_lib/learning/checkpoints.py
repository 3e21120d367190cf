"""From where does a fit go on? The newest whole checkpoint of a folder, of this fit and no other."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..store import (
    MixDPOError,
    check_file_list,
    check_shape,
    file_hashes,
    note,
    read_json,
    remove_folder,
    sha256_of,
    sync,
    write_json_atomic,
    writing_to,
)

FIT, WHOLE, RESTARTS = "fit.json", "whole.json", "restarts.csv"
KEPT = 2  # whole checkpoints: one that is damaged later has one before it
_WRITING = ".writing"
_NAME = re.compile(r"checkpoint-(\d+)")
_SHAPE = {"identity": dict, "files": dict, "beside": dict}
_REMEDY = "delete it"


class Checkpoints:
    """The checkpoints of one fit in a folder, each written aside and put in place when it is whole.

    `fit.json` says which fit it is. `checkpoint-<step>/whole.json` lists the sha256 of the checkpoint's files and of
    the snapshots beside it, and is written last. The last `KEPT` stay.

    Parameters
    ----------
    folder : made if it is not there. identity : see `identity.fit_identity`.
    unlike : says in words what makes one identity another fit than a second one.

    Raises
    ------
    MixDPOError : the folder is a file, or cannot be written.
    """

    def __init__(
        self,
        folder: Path,
        identity: Mapping[str, Any],
        unlike: Callable[[Mapping[str, Any], Mapping[str, Any]], Sequence[str]],
    ) -> None:
        self.folder, self.identity, self._unlike = folder, dict(identity), unlike
        self.part = folder / _WRITING  # where a checkpoint is written before it is whole
        self.restarts = ""  # the table of restarts, as CSV
        self._known = False  # whether something in the folder says that it is of this fit
        self._seen: dict[tuple[str, int, int], str] = {}
        if folder.exists() and not folder.is_dir():
            raise MixDPOError(
                f"{folder}: found a file, expected a folder or nothing; give another name"
            )
        with writing_to(folder):
            folder.mkdir(parents=True, exist_ok=True)

    # ------------------------------------------------------------------------------------------------------ reading

    def newest(self) -> Path | None:
        """The newest whole checkpoint; None where the fit starts anew. What is left out is noted.

        Raises
        ------
        MixDPOError : the folder holds another fit; what differs is named.
        """
        paths = [self.folder / FIT, *(one / WHOLE for one in self._all())]
        for path in paths:
            try:
                found = check_shape(path, read_json(path), {"identity": dict}, _REMEDY)["identity"]
            except MixDPOError:
                continue  # absent or damaged: it says nothing of another fit
            self._known = True
            if differ := self._unlike(found, self.identity):
                raise MixDPOError(
                    f"{self.folder}: found another fit there: {'; '.join(differ)}; give the data, policy (made anew) "
                    "and configuration that were begun there, or another folder"
                )
            if path == paths[0] and found != self.identity:
                note(
                    f"{self.folder}: the fit there had fewer passes; it goes on, and its rate falls anew"
                )
        for checkpoint in reversed(self._all()):
            reason = self._fault(checkpoint)
            if reason is None:
                return checkpoint
            note(f"{checkpoint}: not whole, left out: {reason}")
        if self._all():
            note(f"{self.folder}: no checkpoint is whole; the fit starts anew")
        return None

    def _all(self) -> list[Path]:
        """Folders with the name of a checkpoint, by step."""
        found = ((_NAME.fullmatch(path.name), path) for path in self.folder.iterdir())
        steps = [(int(m[1]), path) for m, path in found if m and path.is_dir()]
        return [path for _, path in sorted(steps)]

    def _fault(self, checkpoint: Path) -> str | None:
        """Why a checkpoint is not whole; None: it is."""
        try:
            path = checkpoint / WHOLE
            record = check_shape(WHOLE, read_json(path), _SHAPE, _REMEDY)
            places = {checkpoint: record["files"], self.folder: record["beside"]}
            for place, files in places.items():
                for name, entry in check_file_list(WHOLE, files, _REMEDY).items():
                    if not (place / name).is_file():
                        return f"{name}: no such file"
                    if (place / name).stat().st_size != entry["bytes"]:
                        return f"{name}: another size than when it was written"
                    if self._sha256(place / name) != entry["sha256"]:
                        return f"{name}: another sha256 than when it was written"
        except (MixDPOError, OSError) as error:
            return str(error)
        if not {"model.safetensors", "trainer_state.json", RESTARTS} <= set(record["files"]):
            return f"{WHOLE}: lists no checkpoint"
        return None

    # ------------------------------------------------------------------------------------------------------ writing

    def begin(self) -> None:
        """Say which fit it is, and tidy: what a killed process left half-done goes, the work of others does not."""
        with writing_to(self.folder):
            shutil.rmtree(self.part, ignore_errors=True)
            for left_over in self.folder.glob(".gone-checkpoint-*"):
                shutil.rmtree(left_over, ignore_errors=True)
            for checkpoint in self._all():
                if self._fault(checkpoint) is not None:
                    if self._known:
                        remove_folder(checkpoint)
                    else:  # nothing says that it is ours
                        self._set_aside(checkpoint)
            ours = (FIT, RESTARTS)
            for path in [] if self._known else sorted(self.folder.iterdir()):
                if path.name in ours or path.name.startswith("snapshot-"):
                    self._set_aside(path)
            write_json_atomic(self.folder / FIT, {"identity": self.identity})
            self._write(self.folder / RESTARTS)

    def _set_aside(self, checkpoint: Path) -> None:
        number = 0
        while (aside := checkpoint.with_name(f"unknown-{number}-{checkpoint.name}")).exists():
            number += 1
        checkpoint.rename(aside)
        note(f"{checkpoint}: of an unknown fit, renamed to {aside.name}")

    def _write(self, path: Path) -> None:
        partial = path.with_name(f".{path.name}.part")
        partial.write_text(self.restarts, encoding="utf-8")
        os.replace(partial, path)

    @contextmanager
    def writing(self) -> Iterator[None]:
        """While a checkpoint is written to `part`; what fails leaves nothing.

        Raises
        ------
        MixDPOError : the disk is full, or the folder cannot be written.
        """
        try:
            with writing_to(self.folder):
                yield
        except BaseException:
            shutil.rmtree(self.part, ignore_errors=True)
            raise

    def put_in_place(self, step: int, snapshots: Sequence[str]) -> None:
        """Seal the checkpoint that was written aside, give it its name in one step, and let older ones go.

        snapshots : names of the files beside it without which it cannot be gone on from.
        """
        part = self.part / f"checkpoint-{step}"
        self._write(part / RESTARTS)
        beside = {
            name: {
                "sha256": self._sha256(self.folder / name),
                "bytes": (self.folder / name).stat().st_size,
            }
            for name in snapshots
        }
        files = file_hashes(part)
        write_json_atomic(
            part / WHOLE, {"identity": self.identity, "files": files, "beside": beside}
        )
        for path in (*(part / name for name in files), part):
            sync(path)
        place = self.folder / part.name
        remove_folder(place)
        os.replace(part, place)
        sync(self.folder)
        shutil.rmtree(self.part, ignore_errors=True)
        self._let_go()

    def _let_go(self) -> None:
        kept = self._all()[-KEPT:]
        for checkpoint in self._all()[:-KEPT]:
            remove_folder(checkpoint)
        try:
            needed = {name for one in kept for name in read_json(one / WHOLE)["beside"]}
        except (MixDPOError, KeyError, TypeError):
            return  # a snapshot that somebody may need stays
        for path in self.folder.glob("snapshot-*.safetensors"):
            if path.name not in needed:
                path.unlink(missing_ok=True)

    def _sha256(self, path: Path) -> str:
        """Of a file that is not written again, once."""
        status = path.stat()
        key = (str(path), status.st_size, status.st_mtime_ns)
        if key not in self._seen:
            self._seen[key] = sha256_of(path)
        return self._seen[key]
