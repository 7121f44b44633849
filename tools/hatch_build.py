"""A step of building the wheel and the sdist: the commit that they are made from goes into them."""

import subprocess
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface


class CommitHook(BuildHookInterface[Any]):
    """Puts `marlin_cli/commit.txt` beside the code, unless it is there already, as in an sdist, or nothing tells it."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Called before the files are gathered."""
        root = Path(self.root)
        if version == "editable" or (root / "marlin_cli/commit.txt").exists() or not (root / ".git").exists():
            return
        asked = ["git", "-C", str(root), "rev-parse", "--short=12", "HEAD"]
        done = subprocess.run(asked, capture_output=True, text=True)
        if done.returncode == 0:
            file = Path(self.directory) / "commit.txt"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(done.stdout)
            self._made = file
            build_data["force_include"][str(file)] = "marlin_cli/commit.txt"

    def finalize(self, version: str, build_data: dict[str, Any], artifact_path: str) -> None:
        """Called when the artifact stands."""
        if (file := getattr(self, "_made", None)) is not None:
            file.unlink(missing_ok=True)
