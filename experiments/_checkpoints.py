"""Checkpoints of a run that can be stopped at any step and gone on with as if it never had been."""

import dataclasses
import json
import pathlib
import signal
from typing import Any

import jax


class Store:
    """Checkpoints of one run, the latest two kept. They hold the key of the noise to come."""

    def __init__(self, folder: pathlib.Path, name: str, settings: Any):
        import orbax.checkpoint as ocp

        self.ocp = ocp
        options = ocp.CheckpointManagerOptions(max_to_keep=2)
        self.manager = ocp.CheckpointManager((folder / name).resolve(), options=options)
        self.settings = json.loads(json.dumps(dataclasses.asdict(settings)))

    def save(self, step: int, training: Any, notes: dict[str, Any]) -> None:
        args = self.ocp.args
        self.manager.save(
            step,
            args=args.Composite(
                training=args.StandardSave(training),
                notes=args.JsonSave({"settings": self.settings} | notes),
            ),
            force=True,
        )
        self.manager.wait_until_finished()

    def latest(self, start: Any) -> tuple[int, Any, dict[str, Any]] | None:
        step = self.manager.latest_step()
        if step is None:
            return None
        args = self.ocp.args
        abstract = jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), start
        )
        found: Any = self.manager.restore(
            step,
            args=args.Composite(training=args.StandardRestore(abstract), notes=args.JsonRestore()),
        )
        notes = dict(found.notes)
        if notes["settings"] != self.settings:
            raise SystemExit(
                f"The checkpoint in {self.manager.directory} was written with other settings: "
                "remove it, or run with those."
            )
        return step, found.training, notes


class Interrupt:
    """Notes Ctrl-C, so that a step is finished and saved before the run ends."""

    def __init__(self):
        self.seen = False
        signal.signal(signal.SIGINT, self._note)

    def _note(self, *_):
        self.seen = True
        print("\nfinishing this step …", flush=True)
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a second one ends at once
