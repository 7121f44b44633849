"""Damaged and hostile files of torch.save: each is refused in one line that names the file, and nothing in them runs."""

import io
import pickle
import random
import re
import struct
import zipfile
from pathlib import Path

import numpy as np
import pytest
from refusals import refused
from torch_writer import Document, Opcodes, View, call, document, name, write_legacy, write_zip

from marlin_cli.checkpoints.pickle_reader import read_pickle
from marlin_cli.checkpoints.torch_file import TorchFile
from marlin_cli.errors import CheckpointError

FOREIGN = Path(__file__).parents[1] / "data" / "foreign"


# Pickles


def system(canary: Path) -> str:
    return f"touch {canary}"


def text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value.encode())) + value.encode()


# What each does when a pickle is run: make the canary. `c` is its path.
PROGRAMS = {
    "os.system": lambda c: call(name("os", "system"), system(c)),
    "posix.system": lambda c: call(name("posix", "system"), system(c)),
    "builtins.eval": lambda c: call(name("builtins", "eval"), f"open({str(c)!r}, 'w')"),
    "__builtin__.exec": lambda c: call(name("__builtin__", "exec"), f"open({str(c)!r}, 'w')"),
    "builtins.getattr": lambda c: call(name("builtins", "getattr"), name("os", "system"), "__call__"),
    "subprocess.Popen": lambda c: call(name("subprocess", "Popen"), ["touch", str(c)]),
    "torch.load": lambda c: call(name("torch", "load"), str(c)),
    "torch._utils.__dict__": lambda c: name("torch._utils", "__dict__"),
    "torch._utils._rebuild_tensor": lambda c: call(name("torch._utils", "_rebuild_tensor"), str(c)),
    "collections.OrderedDict.fromkeys": lambda c: name("collections", "OrderedDict.fromkeys"),
    "argparse.Namespace": lambda c: call(name("argparse", "Namespace")),
    "builtins.open": lambda c: Opcodes(text("builtins") + text("open") + b"\x93" + text(str(c)) + text("w") + b"\x86R"),
    "os.popen": lambda c: Opcodes(b"(" + text(system(c)) + b"ios\npopen\n"),
    r"o\x1bs.sy\nstem": lambda c: Opcodes(text("o\x1bs") + text("sy\nstem") + b"\x93"),
}


@pytest.mark.parametrize("write", [write_zip, write_legacy])
@pytest.mark.parametrize("called", PROGRAMS)
def test_a_pickle_that_calls_anything_is_refused_by_name(called, write, tmp_path):
    canary = tmp_path / "canary"
    path = write(tmp_path / "model.pt", {"a": np.ones(2, "f4"), "b": PROGRAMS[called](canary)})
    assert f"refused: its pickle calls {called}; marlin only rebuilds tensors" in refused(path)
    assert not canary.exists()


