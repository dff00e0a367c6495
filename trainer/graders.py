"""Graders as OpenAI's API has them, in a JSON file: rewards that are arithmetic on texts, with no code of others.

    {"type": "string_check", "name": "exact", "input": "{{sample.output_text}}", "reference": "{{item.answer}}",
     "operation": "eq"}

`string_check`, `text_similarity` by `fuzzy_match`, and `multi`, which computes one number from several of them.
Templates read the answer (`sample.output_text`, or a field of it as JSON: `sample.output_json.NAME`) and the row
(`item.KEY`).
"""

from __future__ import annotations

import ast
import difflib
import json
import math
import operator
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from trainer.errors import ConfigError, RowError

_TEMPLATE = re.compile(r"\{\{([^{}]*)\}\}")
_PATH = re.compile(r"sample\.output_text|sample\.output_json(\.\w+)+|item(\.\w+)+")
_REFUSED = {
    "python": "a reward function of your own runs with `gateway train grpo --reward FILE.py:FUNCTION`",
    "score_model": "no model judges here; a reward of `gateway train grpo` may ask one",
    "label_model": "no model judges here; a reward of `gateway train grpo` may ask one",
}
_OPERATORS: dict[type[ast.AST], Callable[[float, float], float]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.Pow: math.pow,
}
_FUNCTIONS: dict[str, Callable[..., float]] = {
    "min": min, "max": max, "abs": abs, "floor": math.floor, "ceil": math.ceil, "exp": math.exp, "sqrt": math.sqrt,
    "log": math.log,
}  # fmt: skip
_OF_SEVERAL = ("min", "max")  # numbers; the others are of one

Item = Mapping[str, Any]


