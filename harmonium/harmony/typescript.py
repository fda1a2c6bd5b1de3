"""JSON schema -> the TypeScript in which the gpt-oss models were shown their tools.

Byte for byte what the Harmony library writes for what it knows (object, array, scalar types, string enums,
oneOf, lists of types, nullable, default, title, description, examples), and a proper type where it writes
`any`: anyOf, allOf, $ref (recursive too), const, enums of any type, additionalProperties, tuples, null.
docs/harmony.md names the differences.

Source of the layout: openai/harmony:src/encoding.rs, json_schema_to_typescript.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple
from urllib.parse import unquote

from harmonium.errors import HarmonyError
from harmonium.harmony.json_value import check_json_depth, json_text, resolve

MAX_DEPTH = 100
"""Schemas nested in schemas, $ref included."""
MAX_NODES = 50_000
MAX_CHARACTERS = 1_000_000
"""Bounds on what one schema may unfold to: a few $ref can otherwise double it again and again."""

Schema = Mapping[str, Any]


def typescript(schema: object) -> str:
    """The TypeScript type for a JSON schema; `any` for what is no schema.

    Raises HarmonyError when it is nested too deep, unfolds to too much, or holds what JSON cannot.
    """
    check_json_depth(schema)
    return _Writer(schema).root()


def comment_lines(text: str) -> list[str]:
    """The lines of a description; none for "". A closing line end adds no empty line."""
    lines = text.split("\n")
    if lines[-1] == "":
        lines.pop()
    return [line.removesuffix("\r") for line in lines]


class _Type(NamedTuple):
    """text: the type. is_joined: it is a union or intersection, so `[]` or `&` after it needs parentheses."""

    text: str
    is_joined: bool = False


_ANY = _Type("any")
_SCALARS = {"string": "string", "number": "number", "integer": "number", "boolean": "boolean", "null": "null"}


class _Writer:
    """Writes one schema. Holds what a $ref may point to, which are open, and what is left of the limits."""

    def __init__(self, root: object) -> None:
        self._root = root
        self._open_refs = ["#"]
        self._recursive: set[str] = set()
        self._nodes_left = MAX_NODES
        self._characters_left = MAX_CHARACTERS

    def root(self) -> str:
        written = self._type(self._root, "", 0)
        return self._labelled("#", written, "").text

    def _type(self, schema: object, indent: str, depth: int) -> _Type:
        if depth > MAX_DEPTH:
            raise HarmonyError(f"the JSON schema is nested more than {MAX_DEPTH} levels deep")
        self._charge()
        if not isinstance(schema, Mapping):
            return _ANY
        one_of = _list(schema, "oneOf")
        if one_of and not _is_structured(schema):
            return self._one_of_lines(one_of, indent, depth)
        parts = [self._union(_list(schema, key), indent, depth) for key in ("anyOf", "oneOf")]
        parts += [self._nullable_type(variant, indent, depth) for variant in _list(schema, "allOf")]
        parts = [part for part in parts if part.text != "any"]
        if not parts or _is_structured(schema):
            parts.insert(0, self._base(schema, indent, depth))
        return _joined((part for part in parts if part.text != "any"), " & ")

    def _base(self, schema: Schema, indent: str, depth: int) -> _Type:
        """The type by what the schema itself says, without its anyOf, oneOf, allOf."""
        if isinstance(schema.get("$ref"), str):
            return self._ref(schema["$ref"], indent, depth)
        if "const" in schema:
            return self._literals([schema["const"]])
        if _list(schema, "enum"):
            return self._literals(schema["enum"])
        kind = schema.get("type")
        if isinstance(kind, list):
            kinds = [name for name in kind if isinstance(name, str)]
            if kinds:
                types = [self._named(name, schema, indent, depth, True) for name in kinds]
                return types[0] if len(types) == 1 else _Type(" | ".join(part.text for part in types), True)
        if isinstance(kind, str):
            return self._named(kind, schema, indent, depth, False)
        if any(key in schema for key in ("properties", "additionalProperties", "patternProperties")):
            return self._object(schema, indent, depth)
        if "items" in schema or "prefixItems" in schema:
            return self._array(schema, indent, depth)
        return _ANY

    def _named(self, kind: str, schema: Schema, indent: str, depth: int, is_one_of_many: bool) -> _Type:
        if kind == "object":
            if is_one_of_many and not any(key in schema for key in ("properties", "additionalProperties")):
                return _Type("object")
            return self._object(schema, indent, depth)
        if kind == "array":
            return self._array(schema, indent, depth)
        return _Type(_SCALARS.get(kind, "any"))

    def _one_of_lines(self, variants: list[Any], indent: str, depth: int) -> _Type:
        """One variant a line, with its description and default behind it, as the Harmony library has it."""
        lines = []
        for variant in variants:
            text = self._nullable_type(variant, f"{indent}   ", depth).text
            comments = self._trailing(variant, quote_enum=True)
            lines.append(f"\n{indent} | {text}{comments}")
        return _Type("".join(lines), True)

    def _trailing(
        self, variant: object, quote_enum: bool, seen: object = None, with_description: bool = True
    ) -> str:
        """` // description default: ...` of a variant; `seen`: a description that stands above already."""
        if not isinstance(variant, Mapping):
            return ""
        comments = []
        description = variant.get("description")
        if with_description and isinstance(description, str) and description != seen:
            comments.append(self._one_line(description))
        if "default" in variant:
            comments.append(f"default: {self._default(variant, quote_enum)}")
        return f" // {' '.join(comments)}" if comments else ""

    def _union(self, variants: list[Any], indent: str, depth: int) -> _Type:
        return _joined((self._nullable_type(variant, indent, depth) for variant in variants), " | ")

    def _nullable_type(self, schema: object, indent: str, depth: int) -> _Type:
        written = self._type(schema, indent, depth + 1)
        # The test for the word is the Harmony library's; it keeps `string | null | null` away.
        if isinstance(schema, Mapping) and schema.get("nullable") is True and "null" not in written.text:
            return _Type(f"{written.text} | null", True)
        return written

    def _literals(self, values: list[Any]) -> _Type:
        return _joined((_Type(self._literal(value)) for value in values), " | ")

    def _literal(self, value: object) -> str:
        text = (
            f'"{value}"'
            if isinstance(value, str) and not _UNSAFE_IN_QUOTES.search(value)
            else json_text(value)
        )
        self._charge_text(text)
        return text

    def _ref(self, ref: str, indent: str, depth: int) -> _Type:
        if ref in self._open_refs:
            self._recursive.add(ref)
            return _Type(_ref_name(ref))
        found, target = resolve(self._root, ref)
        if not found:
            return _ANY
        self._open_refs.append(ref)
        written = self._type(target, indent, depth + 1)
        self._open_refs.pop()
        return self._labelled(ref, written, indent)

    def _labelled(self, ref: str, written: _Type, indent: str) -> _Type:
        """With its name in a comment above, where the name is used inside: a recursive type."""
        if ref not in self._recursive:
            return written
        self._recursive.discard(ref)
        return _Type(f"{indent}// type {_ref_name(ref)}\n{written.text}", written.is_joined)

    def _array(self, schema: Schema, indent: str, depth: int) -> _Type:
        items = schema.get("items")
        fixed = _list(schema, "prefixItems") or (items if isinstance(items, list) else [])
        if fixed:
            texts = [self._nullable_type(item, indent, depth).text for item in fixed]
            if isinstance(items, Mapping):
                texts.append(f"...{_grouped(self._nullable_type(items, indent, depth))}[]")
            return _Type(f"[{', '.join(texts)}]")
        if "items" not in schema:
            return _Type("Array<any>")
        if _is_string_enum(items):
            # As the Harmony library writes it, and so as the model was shown it, though it lacks parentheses.
            return _Type(f"{self._type(items, indent, depth + 1).text}[]")
        written = self._one_line_union(items, indent, depth)
        return _Type(f"{_grouped(written)}[]")

    def _one_line_union(self, schema: object, indent: str, depth: int) -> _Type:
        """As _nullable_type, but a oneOf in one line: inside `( )[]` the lines would be hard to read."""
        if isinstance(schema, Mapping) and _list(schema, "oneOf") and "anyOf" not in schema:
            schema = {"anyOf" if key == "oneOf" else key: value for key, value in schema.items()}
        return self._nullable_type(schema, indent, depth)

    def _object(self, schema: Schema, indent: str, depth: int) -> _Type:
        properties = schema.get("properties")
        if not isinstance(properties, Mapping):
            properties = {}
        others = self._other_properties(schema, indent, depth)
        required = {name for name in _list(schema, "required") if isinstance(name, str)}
        description = schema.get("description")
        out = [self._comment(description, indent)] if isinstance(description, str) else []
        if others and not properties:
            return _Type("".join([*out, f"{{ [key: string]: {others} }}"]))
        out.append("{\n")
        for key, value in properties.items():
            name = f"{self._key(str(key))}{'' if key in required else '?'}"
            if isinstance(value, Mapping) and "oneOf" in value and not _is_structured(value):
                out.append(self._one_of_property(name, value, indent, depth))
            else:
                out.append(self._property(name, value, indent, depth))
        if others:
            out.append(f"{indent}[key: string]: {others},\n")
        out.append(f"{indent}}}")
        return _Type("".join(out))

    def _other_properties(self, schema: Schema, indent: str, depth: int) -> str:
        """The type of properties that have no name of their own; "" where the schema gives none."""
        kinds = []
        patterns = schema.get("patternProperties")
        if isinstance(patterns, Mapping):
            kinds += list(patterns.values())
        additional = schema.get("additionalProperties")
        if isinstance(additional, Mapping):
            kinds.append(additional)
        return self._union(kinds, f"{indent}    ", depth).text if kinds else ""

    def _property(self, name: str, value: object, indent: str, depth: int) -> str:
        out = self._property_comments(value, indent, with_description=True)
        out += f"{indent}{name}: {self._nullable_type(value, f'{indent}    ', depth).text},"
        if isinstance(value, Mapping) and "default" in value and "oneOf" not in value:
            out += f" // default: {self._default(value, False)}"
        return f"{out}\n"

    def _one_of_property(self, name: str, value: Schema, indent: str, depth: int) -> str:
        out = self._property_comments(value, indent, with_description=False)
        variants = _list(value, "oneOf")
        if not variants:
            return f"{out}{indent}{name}: any,\n"
        description = value.get("description")
        first = variants[0].get("description") if isinstance(variants[0], Mapping) else None
        is_above = isinstance(description, str) and description != first
        if is_above:
            out += self._comment(description, indent)
        if "default" in value:
            out += f"{indent}// default: {self._default(value, False)}\n"
        out += f"{indent}{name}:\n"
        for index, variant in enumerate(variants):
            text = self._nullable_type(variant, f"{indent}   ", depth).text
            is_said = index == 0 and is_above
            comments = self._trailing(
                variant, quote_enum=False, seen=description, with_description=not is_said
            )
            out += f"{indent} | {text}{comments}\n"
        return f"{out}{indent},\n"

    def _property_comments(self, value: object, indent: str, with_description: bool) -> str:
        if not isinstance(value, Mapping):
            return ""
        out = ""
        if isinstance(value.get("title"), str):
            out += self._comment(value["title"], indent) + f"{indent}//\n"
        if with_description and isinstance(value.get("description"), str):
            out += self._comment(value["description"], indent)
        examples = _list(value, "examples")
        if examples:
            quoted = [example for example in examples if isinstance(example, str)]
            out += f"{indent}// Examples:\n"
            out += "".join(f'{indent}// - "{self._one_line(example)}"\n' for example in quoted)
        return out

    def _comment(self, text: object, indent: str) -> str:
        self._charge_text(str(text))
        lines = [line.removesuffix("\r") for line in str(text).split("\n")]
        if len(lines) > 1 and lines[-1] == "":
            lines.pop()
        return "".join(f"{indent}// {line}\n" for line in lines)

    def _one_line(self, text: str) -> str:
        self._charge_text(text)
        return re.sub(r"\s*[\r\n]+\s*", " ", text)

    def _default(self, schema: Schema, quote_enum: bool) -> str:
        value = schema["default"]
        if isinstance(value, str) and not quote_enum and _list(schema, "enum"):
            return self._one_line(value)
        return self._literal(value)

    def _key(self, key: str) -> str:
        self._charge_text(key)
        return json_text(key) if _CONTROL.search(key) else key

    def _charge(self) -> None:
        self._nodes_left -= 1
        if self._nodes_left < 0:
            raise HarmonyError(f"the JSON schema unfolds to more than {MAX_NODES:,} types")

    def _charge_text(self, text: str) -> None:
        self._characters_left -= len(text)
        if self._characters_left < 0:
            raise HarmonyError(f"the JSON schema's text unfolds to more than {MAX_CHARACTERS:,} characters")


_CONTROL = re.compile(r"[\x00-\x1f]")
_UNSAFE_IN_QUOTES = re.compile(r'[\x00-\x1f"\\]')


def _list(schema: Schema, key: str) -> list[Any]:
    value = schema.get(key)
    return value if isinstance(value, list) else []


def _is_structured(schema: Schema) -> bool:
    """Whether a schema says more by itself than the bare name of a type, which its anyOf or oneOf refine."""
    keys = (
        "$ref",
        "const",
        "properties",
        "additionalProperties",
        "patternProperties",
        "items",
        "prefixItems",
    )
    return any(key in schema for key in keys) or bool(_list(schema, "enum"))


def _is_string_enum(schema: object) -> bool:
    return (
        isinstance(schema, Mapping)
        and schema.get("type") == "string"
        and bool(_list(schema, "enum"))
        and all(isinstance(value, str) for value in schema["enum"])
        and "const" not in schema
        and "$ref" not in schema
    )


def _joined(types: Iterable[_Type], operator: str) -> _Type:
    """Types with the operator between them, each once; `any` for none. A lone one stays as it is."""
    parts = list(dict.fromkeys(types))
    if not parts:
        return _ANY
    if len(parts) == 1:
        return parts[0]
    texts = [_grouped(part) if operator == " & " else part.text for part in parts]
    return _Type(operator.join(texts), True)


def _grouped(written: _Type) -> str:
    return f"({written.text})" if written.is_joined else written.text


def _ref_name(ref: str) -> str:
    return re.sub(r"[^0-9A-Za-z_$]", "_", unquote(ref.rsplit("/", 1)[-1].lstrip("#"))) or "Root"