ORDERED_DICT = name("collections", "OrderedDict").data
TENSOR = name("torch._utils", "_rebuild_tensor_v2").data
OPCODES = {
    "OBJ": (b"(" + ORDERED_DICT + b"o", "uses the opcode OBJ"),
    "NEWOBJ": (ORDERED_DICT + b")\x81", "uses the opcode NEWOBJ"),
    "EXT1": (b"\x82\x01", "uses the opcode EXT1"),
    "PERSID": (b"Pstorage\n", "uses the opcode PERSID"),
    "DUP, for what grows without end": (b"]2", "uses the opcode DUP"),
    "text opcodes of protocol 0": (b"(I1\nL2L\nt", "uses the opcode INT"),
    "attributes of a list": (b"]}b", "changes a list"),
    "attributes of a name": (TENSOR + b"}b", "changes a Name"),
    "items of a list": (b"]K\x01K\x02s", "changes a list"),
    "appending to a dict": (b"}K\x01a", "changes a dict"),
    "a call of a number": (b"K\x01)R", "calls a value of type int"),
    "a call without a tuple": (ORDERED_DICT + b"NR", "calls collections.OrderedDict"),
    "a call of a storage's class": (name("torch", "FloatStorage").data + b")R", "calls torch.FloatStorage"),
    "a filled OrderedDict": (ORDERED_DICT + b"]\x85R", "an OrderedDict is not filled as torch"),
    "a tensor of nothing": (TENSOR + b")R", "a tensor is not described as torch"),
    "a tensor of text": (TENSOR + b"(" + text("a") + b"K\x00))tR", "a tensor is not described as torch"),
    "a parameter of text": (
        name("torch._utils", "_rebuild_parameter").data + text("a") + b"\x85R",
        "a parameter is not",
    ),
    "a size of a number": (name("torch", "Size").data + b"K\x01\x85R", "a torch.Size is not made"),
    "a reference to a module": (text("module") + b"\x85Q", "refers to something other than a storage"),
    "a storage of no class": (b"(" + text("storage") * 4 + b"K\x01tQ", "a storage is of no class"),
    "a name that is not text": (b"K\x01K\x02\x93", "a name that is not text"),
    "a tuple as a key": (b"}))\x86K\x01s", "has a tuple as a key"),
    "a number of a million bits": (b"\x8b" + struct.pack("<i", 1 << 17) + b"\x7f" * (1 << 17), "a number of 10485"),
    "a string longer than the file": (b"X\xff\xff\xff\x7f", "damaged pickle"),
    "a string of 2^63 bytes": (b"\x8d" + b"\xff" * 7 + b"\x7f", "damaged pickle"),
    "a memo that was not written": (b"h\xff", "damaged pickle: nothing was remembered as 255"),
    "an empty stack": (b"\x86", "damaged pickle"),
    "no mark": (b"t", "damaged pickle"),
    "an odd number of items": (b"}(K\x01u", "damaged pickle"),
    "an unknown opcode": (b"\xfe", "damaged pickle"),
    "broken UTF-8": (b"X\x01\x00\x00\x00\xff", "damaged pickle"),
}


@pytest.mark.parametrize("case", OPCODES)
def test_pickles_that_torch_does_not_write(case, tmp_path):
    opcodes, says = OPCODES[case]
    path = write_zip(tmp_path / "model.pt", Document(b"\x80\x02" + opcodes + b"."))
    assert says in refused(path)


def test_a_pickle_that_does_not_end(tmp_path):
    assert "damaged pickle: pickle exhausted before seeing STOP" in refused(
        write_zip(tmp_path / "model.pt", Document(b"\x80\x02}"))
    )


def test_pickles_made_to_take_for_ever(tmp_path):
    # Each of 64 tuples holds the one before twice: 2^64 entries for whoever walks or prints them.
    laughs = b"]" + b"".join(bytes((*b"q", i, *b"h", i, 0x86)) for i in range(64))
    assert "holds no dict but a tuple" in refused(write_zip(tmp_path / "a.pt", Document(b"\x80\x02" + laughs + b".")))
    state = write_legacy(tmp_path / "b.pt", {"a": Opcodes(laughs), "model_config": Opcodes(laughs)})
    assert "holds no tensors" in refused(state)
    # A memo index of 2^31 makes Python's own unpickler ask for 16 GiB.
    jump = b"\x80\x02}r\xff\xff\xff\x7f"
    assert "holds no tensors" in refused(write_zip(tmp_path / "c.pt", Document(jump + b".")))
    assert read_pickle(io.BytesIO(jump + b"."), "x") == {}


# Files of torch.save


