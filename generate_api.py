"""Write docs/api.md, the reference of the contract, from the comments in ``protos/mxgpt/v1/*.proto``.

protoc parses the files, comments included, into a FileDescriptorSet; this is that set as Markdown.
"""

from __future__ import annotations

import tempfile
import textwrap
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

from google.protobuf.descriptor_pb2 import (
    DescriptorProto,
    EnumDescriptorProto,
    FieldDescriptorProto,
    FileDescriptorProto,
    FileDescriptorSet,
    MethodDescriptorProto,
    ServiceDescriptorProto,
)
from grpc_tools import protoc

ROOT = Path(__file__).parent
FILES = ("executor", "tokenizer", "loader")  # in the order of the page

# Numbers of the fields of descriptor.proto, of which the paths of comments are made.
MESSAGES, ENUMS, SERVICES = 4, 5, 6  # of a FileDescriptorProto
MESSAGE_FIELDS, ENUM_VALUES, SERVICE_METHODS = 2, 2, 2
SYNTAX = 12

WIDTH = 160  # of a line of prose
INTRODUCTION = (
    "The contract `mxgpt.v1`, made from the comments in [protos/mxgpt/v1](../protos/mxgpt/v1) by `make api`. Every "
    "server also has `grpc.health.v1.Health` and reflection. [clients.md](clients.md) shows calls in three languages, "
    "[errors.md](errors.md) lists the reasons of errors, [troubleshooting.md](troubleshooting.md) what to do then."
)


@dataclass(frozen=True)
class Source:
    """One file with the comment of each of its parts."""

    file: FileDescriptorProto
    comments: Mapping[tuple[int, ...], str]

    def comment(self, *path: int) -> str:
        """The comment before a part, its lines joined and its paragraphs apart."""
        paragraphs = self.comments.get(path, "").strip().split("\n\n")
        return "\n\n".join(" ".join(paragraph.split()) for paragraph in paragraphs)


def page() -> str:
    """The whole page."""
    lines = ["# The API\n", *_prose(INTRODUCTION)]
    for source in _sources():
        lines += _file(source)
    return "\n".join(lines)


def _sources() -> list[Source]:
    """The parsed files.

    Raises:
        RuntimeError: when protoc refuses a file.
    """
    protos = ROOT / "protos"
    with tempfile.TemporaryDirectory() as directory:
        out = Path(directory) / "descriptors"
        well_known = Path(str(files("grpc_tools"))) / "_proto"
        names = [f"mxgpt/v1/{name}.proto" for name in FILES]
        arguments = [f"-I{protos}", f"-I{well_known}", "--include_source_info", f"--descriptor_set_out={out}", *names]
        if protoc.main(["protoc", *arguments]) != 0:
            raise RuntimeError(f"protoc failed on {protos}")
        parsed = {file.name: file for file in FileDescriptorSet.FromString(out.read_bytes()).file}
    return [Source(parsed[name], _comments(parsed[name])) for name in names]


def _comments(file: FileDescriptorProto) -> dict[tuple[int, ...], str]:
    comments = {}
    for location in file.source_code_info.location:
        text = "\n".join([*location.leading_detached_comments, location.leading_comments])
        # A line's first blank belongs to the comment's mark.
        comments[tuple(location.path)] = "\n".join(line.strip() for line in text.split("\n"))
    return comments


def _file(source: Source) -> Iterator[str]:
    name = Path(source.file.name).stem
    yield f"## {name}.proto\n"
    yield from _prose(source.comment(SYNTAX))
    for index, service in enumerate(source.file.service):
        yield from _service(source, service, index)
    for index, message in enumerate(source.file.message_type):
        yield from _message(source, message, index)
    for index, enum in enumerate(source.file.enum_type):
        yield from _enum(source, enum, index)


def _service(source: Source, service: ServiceDescriptorProto, index: int) -> Iterator[str]:
    yield f"### {service.name}\n"
    yield from _prose(source.comment(SERVICES, index))
    for method_index, method in enumerate(service.method):
        yield f"#### {service.name}/{method.name}\n"
        yield f"{_signature(method)}\n"
        yield from _prose(source.comment(SERVICES, index, SERVICE_METHODS, method_index))


def _signature(method: MethodDescriptorProto) -> str:
    request, response = (
        ("stream of " if streams else "") + _link(name)
        for name, streams in (
            (method.input_type, method.client_streaming),
            (method.output_type, method.server_streaming),
        )
    )
    return f"{request} → {response}"


def _message(source: Source, message: DescriptorProto, index: int) -> Iterator[str]:
    yield f"### {message.name}\n"
    yield from _prose(source.comment(MESSAGES, index))
    entries = {nested.name: nested for nested in message.nested_type if nested.options.map_entry}
    assert len(entries) == len(message.nested_type), f"{message.name} holds messages that the page would not show"
    assert not message.enum_type, f"{message.name} holds enums that the page would not show"
    rows = [
        (
            f"`{field.name}` = {field.number}",
            _type(message, field, entries),
            source.comment(MESSAGES, index, MESSAGE_FIELDS, field_index),
        )
        for field_index, field in enumerate(message.field)
    ]
    yield from _table(("field", "type", "meaning"), rows)


def _type(message: DescriptorProto, field: FieldDescriptorProto, entries: Mapping[str, DescriptorProto]) -> str:
    """A field's type as the .proto file spells it, messages and enums as links."""
    entry = entries.get(field.type_name.rpartition(".")[2])
    if entry is not None:
        return f"map of {_plain_type(entry.field[0])} to {_plain_type(entry.field[1])}"
    own = _plain_type(field)
    if field.label == FieldDescriptorProto.LABEL_REPEATED:
        return f"repeated {own}"
    if field.proto3_optional:
        return f"optional {own}"
    if field.HasField("oneof_index"):
        return f"{own}, one of `{message.oneof_decl[field.oneof_index].name}`"
    return own


def _plain_type(field: FieldDescriptorProto) -> str:
    if field.type_name:
        return _link(field.type_name)
    return FieldDescriptorProto.Type.Name(field.type).removeprefix("TYPE_").lower()


def _enum(source: Source, enum: EnumDescriptorProto, index: int) -> Iterator[str]:
    yield f"### {enum.name}\n"
    yield from _prose(source.comment(ENUMS, index))
    rows = [
        (f"`{value.name}` = {value.number}", source.comment(ENUMS, index, ENUM_VALUES, value_index))
        for value_index, value in enumerate(enum.value)
    ]
    yield from _table(("value", "meaning"), rows)


def _prose(text: str) -> Iterator[str]:
    for paragraph in text.split("\n\n"):
        yield textwrap.fill(paragraph, WIDTH, break_long_words=False, break_on_hyphens=False) + "\n"


def _table(head: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> Iterator[str]:
    lines = [" | ".join(cell.replace("|", "\\|").replace("\n\n", "<br>") for cell in row) for row in rows]
    if lines:
        yield f"| {' | '.join(head)} |"
        yield "| --- " * len(head) + "|"
        yield from (f"| {line} |" for line in lines)
        yield ""


def _link(type_name: str) -> str:
    """A message or enum of the contract, by its full name; well-known types stay without a link."""
    package, _, name = type_name.removeprefix(".").rpartition(".")
    return f"[{name}](#{name.lower()})" if package == "mxgpt.v1" else f"{package}.{name}"


if __name__ == "__main__":
    (ROOT / "docs" / "api.md").write_text(page())
