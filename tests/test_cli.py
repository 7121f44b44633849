"""The program itself: quick to answer, honest about its backend, and importable without one."""

import os
import signal
import subprocess
import sys

import pytest

import marlin_cli
from marlin_cli import version


def run(*arguments, code=""):
    command = [sys.executable, "-c", code, *arguments] if code else [sys.executable, "-m", "marlin_cli", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


def test_help_names_the_four_subcommands_and_imports_nothing_heavy():
    code = (
        "import sys; from marlin_cli.cli import main\n"
        "try: main()\n"
        "except SystemExit as end: assert end.code == 0\n"
        "heavy = {'mlx', 'datasets', 'numpy', 'safetensors', 'yaml'} & sys.modules.keys()\n"
        "sys.exit(f'imported {heavy}' if heavy else 0)"
    )
    result = run("--help", code=code)
    assert result.returncode == 0, result.stderr
    for name in ("calibrate", "quantize", "generate", "serve", "bench"):
        assert name in result.stdout


def test_the_list_of_commands_says_what_each_does_in_whole_lines():
    listed = run("--help").stdout.partition("Commands:\n")[2].rstrip().splitlines()
    assert len(listed) == 8 and not [line for line in listed if "..." in line or len(line.split()) < 4]


@pytest.mark.parametrize("name", ["calibrate", "quantize", "generate", "serve", "bench"])
def test_every_option_has_help(name):
    from typer.main import get_command

    from marlin_cli.cli import app

    command = get_command(app).commands[name]
    assert command.help
    for parameter in command.params:
        assert parameter.help, parameter.name


@pytest.mark.parametrize("name", ["calibrate", "quantize", "generate", "serve", "bench"])
def test_help_prints_every_text_as_it_is_written(name):
    from typer.main import get_command

    from marlin_cli.cli import app

    result = run(name, "--help")
    assert result.returncode == 0, result.stderr
    printed = "".join(result.stdout.split())
    for parameter in get_command(app).commands[name].params:
        assert "".join(parameter.help.split()) in printed, parameter.name


def test_nothing_typed_is_a_wish_for_help():
    assert run().stdout == run("--help").stdout and run().returncode == 0


def test_version():
    assert run("--version").stdout == f"{version.described()}\n"


def test_without_a_backend_one_line_names_the_extra():
    code = "import sys; sys.modules['mlx'] = None\nfrom marlin_cli.cli import main\nmain()"
    for arguments in (["generate", "-p", "x"], ["bench"], ["quantize", "megabyte-demo", "-o", "x"]):
        result = run(*arguments, code=code)
        assert result.returncode == 1 and result.stderr.count("\n") == 1, result.stderr
        assert "pip install marlin-cli" in result.stderr


def test_the_interface_is_importable_without_a_backend():
    code = (
        "import sys; sys.modules['mlx'] = None\nimport marlin_cli\nfrom marlin_cli.errors import BackendError\n"
        "try: marlin_cli.load\nexcept BackendError as error: print(error)"
    )
    assert "pip install" in run(code=code).stdout


def test_the_interface_is_complete():
    for name in marlin_cli.__all__:
        assert getattr(marlin_cli, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'tokenizer'"):
        marlin_cli.tokenizer  # noqa: B018 (the access is the test)
    assert marlin_cli.decode(marlin_cli.encode("é文")) == "é文"


@pytest.mark.parametrize(("number", "code"), [("SIGTERM", 143), ("SIGHUP", 129), ("SIGINT", 130)])
def test_a_signal_in_the_middle_of_an_import_ends_the_program_quietly(number, code):
    """Python makes a RuntimeError of what comes out of a descriptor that is told its name."""
    script = f"""
import os, signal, sys
sys.argv = ["marlin", "generate", "-p", "x", "--max-bytes", "1"]
from marlin_cli import backend, cli

class Descriptor:
    def __set_name__(self, owner, name):
        os.kill(os.getpid(), signal.{number})

def in_the_middle():
    type("Class", (), {{"field": Descriptor()}})

backend.require_mlx = in_the_middle
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)  # nohup ignores it
cli.main()
"""
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, timeout=60)
    assert (result.returncode, result.stdout, result.stderr) == (code, b"", b"")


def test_ctrl_c_while_the_program_is_imported_says_nothing(tmp_path):
    (tmp_path / "typer.py").write_text("import os, signal\nos.kill(os.getpid(), signal.SIGINT)\nimport time\ntime.sleep(9)\n")
    command = [sys.executable, "-m", "marlin_cli", "--version"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])}
    result = subprocess.run(command, capture_output=True, timeout=60, env=environment)
    assert (result.returncode, result.stdout, result.stderr) == (-signal.SIGINT, b"", b"")
