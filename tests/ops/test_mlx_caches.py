"""What MLX compiles is loaded from folders of this user alone."""

import os
from pathlib import Path

import mlx.core as mx
import pytest

from marlin_cli.ops import mlx_caches

use_private_caches = mlx_caches.use_private_caches.__wrapped__


def test_cuda_kernels_are_kept_in_the_users_own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLX_PTX_CACHE_DIR", "kept as it is")
    use_private_caches("cuda")
    assert os.environ["MLX_PTX_CACHE_DIR"] == "kept as it is"
    monkeypatch.delenv("MLX_PTX_CACHE_DIR")
    monkeypatch.setenv("MARLIN_CACHE", str(tmp_path / "cache"))
    use_private_caches("cuda")
    folder = Path(os.environ["MLX_PTX_CACHE_DIR"])
    assert folder.parent == tmp_path / "cache"
    assert folder.stat().st_mode & 0o777 == 0o700


def test_no_cuda_kernels_are_taken_from_a_cache_of_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MLX_PTX_CACHE_DIR", "")
    monkeypatch.delenv("MLX_PTX_CACHE_DIR")
    monkeypatch.setenv("MARLIN_CACHE", str(tmp_path / "cache"))
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache").chmod(0o777)
    use_private_caches("cuda")
    assert not Path(os.environ["MLX_PTX_CACHE_DIR"]).exists()
    assert "compiled anew in each run: " in capsys.readouterr().err


@pytest.mark.parametrize("shared", [False, True])
def test_mlx_loads_no_library_of_others_on_a_cpu(
    shared: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    disabled: list[bool] = []
    monkeypatch.setattr(mx, "disable_compile", lambda: disabled.append(True))
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    (tmp_path / "mlx").mkdir()
    (tmp_path / "mlx").chmod(0o777 if shared else 0o755)
    use_private_caches("cpu")
    assert bool(disabled) == shared
    assert ("can be written by everybody" in capsys.readouterr().err.replace("\n", " ")) == shared
    assert (tmp_path / "mlx" / mlx_caches.version("mlx") / "cpu").is_dir() != shared
