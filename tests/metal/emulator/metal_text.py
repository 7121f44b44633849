"""The text of Metal kernels: their parameters, their barriers, and the few changes after which it is C++."""

import re
from collections.abc import Mapping
from dataclasses import dataclass

COMMENT = re.compile(r"//[^\n]*|/\*.*?\*/", re.DOTALL)
BARRIER = re.compile(r"\b(?:metal::)?(?:threadgroup|simdgroup)_barrier\s*\([^;]*\)\s*;")
HOST_NAME = re.compile(r"^template \[\[host_name\([^;]*;", re.MULTILINE)
FUNCTION_CONSTANT = re.compile(r"constant\s+(\w+)\s+(\w+)\s+\[\[function_constant\(\d+\)\]\]\s*;")
ARRAY_PARAMETER = re.compile(r"\b((?:constant|device|threadgroup)\s+(?:const\s+)?\w+)\s+(\w+)\[\w*\](?=\s*[,)])")

# A variable in threadgroup memory: `threadgroup float tile[4][8], sums[2];`. Not a pointer, a reference or a parameter.
THREADGROUP_VARIABLES = re.compile(
    r"""(?<![\w(,])threadgroup\s+
    (?P<type>(?:(?:metal|mlx)::|typename\s+)*(?!const\b|constant\b)[A-Za-z_][\w:]*(?:\s*<[^;(){}]*?>)?)\s+
    (?P<variables>\w+\s*(?:\[[^;{}]*?\]\s*)*(?:,\s*\w+\s*(?:\[[^;{}]*?\]\s*)*)*);""",
    re.VERBOSE,
)
VARIABLE_NAME = re.compile(r"(\w+)\s*(?:\[[^\[\]]*\]\s*)*(?:,|$)")

ALIASES = {"grid_size": "threads_per_grid", "thread_execution_width": "threads_per_simdgroup"}
ATTRIBUTES = {
    "thread_position_in_grid",
    "thread_position_in_threadgroup",
    "threadgroup_position_in_grid",
    "threads_per_threadgroup",
    "dispatch_threads_per_threadgroup",
    "threadgroups_per_grid",
    "threads_per_grid",
    "grid_origin",
    "thread_index_in_threadgroup",
    "thread_index_in_simdgroup",
    "simdgroup_index_in_threadgroup",
    "simdgroups_per_threadgroup",
    "dispatch_simdgroups_per_threadgroup",
    "threads_per_simdgroup",
    "thread_index_in_quadgroup",
    "quadgroup_index_in_threadgroup",
    "quadgroups_per_threadgroup",
    "dispatch_quadgroups_per_threadgroup",
}


@dataclass(frozen=True)
class Parameter:
    """One parameter of a kernel: a buffer by its index, or what the thread knows of itself by its attribute."""

    name: str
    buffer: int | None = None
    attribute: str | None = None


def barriers_of(text: str) -> list[str]:
    """Each threadgroup_barrier and simdgroup_barrier of a text, in order, as written; those in comments do not count."""
    return [match.group() for match in _barriers(text)]


def without_barrier(text: str, number: int) -> str:
    """The text without its barrier `number` (from 0, as in `barriers_of`); IndexError if there is none."""
    match = _barriers(text)[number]
    return text[: match.start()] + ";" + text[match.end() :]


def _barriers(text: str) -> list[re.Match[str]]:
    return list(BARRIER.finditer(COMMENT.sub(lambda comment: " " * len(comment.group()), text)))


def kernel_name(text: str) -> str:
    """The name of the one kernel function of a text."""
    names = set(re.findall(r"\[\[\s*kernel\s*\]\]\s+void\s+(\w+)\s*\(|\bkernel\s+void\s+(\w+)\s*\(", text))
    if len(names) != 1:
        raise ValueError(f"a text with one kernel is needed; this one has {len(names)}: {sorted(map(max, names))}")
    return max(names.pop())


def instance(text: str) -> str:
    """The kernel as MLX instantiates it, such as `f<float, 32>`; its name if it is no template."""
    match = re.search(r"\[\[\s*host_name\([^)]*\)\s*\]\]\s*\[\[\s*kernel\s*\]\]\s*decltype\((.*?)\)\s+\w", text, re.DOTALL)
    return match[1] if match else kernel_name(text)


def parameters(text: str, kernel: str) -> list[Parameter]:
    """The parameters of a kernel. Buffers without an index are numbered in order, as Metal does."""
    text = COMMENT.sub("", text)
    start = re.search(rf"\bvoid\s+{re.escape(kernel)}\s*\(", text)
    if start is None:
        raise ValueError(f"no kernel {kernel} in the text")
    found: list[Parameter] = []
    buffers = 0
    for declaration in _split(text[start.end() :]):
        name = re.search(r"(\w+)\s*(?:\[\[.*)?$", declaration.strip(), re.DOTALL)
        marks = re.search(r"\[\[(.*)\]\]", declaration, re.DOTALL)
        attribute = marks and ALIASES.get(marks[1].strip(), marks[1].strip())
        if name is None:
            raise ValueError(f"a parameter of {kernel} without a name: {declaration}")
        if attribute in ATTRIBUTES:
            found.append(Parameter(name[1], attribute=attribute))
            continue
        index = re.search(r"buffer\((\d+)\)", marks[1]) if marks else None
        if marks and index is None:
            raise ValueError(f"the emulator does not know the attribute [[{marks[1]}]] of {name[1]}")
        number = int(index[1]) if index else buffers
        found.append(Parameter(name[1], buffer=number))
        buffers = max(buffers, number + 1)
    return found


def _split(text: str) -> list[str]:
    """The comma-separated parts of a text up to the parenthesis that closes it."""
    parts, part, depth = [], "", 0
    for character in text:
        depth += (character in "([{<") - (character in ")]}>")
        if depth < 0 or (character == "," and depth == 0):
            parts.append(part)
            part = ""
        else:
            part += character
        if depth < 0:
            break
    return [part for part in parts if part.strip()]


def as_cpp(text: str, constants: Mapping[str, int | bool]) -> str:
    """The text as C++ for the shim: threadgroup variables become static memory that the runtime knows; lines stay in place."""
    return THREADGROUP_VARIABLES.sub(_static, _without_attributes(text, constants))


def as_cpp_with_address_spaces(text: str, constants: Mapping[str, int | bool]) -> str:
    """The text as C++ in which device, constant and threadgroup are address spaces: to be compiled, not run."""
    text = THREADGROUP_VARIABLES.sub(r"static threadgroup \g<type> \g<variables>;", _without_attributes(text, constants))
    return ARRAY_PARAMETER.sub(r"\1* \2", text)


def _static(match: re.Match[str]) -> str:
    names = VARIABLE_NAME.findall(match["variables"])
    registrations = " ".join(f"EMULATOR_THREADGROUP_MEMORY({name});" for name in names)
    return f"static {match['type']} {match['variables']}; {registrations}"


def _without_attributes(text: str, constants: Mapping[str, int | bool]) -> str:
    text = COMMENT.sub(lambda comment: "\n" * comment.group().count("\n"), text)  # one may end in "threadgroup"
    text = re.sub(r"\[\[\s*threadgroup\(\d+\)\s*\]\]", "", text)
    text = HOST_NAME.sub("", text)
    return FUNCTION_CONSTANT.sub(lambda m: f"static constexpr {m[1]} {m[2]} = {int(constants.get(m[2], 0))};", text)
