"""How good files are spoiled: JSON by its values, anything by its bytes, templates by their parts."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

_TEXTS = (
    *("", "a", "é", "\u2028", "\x00", "\ud800", "../..", "/etc/passwd", "{{"),
    *("nan", "-1", "a" * 5000, "ab" * 300_000),
)
_NUMBERS = (0, 1, -1, 3, 7, 255, 2**31 - 1, 2**31, 2**63, 2**64, 10**400, 0.5, -0.5, 1e308, float("inf"), float("nan"))


def random_value(dice: random.Random, depth: int = 0) -> Any:
    """Something that a file has no business to hold there."""
    kind = dice.randrange(8 if depth < 3 else 5)
    if kind == 0:
        return dice.choice((None, True, False))
    if kind in (1, 2):
        return dice.choice((*_NUMBERS, dice.randrange(-3, 400)))
    if kind in (3, 4):
        return dice.choice(_TEXTS)
    if kind == 5:
        return [random_value(dice, depth + 1) for _ in range(dice.choice((0, 1, 3, 200 if depth == 0 else 2)))]
    if kind == 6:
        return {dice.choice(_TEXTS[:9]): random_value(dice, depth + 1) for _ in range(dice.randrange(3))}
    nested: Any = []
    for _ in range(dice.choice((5, 400))):
        nested = [nested]
    return nested


def spoil_json(value: Any, dice: random.Random) -> Any:
    """Replaces, removes, renames or doubles something somewhere inside; may return another object."""
    keys = list(value) if isinstance(value, dict) else list(range(len(value))) if isinstance(value, list) else []
    if not keys:
        return random_value(dice)
    key = dice.choice(keys)
    if isinstance(value[key], dict | list) and value[key] and dice.random() < 0.8:
        value[key] = spoil_json(value[key], dice)
        return value
    how = dice.random()
    if how < 0.2:
        del value[key]
    elif how < 0.3 and isinstance(value, dict):
        value[dice.choice(_TEXTS)] = value.pop(key)
    elif how < 0.4:  # another's value
        value[key] = value[dice.choice(keys)]
    elif how < 0.5 and isinstance(value[key], int | float):
        value[key] = value[key] + dice.choice((-1, 1, value[key], 0.5))
    elif how < 0.6 and isinstance(value[key], str):
        value[key] = spoil_text(value[key], dice)
    else:
        value[key] = random_value(dice)
    return value


def spoil_text(text: str, dice: random.Random) -> str:
    """A text with something put in, taken out, or doubled."""
    a, b = sorted(dice.randrange(len(text) + 1) for _ in range(2))
    return dice.choice((text[:a] + text[b:], text[:b] + text[a:], text[:a] + dice.choice(_TEXTS) + text[a:], text[a:b]))


def spoil_bytes(content: bytes, dice: random.Random, header: int | None = None) -> bytes:
    """Bytes changed, cut, put in or doubled, above all within the first `header` of them."""
    end = len(content) if header is None or dice.random() < 0.1 else min(header, len(content))
    made = bytearray(content)
    how = dice.randrange(6)
    at = dice.randrange(end) if end else 0
    if how <= 2:
        for _ in range(dice.choice((1, 1, 2, 8))):
            if made:
                made[dice.randrange(max(end, 1))] = dice.choice((0, 1, 0x7F, 0x80, 0xFF, dice.randrange(256)))
    elif how == 3:
        del made[at:]
    elif how == 4:
        made[at:at] = dice.randbytes(dice.choice((1, 8, 300)))
    else:
        made[at:at] = made[at : at + dice.choice((4, 8, 100))]
    return bytes(made)


def spoil_json_file(path: Path, dice: random.Random) -> None:
    """Mostly its values, once in a while its bytes."""
    if dice.random() < 0.15:
        path.write_bytes(spoil_bytes(path.read_bytes(), dice, 2000))
        return
    value = json.loads(path.read_text(encoding="utf-8"))
    for _ in range(dice.choice((1, 1, 1, 2, 4))):
        value = spoil_json(value, dice)
    path.write_text(dump(value), encoding="utf-8")


def dump(value: Any) -> str:
    """JSON, also of numbers with more digits than Python prints unasked."""
    try:
        return json.dumps(value)
    except (ValueError, RecursionError):
        return json.dumps(str(type(value)))


_PARTS = (
    "{% for message in messages %}",
    "{% endfor %}",
    "{% for i in range(100000) %}",
    "{{ message['content'] }}",
    "{{ message.content | trim }}",
    "{{ message['role'] }}",
    "{{ messages[0].content.x.y }}",
    "{{ undefined.x.y }}",
    "{% if add_generation_prompt %}",
    "{% if message.role == 'user' %}",
    "{% if %}",
    "{% else %}",
    "{% endif %}",
    "{% set ns = namespace(t='aaaaaaaa') %}",
    "{% set ns.t = ns.t + ns.t %}",
    "{% set x = messages %}",
    "{% set messages = messages[1:] %}",
    "{{ 'a' * 2000000000 }}",
    "{{ 'a' * 100000 }}",
    "{{ ('%1000000000d' % 1) }}",
    "{{ '%s' % messages }}",
    "{{ range(10 ** 9) | list }}",
    "{{ range(5) | join('a' * 100000) }}",
    "{{ 2 ** 100000000 }}",
    "{{ 9 ** 9 ** 9 }}",
    "{{ 1 / 0 }}",
    "{{ raise_exception('no') }}",
    "{{ strftime_now('%Y') }}",
    "{{ message | tojson }}",
    "{{ messages | tojson(indent=100000) }}",
    "{{ messages.__class__.__mro__ }}",
    "{{ ''.__class__ }}",
    "{{ self }}",
    "{{ 'a' | replace('', 'bbbbbbbbbb') | replace('', 'bbbbbbbbbb') | replace('', 'bbbbbbbbbb') }}",
    "{{ 'ab' | center(1000000000) }}",
    "{{ lipsum(1000) }}",
    "{{ cycler(1, 2).next() }}",
    "{{ bos_token }}",
    "{{ eos_token }}",
    "{% macro f(x) %}",
    "{{ f(1) }}",
    "{% endmacro %}",
    "{% generation %}",
    "{% endgeneration %}",
    "{% include 'x' %}",
    "{% import 'x' as y %}",
    "{% break %}",
    "{%- continue -%}",
    "{# a comment",
    "{% raw %}",
    "<|im_start|>",
    "\n",
    "{{",
    "}}",
    "{%",
    "é\u2028",
)


def random_template(dice: random.Random, good: str) -> str:
    """Parts of templates in any order, or a good one spoiled."""
    if dice.random() < 0.4:
        return spoil_text(good, dice)
    return "".join(dice.choice(_PARTS) for _ in range(dice.choice((1, 2, 3, 5, 12))))
