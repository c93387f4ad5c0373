"""What W8A8 is made with: choices that make no sense are one line, at the command line too."""

from __future__ import annotations

import pytest

from quasar import QuasarError
from quasar.cli import main
from quasar.export.settings import ExportSettings
from quasar.quantization.methods import W8A8
from quasar.quantization.recipe import DEFAULT_RECIPE, Recipe, pass_bytes
from tests.helpers.random_models import random_model


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"alpha": 1.5}, "--alpha 1.5: SmoothQuant's migration strength lies between 0 and 1"),
        ({"alpha": "strong"}, "--alpha strong"),
        ({"rounding": "up"}, "--rounding up is unknown; use one of gptq, nearest"),
        ({"budget": -0.1}, "--budget -10%"),
        ({"budget": 1.01}, "--budget 101%"),
        ({"wide": ("down", "up")}, "--wide up is no linear layer; use some of qkv, o, gate_up, down, lm_head, or none"),
    ],
)
def test_recipes_that_cannot_be(fields: dict, words: str) -> None:
    with pytest.raises(QuasarError) as caught:
        Recipe(**fields)
    assert words in str(caught.value)


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--budget", "much"], "--budget much: should be a percentage, such as 2%"),
        (["--budget", "200%"], "--budget 200%"),
        (["--wide", "down,"], "--wide  is no linear layer"),
        (["--alpha", "often"], "--alpha often: should be a number from 0 to 1, auto or fitted"),
        (["--scheme", "w4a16", "--lm-head", "w8a8"], "--lm-head w8a8: one checkpoint holds int8 or int4 layers"),
    ],
)
def test_mistakes_at_the_command_line_are_one_line(argv: list[str], words: str, capsys, tmp_path) -> None:
    assert main(["quantize", "--output", str(tmp_path / "out"), *argv]) == 2
    said = capsys.readouterr().err.strip()
    assert words in said and "\n" not in said


def test_the_export_s_method_is_the_recipe_s() -> None:
    config = random_model("qwen3").config
    method = ExportSettings(recipe=Recipe(alpha=0.5, rounding="nearest")).method(config, [])
    assert isinstance(method, W8A8) and not method.moments and not method.sample
    default = ExportSettings().method(config, [])
    assert default.moments == (DEFAULT_RECIPE.rounding == "gptq")


def test_bytes_of_a_pass_are_those_of_the_decoder() -> None:
    """But for scales, norms and biases, which are a few per cent at these sizes."""
    model = random_model("openpangu", "w8a8")
    assert pass_bytes(model.config) == pytest.approx(model.decoder.weight_bytes_per_pass, rel=0.1)