NUMBERS = np.arange(6, dtype="f4")
TENSORS = {
    "storage shorter than its tensor": (View(NUMBERS, (7,), (1,)), "reaches beyond its storage"),
    "stride beyond the storage": (View(NUMBERS, (2, 3), (4, 1)), "reaches beyond its storage"),
    "offset beyond the storage": (View(NUMBERS, (1,), (1,), offset=6), "reaches beyond its storage"),
    "stride that overflows": (View(NUMBERS, (2,), (1 << 62,)), "reaches beyond its storage"),
    "shape that overflows": (View(NUMBERS, (1 << 40, 1 << 40), (0, 0)), "reaches beyond its storage"),
    "a stride of zero": (View(NUMBERS, (1 << 30,), (0,)), "reaches beyond its storage"),
    "negative shape": (View(NUMBERS, (-2, -3), (3, 1)), "negative or no whole number"),
    "negative stride": (View(NUMBERS, (6,), (-1,), offset=5), "negative or no whole number"),
    "negative offset": (View(NUMBERS, (6,), (1,), offset=-1), "negative or no whole number"),
    "a shape of 70 bits": (View(NUMBERS, (1 << 70,), (1,)), "negative or no whole number"),
    "a shape of text": (View(NUMBERS, ("6",), (1,)), "negative or no whole number"),
    "true as a shape": (View(NUMBERS, (True,), (1,)), "negative or no whole number"),
    "fewer strides than dimensions": (View(NUMBERS, (2, 3), (3,)), "2 dimensions and 1 strides"),
    "a hundred dimensions": (View(NUMBERS, (1,) * 100, (1,) * 100), "100 dimensions"),
    "more elements than bytes": (View(NUMBERS, (100,), (1,), elements=100), "has 24 bytes, not the 100 elements"),
    "wider elements than bytes": (View(NUMBERS, (6,), (1,), kind="Double"), "has 24 bytes, not the 6 elements"),
    "an unknown class of storage": (View(NUMBERS, (6,), (1,), kind="Complex"), "calls torch.ComplexStorage"),
}


@pytest.mark.parametrize("case", TENSORS)
def test_tensors_that_lie_about_their_storage(case, tmp_path):
    view, says = TENSORS[case]
    assert says in refused(write_zip(tmp_path / "model.pt", {"a": view}))


def test_many_views_of_one_storage(tmp_path):
    # A thousand whole views of 400 kB would fill 400 MB; the file has half.
    storage = np.zeros(100_000, "f4")
    content = document({"0": View(storage, storage.shape, (1,))})
    view = content.pickle[content.pickle.index(TENSOR) : -2]
    content.pickle = b"\x80\x02}(" + b"".join(text(str(i)) + view for i in range(1000)) + b"u."
    assert "its tensors would take 400,000,000 bytes" in refused(write_zip(tmp_path / "model.pt", content))


STATE = {"a": np.ones(64, "f4")}


def with_bytes_changed(path: Path, old: bytes, new: bytes) -> Path:
    content = path.read_bytes()
    assert old in content
    path.write_bytes(content.replace(old, new))
    return path


