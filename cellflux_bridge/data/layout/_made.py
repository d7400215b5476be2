"""What layouts share that make their patches: made once, stamped with the settings, then read like any manifest."""

import json
import os
import shutil
from abc import abstractmethod
from pathlib import Path
from typing import Any

from cellflux_bridge.base.errors import UserError
from cellflux_bridge.config.schema import ReceivedPath
from cellflux_bridge.data.layout.base import PatchRecord
from cellflux_bridge.data.layout.manifest import Manifest


class Made(Manifest):
    """Phantoms that are made on first use under `data.root`. `settings`, of JSON's types, decide every byte."""

    def __init__(self, root: Path, settings: dict[str, Any]):
        super().__init__(root)
        self._settings = settings

    @abstractmethod
    def _write(self, folder: Path) -> None:
        """Write the patches and `manifest.csv` into `folder`, which does not exist yet."""

    def records(self) -> list[PatchRecord]:
        """Every patch that the manifest names; makes the files if they are not there.

        UserError where they would be made at a root that somebody else named, and for files of other settings.
        """
        stamp = self.root / "phantom.json"
        if not stamp.exists():
            self._make()
        try:
            found = json.loads(stamp.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise UserError(f"{stamp}: cannot be read ({error}); remove {self.root} and it is made again") from error
        if found != self._settings:
            raise UserError(
                f"{self.root}: holds phantoms made with other settings ({json.dumps(found)}); "
                "remove the folder or choose another data.root"
            )
        return super().records()

    def _make(self) -> None:
        if isinstance(self.root, ReceivedPath):
            raise UserError(
                f"data.root={self.root}: holds no phantoms, and none are made where a saved configuration says, which "
                "may come from somebody else; name the folder yourself (data.root=...), or pass --trust (trust=True)"
            )
        if self.root.exists() and any(self.root.iterdir()):
            raise UserError(f"{self.root}: is not empty and holds no phantoms; choose another data.root")
        building = self.root.with_name(f"{self.root.name}.making")
        shutil.rmtree(building, ignore_errors=True)
        self._write(building)
        (building / "phantom.json").write_text(json.dumps(self._settings) + "\n")
        self.root.parent.mkdir(parents=True, exist_ok=True)
        if self.root.exists():
            self.root.rmdir()
        os.replace(building, self.root)
