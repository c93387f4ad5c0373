"""Chat templates: Jinja from a checkpoint, run in a sandbox with bounds on its time and its output.

A template is somebody else's program. The sandbox keeps it from Python's objects; the bounds here keep it from
looping for ever and from filling the memory.
"""

from __future__ import annotations

import json
import re
import threading
import time
from collections.abc import Callable
from datetime import datetime
from typing import Any

from quasar.errors import QuasarError, shorten

MAX_SECONDS = 2.0  # of the processor, so that a busy machine changes nothing
MAX_CHARACTERS = 20_000_000  # of the rendered prompt, and of any text that the template makes on the way
_MAX_COUNT = 1_000_000  # the largest number that a template may hand to a function: widths, counts, repetitions


class ChatTemplate:
    """One compiled template. Raises QuasarError where it does not compile."""

    def __init__(self, source: str, where: str) -> None:
        """where: the checkpoint, for error messages."""
        import jinja2

        self.source, self.where = source, where
        self._environment = _environment()
        try:
            self._template = self._environment.from_string(source)
        except (jinja2.TemplateError, SyntaxError, RecursionError, MemoryError) as error:
            raise self._refusal(error) from None

    def __deepcopy__(self, memo: object) -> ChatTemplate:
        return self  # never changed once it is compiled

    def render(self, **variables: Any) -> str:
        """The text. Raises QuasarError where the template fails, or exceeds its time or size."""
        self._environment.clock.deadline = time.thread_time() + MAX_SECONDS
        pieces, size = [], 0
        try:
            for piece in self._template.generate(**variables):
                size += len(piece)
                self._environment.tick(size)
                pieces.append(piece)
        except Exception as error:  # whatever Python raises in an expression of the template
            raise self._refusal(error) from None
        return "".join(pieces)

    def _refusal(self, error: Exception) -> QuasarError:
        reason = shorten(str(error), 300) or type(error).__name__
        line = f" at line {error.lineno}" if getattr(error, "lineno", None) else ""
        return QuasarError(f"{self.where}: its chat template fails{line} ({reason})")


def _environment() -> Any:
    """A sandbox that counts. Made by a function, so that jinja2 is imported when a template is there."""
    from jinja2 import nodes
    from jinja2.exceptions import TemplateError
    from jinja2.ext import Extension, loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """{% generation %} marks the assistant's words for training; here its body is just rendered."""

        tags = frozenset(("generation",))

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return nodes.Scope(body, lineno=line)

    class Bounded(ImmutableSandboxedEnvironment):
        intercepted_binops = frozenset(("*", "**", "+", "%"))
        clock = threading.local()  # deadline: in processor time of the thread that renders

        def tick(self, size: int = 0) -> str:
            if time.thread_time() > getattr(self.clock, "deadline", float("inf")):
                raise TemplateError(f"it takes more than {MAX_SECONDS:g} s")
            if size > MAX_CHARACTERS:
                raise TemplateError(f"it makes more than {MAX_CHARACTERS} characters")
            return ""

        def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
            self.tick(_size_of(operator, left, right))
            return super().call_binop(context, operator, left, right)

        def call(self, context: Any, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            self.tick()
            for value in (*args, *kwargs.values()):
                if isinstance(value, int) and abs(value) > _MAX_COUNT:
                    raise TemplateError(f"it calls a function with {value}")
            result = super().call(context, function, *args, **kwargs)
            self.tick(len(result) if isinstance(result, (str, list)) else 0)
            return result

        def _parse(self, source: str, name: Any, filename: Any) -> Any:
            tree = super()._parse(source, name, filename)
            tick = nodes.Call(nodes.Name("_tick", "load"), [], [], None, None)
            for node in (*tree.find_all(nodes.For), *tree.find_all(nodes.Macro)):
                node.body.insert(0, nodes.ExprStmt(tick))
            for parent in tree.find_all((nodes.Node,)):
                _replace_concats(parent, nodes)
            for node in tree.find_all(nodes.Node):
                node.set_environment(self)
            return tree.set_lineno(1)

    def concat(*parts: Any) -> str:
        texts = [str(part) for part in parts]
        environment.tick(sum(map(len, texts)))
        return "".join(texts)

    def fail(message: Any) -> None:
        raise TemplateError(str(message))

    def to_json(value: Any, ensure_ascii: bool = False, indent: int | None = None, **options: Any) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=min(indent, 80) if indent else None, **options)

    def bounded(name: str) -> Callable[..., Any]:
        original = environment.filters[name]

        def run(*args: Any, **kwargs: Any) -> Any:
            environment.tick()
            for value in (*args, *kwargs.values()):
                if isinstance(value, int) and abs(value) > _MAX_COUNT:
                    raise TemplateError(f"it calls the filter {name} with {value}")
            return original(*args, **kwargs)

        if hasattr(original, "jinja_pass_arg"):
            run.jinja_pass_arg = original.jinja_pass_arg
        return run

    environment = Bounded(trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols])
    for name in ("center", "indent", "batch", "slice", "wordwrap", "truncate"):
        environment.filters[name] = bounded(name)
    environment.filters["tojson"] = to_json
    environment.globals |= {
        "_tick": environment.tick,
        "_concat": concat,
        "raise_exception": fail,
        "strftime_now": lambda form: datetime.now().strftime(form),
    }
    for name in ("lipsum", "cycler", "joiner"):
        environment.globals.pop(name, None)
    return environment


def _size_of(operator: str, left: Any, right: Any) -> int:
    """Characters, items or bits that a sum, product, power or % would make; 0 for what stays small."""
    sized = [value for value in (left, right) if isinstance(value, (str, list, tuple))]
    numbers = [value for value in (left, right) if isinstance(value, int)]
    if operator == "+" and len(sized) == 2:
        return len(left) + len(right)
    if operator == "*" and sized and numbers:
        return len(sized[0]) * numbers[0]
    if operator == "%" and isinstance(left, str):
        widths = [int(digits) if len(digits) < 10 else MAX_CHARACTERS + 1 for digits in re.findall(r"\d+", left)]
        given = [v for v in (right if isinstance(right, tuple) else (right,)) if isinstance(v, int)]
        return max([0, *widths, *(given if "*" in left else [])])
    if operator == "**" and len(numbers) == 2:
        return left.bit_length() * max(0, right) * 1000
    if operator == "*" and len(numbers) == 2:
        return (left.bit_length() + right.bit_length()) * 1000
    return 0


def _replace_concats(parent: Any, nodes: Any) -> None:
    """a ~ b becomes a call, so that its length is seen before it is made."""
    for field, value in parent.iter_fields():
        if isinstance(value, list):
            setattr(parent, field, [_call_of(item, nodes) for item in value])
        else:
            setattr(parent, field, _call_of(value, nodes))


def _call_of(node: Any, nodes: Any) -> Any:
    if not isinstance(node, nodes.Concat):
        return node
    return nodes.Call(nodes.Name("_concat", "load"), node.nodes, [], None, None)