TORCH_FILES = {
    "empty": (lambda p: p.write_bytes(b""), "is empty, expected what torch.save"),
    "text": (lambda p: p.write_text("<html>"), "is a page of HTML"),
    "a folder": (lambda p: p.mkdir(), "found none"),
    "a bare pickle": (lambda p: p.write_bytes(pickle.dumps({"a": 1})), "a bare pickle"),
    "a bare pickle of protocol 0": (lambda p: p.write_bytes(b"cos\nsystem\n(S'true'\ntR."), "is text, expected"),
    "a zip without data.pkl": (lambda p: write_zip(p, STATE, leave_out="archive/data.pkl"), "with 0 data.pkl"),
    "two data.pkl": (lambda p: write_zip(p, STATE, twice="archive/data.pkl"), "with 2 data.pkl"),
    "a missing storage": (lambda p: write_zip(p, STATE, leave_out="archive/data/0"), "the bytes of 'a'"),
    "big-endian": (lambda p: write_zip(p, STATE, byteorder="big"), "another byte order"),
    "compressed": (lambda p: write_zip(p, STATE, compression=zipfile.ZIP_DEFLATED), "compressed or encrypted"),
    "a list": (lambda p: write_zip(p, [1]), "holds no dict but a list"),
    "no tensors": (lambda p: write_zip(p, {"epoch": 3}), "holds no tensors"),
    "whole numbers": (lambda p: write_zip(p, {"a": np.arange(3)}), "of no known layout (found 'a')"),
    "changed weights": (
        lambda p: with_bytes_changed(write_zip(p, STATE), STATE["a"].tobytes(), bytes(256)),
        "the bytes of 'a' fail their checksum",
    ),
    "a changed pickle": (
        lambda p: with_bytes_changed(write_zip(p, STATE), b"_rebuild_tensor_v2", b"_rebuild_tensor_v3"),
        "its data.pkl fails its checksum",
    ),
    "a zip without its directory": (
        lambda p: p.write_bytes(write_zip(p, STATE).read_bytes()[:-30]),
        "damaged zip file",
    ),
    "entries moved": (
        lambda p: p.write_bytes(write_zip(p, STATE).read_bytes().replace(b"PK\x03\x04archive", b"XX", 1)[100:]),
        "is |starts with|damaged|outside",
    ),
    "legacy, cut in a storage": (
        lambda p: p.write_bytes(write_legacy(p, STATE).read_bytes()[:-1]),
        "is cut short: the storage '0'",
    ),
    "legacy, cut in a pickle": (lambda p: p.write_bytes(write_legacy(p, STATE).read_bytes()[:200]), "damaged pickle"),
    "legacy, another version": (lambda p: write_legacy(p, STATE, version=9), "unknown version"),
}


class Stream:
    """A file that cannot go back: a writer puts sizes behind the data."""

    def __init__(self, file) -> None:
        self.write, self.flush = file.write, file.flush


@pytest.mark.parametrize("how", ["zip64", "streamed"])
def test_zip_files_as_other_writers_make_them(how, tmp_path):
    path = tmp_path / "model.pt"
    with zipfile.ZipFile(write_zip(tmp_path / "plain.pt", STATE)) as archive:
        entries = {entry.filename: archive.read(entry) for entry in archive.infolist()}
    with path.open("wb") as target, zipfile.ZipFile(Stream(target) if how == "streamed" else target, "w") as archive:
        for entry, data in entries.items():
            with archive.open(entry, "w", force_zip64=how == "zip64") as file:
                file.write(data)
    file = TorchFile(path)
    assert np.array_equal(np.array(file.arrays(file.document)["a"]), STATE["a"])


def test_a_zip_file_whose_entries_share_bytes(tmp_path):
    """The directory names one storage under another's place: a file of any size would be summed once for each."""
    path = tmp_path / "model.pt"
    write_zip(path, {"a": np.ones(64, "f4"), "b": np.ones(64, "f4")})
    content = bytearray(path.read_bytes())
    offsets = {}
    at = 0
    while (at := content.find(b"PK\x01\x02", at)) >= 0:
        length = int.from_bytes(content[at + 28 : at + 30], "little")
        offsets[bytes(content[at + 46 : at + 46 + length])] = at + 42
        at += 46
    first, second = offsets[b"archive/data/0"], offsets[b"archive/data/1"]
    content[second : second + 4] = content[first : first + 4]
    path.write_bytes(content)
    assert "the entries 'archive/data/0' and 'archive/data/1' overlap" in refused(path)


def test_a_directory_of_many_megabytes(tmp_path):
    path = tmp_path / "model.pt"
    with zipfile.ZipFile(path, "w") as archive:
        archive.comment = b""
        for index in range(100):
            archive.writestr(f"{index}/" + "x" * 60_000, b"")
    assert "its list of entries has more than 4,194,304 bytes" in refused(path)


def test_names_of_entries_are_quoted_and_cut(tmp_path):
    name = "archive/\x1b[31m" + "x" * 9999
    path = tmp_path / "model.pt"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(name, b"aaaaaaaaaaaaaaaa")
    message = refused(path)
    assert r"the entry 'archive/\x1b[31mxxx" in message and len(message) < 400


