"""What the compiler of GPU kernels keeps, and from where it takes it; the compiler itself is not called."""

import hashlib

import pytest

from marlin_cli.ops import cuda_compile


@pytest.fixture
def compiler(monkeypatch, tmp_path):
    """Texts that were compiled, in a cache of its own."""
    texts = []

    def compile_text(text):
        texts.append(text)
        return f"code of {text}".encode()

    monkeypatch.setenv("MARLIN_CACHE", str(tmp_path))
    monkeypatch.setattr(cuda_compile, "compile_text", compile_text)
    monkeypatch.setattr(cuda_compile, "_key", lambda text: hashlib.sha256(text.encode()).hexdigest())
    cuda_compile._announce.cache_clear()
    cuda_compile._say_not_kept.cache_clear()
    return texts


def test_each_text_is_compiled_once_for_this_machine(compiler, tmp_path, capsys):
    assert cuda_compile.compiled(["a", "b"]) == [b"code of a", b"code of b"]
    assert "compiling" in capsys.readouterr().err
    assert cuda_compile.compiled(["b", "c"]) == [b"code of b", b"code of c"]
    assert sorted(compiler) == ["a", "b", "c"]
    assert {path.stat().st_mode & 0o777 for path in (tmp_path / "cubin").iterdir()} == {0o600}


@pytest.mark.parametrize("damage", [lambda data: data[:-1], lambda data: data + b"x", lambda data: b"", lambda data: data[1:]])
def test_what_is_damaged_is_compiled_again(compiler, tmp_path, damage):
    cuda_compile.compiled(["a"])
    (kept,) = (tmp_path / "cubin").iterdir()
    kept.write_bytes(damage(kept.read_bytes()))
    assert cuda_compile.compiled(["a"]) == [b"code of a"]
    assert compiler == ["a", "a"]


def test_what_others_can_write_is_not_loaded(compiler, tmp_path, capsys):
    cuda_compile.compiled(["a"])
    (tmp_path / "cubin").chmod(0o777)
    assert cuda_compile.compiled(["a"]) == [b"code of a"]
    assert compiler == ["a", "a"]
    assert "compiled anew" in capsys.readouterr().err