class _Grader(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str


class StringCheck(_Grader):
    """1 where two texts are as they should be, else 0."""

    type: Literal["string_check"]
    input: str
    reference: str
    operation: Literal["eq", "ne", "like", "ilike"]

    def score(self, answer: str, item: Item) -> float:
        """like: the input contains the reference; ilike: whatever the case."""
        given, wanted = _filled(self.input, answer, item), _filled(self.reference, answer, item)
        if self.operation in ("eq", "ne"):
            return float((given == wanted) is (self.operation == "eq"))
        return float(wanted in given if self.operation == "like" else wanted.casefold() in given.casefold())

    def templates(self) -> Iterator[str]:
        """What reads answer and row."""
        yield from (self.input, self.reference)


class TextSimilarity(_Grader):
    """From 0 to 1, how alike two texts are: twice the matching characters over all of them."""

    type: Literal["text_similarity"]
    input: str
    reference: str
    evaluation_metric: Literal["fuzzy_match"]

    def score(self, answer: str, item: Item) -> float:
        """As difflib's ratio, which is not affected by what is frequent."""
        given, wanted = _filled(self.input, answer, item), _filled(self.reference, answer, item)
        return difflib.SequenceMatcher(None, given, wanted, autojunk=False).ratio()

    def templates(self) -> Iterator[str]:
        """What reads answer and row."""
        yield from (self.input, self.reference)


_Single = Annotated[StringCheck | TextSimilarity, Field(discriminator="type")]


class Multi(_Grader):
    """A formula over the scores of others, by their names: `0.8 * exact + 0.2 * similar`."""

    type: Literal["multi"]
    graders: dict[str, _Single] = Field(min_length=1)
    calculate_output: str = Field(max_length=500)  # it is walked through by recursion

    def score(self, answer: str, item: Item) -> float:
        """Raises ArithmeticError, ValueError where the formula has no value."""
        scores = {name: grader.score(answer, item) for name, grader in self.graders.items()}
        return _value(_formula(self.calculate_output), scores)

    def templates(self) -> Iterator[str]:
        """What reads answer and row."""
        for grader in self.graders.values():
            yield from grader.templates()


Grader = StringCheck | TextSimilarity | Multi
_READ: TypeAdapter[Grader] = TypeAdapter(Annotated[Grader, Field(discriminator="type")])


def read(file: Path) -> Grader:
    """The grader of a JSON file. Raises ConfigError."""
    try:
        raw = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise ConfigError(f"grader: {file} cannot be read: {error}") from error
    _refuse(raw)
    try:
        grader = _READ.validate_python(raw)
    except ValidationError as error:
        fault = error.errors()[0]
        where = ".".join(str(part) for part in fault["loc"][1:])  # without the type, which is told apart by
        raise ConfigError(f"grader{f'.{where}' if where else ''}: {fault['msg']}") from error
    for template in grader.templates():
        for path in _paths(template):
            if not _PATH.fullmatch(path):
                raise ConfigError(
                    f"grader: {{{{{path}}}}} is unknown; give sample.output_text, sample.output_json.NAME or item.KEY"
                )
    if isinstance(grader, Multi):
        _check(_formula(grader.calculate_output), grader.graders.keys())
    return grader


def check_item(grader: Grader, item: Item) -> None:
    """Refuse a row that lacks what the grader reads of it. Raises RowError."""
    for template in grader.templates():
        for path in _paths(template):
            if path.startswith("item."):
                _filled(f"{{{{{path}}}}}", "", item)


def reward(file: Path) -> Callable[..., list[float]]:
    """The grader of a file as a reward function. Raises ConfigError."""
    grader = read(file)

    def graded(completions: list[list[dict[str, Any]]], **columns: list[Any]) -> list[float]:
        items = [{key: values[i] for key, values in columns.items()} for i in range(len(completions))]
        return [grader.score(messages[-1]["content"], item) for messages, item in zip(completions, items, strict=True)]

    return graded


def _refuse(raw: Any) -> None:
    """Say what to do instead of graders that would run code, or another model."""
    kind = raw.get("type") if isinstance(raw, dict) else None
    if isinstance(kind, str) and kind in _REFUSED:
        raise ConfigError(
            f"grader: {kind} is not offered; {_REFUSED[kind]}. Here are string_check, text_similarity and multi"
        )
    inner = raw.get("graders") if isinstance(raw, dict) else None
    for grader in inner.values() if isinstance(inner, dict) else ():
        _refuse(grader)


def _paths(template: str) -> Iterator[str]:
    return (path.strip() for path in _TEMPLATE.findall(template))


def _filled(template: str, answer: str, item: Item) -> str:
    return _TEMPLATE.sub(lambda match: _looked_up(match[1].strip(), answer, item), template)


def _looked_up(path: str, answer: str, item: Item) -> str:
    """What stands at a path; an answer that is no such JSON has nothing there. Raises RowError for the row's."""
    if path == "sample.output_text":
        return answer
    root, *keys = path.removeprefix("sample.").split(".")
    found: Any = item
    if root == "output_json":
        try:
            found = json.loads(answer)
        except (ValueError, RecursionError):
            return ""
    for key in keys:
        if not isinstance(found, Mapping) or key not in found:
            if root == "output_json":
                return ""
            raise RowError(f"`{path.removeprefix('item.')}` is missing, which the grader reads")
        found = found[key]
    return found if isinstance(found, str) else json.dumps(found)


def _formula(text: str) -> ast.expr:
    try:
        return ast.parse(text.replace("^", "**"), mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise ConfigError(f"grader.calculate_output: {text[:100]!r} is no formula") from error


def _check(node: ast.expr, names: Any) -> None:
    """Refuse all but arithmetic on known names. Raises ConfigError."""
    match node:
        case ast.Constant(value=int() | float()):
            return
        case ast.Name(id=name) if name in names:
            return
        case ast.BinOp(left=left, op=op, right=right) if type(op) in _OPERATORS:
            _check(left, names)
            _check(right, names)
        case ast.UnaryOp(op=ast.USub() | ast.UAdd(), operand=operand):
            _check(operand, names)
        case ast.Call(func=ast.Name(id=name), args=args, keywords=[]) if name in _FUNCTIONS:
            if not args or (len(args) > 1) is not (name in _OF_SEVERAL):
                needed = "two numbers or more" if name in _OF_SEVERAL else "one number"
                raise ConfigError(f"grader.calculate_output: {name} is of {needed}, given {len(args)}")
            for one in args:
                _check(one, names)
        case _:
            raise ConfigError(
                f"grader.calculate_output: {ast.unparse(node)[:100]!r} is not allowed; give numbers, the graders' "
                f"names ({', '.join(names)}), + - * / ^ and {', '.join(_FUNCTIONS)}"
            )


def _value(node: ast.expr, scores: Mapping[str, float]) -> float:
    """Of a formula that was checked. Raises ArithmeticError, ValueError."""
    match node:
        case ast.Constant(value=int() | float() as value):
            return float(value)
        case ast.Name(id=name):
            return scores[name]
        case ast.BinOp(left=left, op=op, right=right):
            return _OPERATORS[type(op)](_value(left, scores), _value(right, scores))
        case ast.UnaryOp(op=op, operand=operand):
            value = _value(operand, scores)
            return -value if isinstance(op, ast.USub) else value
        case ast.Call(func=ast.Name(id=name), args=args):
            return float(_FUNCTIONS[name](*(_value(one, scores) for one in args)))
    raise AssertionError("the formula was checked")