LARGE = {
    "dicts without end": (b"}" * 400_001, "more than 400,000 instructions"),
    "marks without end": (b"(" * 400_001, "more than 400,000 instructions"),
    "a number of a million digits": (b"\x8b" + struct.pack("<i", 1 << 20) + b"\x7f" * (1 << 20), "a number of 8388607 bits"),
    "shapes of a thousand numbers, again and again": (
        b"(" + b"K\x01" * 1000 + b"tq\x00" + (name("torch", "Size").data + b"h\x00\x85R") * 9,
        "a torch.Size of 1,000 dimensions",
    ),
    "a tensor of a thousand dimensions": (
        b"(" + b"K\x01" * 1000 + b"tq\x00" + TENSOR + b"((" + text("storage") + name("torch", "FloatStorage").data
        + text("0") + text("cpu") + b"K\x01tQK\x00h\x00h\x00tR",
        "a tensor has 1,000 dimensions",
    ),
    "a storage of a thousand parts": (b"(" + text("storage") * 1000 + b"tQ", "refers to something other than a storage"),
    "tuples in tuples": (b")" + b"\x85" * 100_000, "holds no dict but a tuple"),
    "a dict that holds itself as the model": (b"}q\x00" + text("state_dict") + b"h\x00s", "holds no tensors"),
    "two dicts that hold each other": (
        b"}q\x00}q\x01" + text("model") + b"h\x00s" + b"h\x00" + text("state_dict") + b"h\x01s", "holds no tensors"
    ),
    "a text of a million letters as a key": (b"}" + text("\x1b" * (1 << 20)) + b"K\x01s", "holds no tensors"),
}  # fmt: skip


@pytest.mark.parametrize("write", [write_zip, write_legacy])
@pytest.mark.parametrize("case", LARGE)
def test_pickles_that_grow(case, write, tmp_path):
    opcodes, says = LARGE[case]
    message = refused(write(tmp_path / "model.pt", Opcodes(opcodes)))
    assert says in message and len(message) < 400


def test_a_legacy_file_cut_anywhere(tmp_path):
    content = write_legacy(tmp_path / "model.pt", {"a": np.ones(3, "f4"), "b": np.ones((2, 2), "f8")}).read_bytes()
    path = tmp_path / "cut.pt"
    for length in range(0, len(content), 5):
        path.write_bytes(content[:length])
        assert re.search("damaged|cut short|starts with|is empty|is text|a bare pickle", refused(path))


@pytest.mark.parametrize("case", TORCH_FILES)
def test_damaged_files_of_torch(case, tmp_path):
    make, says = TORCH_FILES[case]
    path = tmp_path / "model.pt"
    make(path)
    message = refused(path)
    assert any(part in message for part in says.split("|")), message


@pytest.mark.parametrize("stem", ["megabyte_pytorch-2-stages", "megabyte_pytorch-3-stages"])
def test_files_with_random_bytes_changed(stem, tmp_path):
    """Whatever is changed or cut, the file is read or refused; nothing else ever comes out."""
    content = (FOREIGN / f"{stem}.pt").read_bytes()
    generator = random.Random(0)
    path = tmp_path / "model.pt"
    outcomes = {"read": 0, "refused": 0}
    # Metadata are the first bytes of the one format, and stand all over the other.
    last = 6000 if stem.endswith("2-stages") else len(content)
    for _ in range(150):
        changed = bytearray(content)
        for _ in range(generator.choice((1, 3))):
            changed[generator.randrange(20, last)] = generator.randrange(256)
        path.write_bytes(changed[: generator.choice((len(content), generator.randrange(len(content))))])
        try:
            file = TorchFile(path)
            if isinstance(file.document, dict):
                file.arrays({str(key): value for key, value in file.document.items() if hasattr(value, "storage")})
            outcomes["read"] += 1
        except CheckpointError as error:
            assert str(error).startswith(str(path)) and str(error).isprintable()
            outcomes["refused"] += 1
    assert min(outcomes.values()) > 5, outcomes
