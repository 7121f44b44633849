"""Which marlin this is: its version, the commit that it was made from, and the kernels that come with it."""

import hashlib
import subprocess
from pathlib import Path

__version__ = "0.1.0"

PACKAGE = Path(__file__).parent
COMMIT = "commit.txt"  # in a wheel and an sdist, written when they are built


def commit() -> str | None:
    """The commit, short, of a checkout or of what was built; None where nothing tells."""
    if (PACKAGE / COMMIT).is_file():
        return (PACKAGE / COMMIT).read_text(encoding="ascii").strip() or None
    root = PACKAGE.parent
    if not (root / ".git").exists() or not (root / "pyproject.toml").is_file():
        return None
    try:
        asked = ["git", "-C", str(root), "rev-parse", "--short=12", "HEAD"]
        return subprocess.run(asked, capture_output=True, text=True, check=True, timeout=5).stdout.strip() or None
    except (OSError, subprocess.SubprocessError):
        return None


def kernels() -> str:
    """The beginning of a SHA-256 over names and bytes of the kernels' sources: equal for equal kernels."""
    folder = PACKAGE / "kernels"
    digest = hashlib.sha256()
    for file in sorted((folder if folder.is_dir() else PACKAGE.parent / "kernels").iterdir()):
        digest.update(f"{file.name}\n".encode())
        digest.update(file.read_bytes())
    return digest.hexdigest()[:12]


def described() -> str:
    """All of it in a line."""
    known = commit()
    return f"marlin {__version__}{f', commit {known}' if known else ''}, kernels {kernels()}"
