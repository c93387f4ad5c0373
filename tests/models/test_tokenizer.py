"""Tokenizers without transformers: the same ids, text and prompts as with it."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from quasar import QuasarError
from quasar.models.chat_template import ChatTemplate
from quasar.models.find import ASSETS
from quasar.models.tokenizer import Tokenizer, load_tokenizer, stop_ids

TEXTS = (
    "",
    "def main():\n    return 12345\n",
    "  two  spaces <|im_end|> and <|im_start|>user\n",
    "caf\u00e9 \u4f60\u597d \U0001f600 \u0000",
)
TURNS = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi <|im_end|>"}]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json", "config.json"):
        shutil.copy(ASSETS / "tiny-qwen3" / name, tmp_path / name)
    return tmp_path


def edit(folder: Path, **fields: object) -> None:
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


@pytest.mark.parametrize("name", ["tiny-qwen3", "tiny-openpangu"])
def test_ids_text_and_prompts_equal_transformers(name):
    ours, theirs = load_tokenizer(ASSETS / name), AutoTokenizer.from_pretrained(ASSETS / name)
    assert isinstance(ours, Tokenizer)
    for text in TEXTS:
        ids = ours.encode(text)
        assert ids == theirs.encode(text)
        for skip in (False, True):
            assert ours.decode(ids, skip_special_tokens=skip) == theirs.decode(ids, skip_special_tokens=skip)
    for prompt in (False, True):
        assert ours.apply_chat_template(TURNS, add_generation_prompt=prompt) == theirs.apply_chat_template(
            TURNS, add_generation_prompt=prompt, tokenize=True, return_dict=False
        )
    assert ours.get_vocab() == theirs.get_vocab()
    assert ours.get_added_vocab() == theirs.get_added_vocab()
    assert sorted(ours.all_special_ids) == sorted(theirs.all_special_ids)
    assert ours.convert_ids_to_tokens([5, 1]) == theirs.convert_ids_to_tokens([5, 1])
    assert len(ours) == len(theirs)
    assert (ours.eos_token, ours.eos_token_id) == (theirs.eos_token, theirs.eos_token_id)


def test_what_tokenizer_config_adds(folder):
    edit(
        folder,
        added_tokens_decoder={"4096": {"content": "<tool>", "special": False, "normalized": False}},
        additional_special_tokens=["<|extra|>"],
        bos_token="<|begin|>",
    )
    ours, theirs = load_tokenizer(folder), AutoTokenizer.from_pretrained(folder)
    text = "a<tool>b<|extra|>c<|begin|>"
    assert ours.encode(text) == theirs.encode(text)
    assert ours.decode(ours.encode(text), skip_special_tokens=True) == "a<tool>bc"
    assert theirs.decode(theirs.encode(text), skip_special_tokens=True) == "a<tool>bc"


def test_llama_classes_put_the_begin_token_as_configured(folder):
    edit(folder, tokenizer_class="LlamaTokenizer", add_bos_token=True, bos_token="<|im_start|>")
    ids = load_tokenizer(folder).encode("x = 1")
    assert ids[0] == 1
    assert load_tokenizer(folder).encode("x = 1", add_special_tokens=False) == ids[1:]
    edit(folder, add_bos_token=False)
    assert load_tokenizer(folder).encode("x = 1") == ids[1:]


def test_loading_imports_no_transformers():
    script = (
        "import sys; from quasar import load; m = load(device='reference'); m.encode('x', chat=True); "
        "print('transformers' in sys.modules)"
    )
    ran = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120, check=True)
    assert ran.stdout.strip() == "False"


def test_a_folder_without_any_file_of_a_tokenizer_has_none(tmp_path):
    assert load_tokenizer(tmp_path) is None


def test_several_templates_by_name(folder):
    templates = [{"name": "default", "template": "plain"}, {"name": "tool_use", "template": "tools"}]
    edit(folder, chat_template=templates)
    tokenizer = load_tokenizer(folder)
    assert tokenizer.apply_chat_template([], tokenize=False) == "plain"
    assert tokenizer.apply_chat_template([], tools=[{}], tokenize=False) == "tools"
    edit(folder, chat_template=templates[1:])
    with pytest.raises(QuasarError, match=r"none of its chat templates \(tool_use\) is the default"):
        load_tokenizer(folder).apply_chat_template([])


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"chat_template": 5}, "chat_template is 5; it should be a text"),
        ({"chat_template": [{"name": 1}]}, "it should be a text"),
        ({"eos_token": 7}, "eos_token is 7; it should be a text"),
        ({"added_tokens_decoder": [1]}, "added_tokens_decoder should map ids"),
        ({"tokenizer_class": "NoSuchTokenizer", "model_max_length": "long"}, "no usable tokenizer"),
    ],
)
def test_configs_that_do_not_fit(folder, fields, message):
    edit(folder, **fields)
    with pytest.raises(QuasarError, match=message):
        load_tokenizer(folder)


@pytest.mark.parametrize("text", ["", "{}", "[", '{"version": "1.0", "model": {"type": "BPE", "vocab": 5}}', "\xff"])
def test_tokenizers_that_are_broken(folder, text):
    (folder / "tokenizer.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(QuasarError, match="no usable tokenizer") as caught:
        load_tokenizer(folder)
    assert "\n" not in str(caught.value)


def test_stop_ids_from_every_place(folder):
    assert stop_ids(folder, load_tokenizer(folder)) == {0, 2}
    (folder / "generation_config.json").unlink()
    assert stop_ids(folder, load_tokenizer(folder)) == {0}


GOOD = {
    "{% for m in messages %}{{ m.role ~ ': ' ~ m.content }}\n{% endfor %}": "user: Hi\n",
    "{% for m in messages %}{% if loop.first %}{% continue %}{% endif %}x{% endfor %}y": "y",
    "{% generation %}{{ messages[0].content }}{% endgeneration %}": "Hi",
    "{{ messages | tojson }}": '[{"role": "user", "content": "Hi"}]',
    "{{ tools | tojson(indent=2) if tools else '' }}{{ eos_token }}": "</s>",
    "{% set ns = namespace(n=0) %}{% for i in range(5) %}{% set ns.n = ns.n + i * 2 %}{% endfor %}{{ ns.n }}": "20",
    "{{ '%s-%03d' % ('a', 7) }}{{ 'ab' * 3 }}{{ strftime_now('%Y') | length }}": "a-007ababab4",
    "{{ messages[0].content.split('i')[0] | trim | upper }}": "H",
}


@pytest.mark.parametrize("source", GOOD)
def test_templates_as_they_are_written(source):
    turns = [{"role": "user", "content": "Hi"}]
    assert ChatTemplate(source, "model").render(messages=turns, tools=None, eos_token="</s>") == GOOD[source]


BAD = [
    "{{ undefined.x.y }}",
    "{% if %}",
    "{{ 1 / 0 }}",
    "{{ raise_exception('roles must alternate') }}",
    "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "{% for i in range(100000) %}{% for j in range(100000) %}{% endfor %}{% endfor %}",
    "{% set r = range(99999) %}{% for i in r %}{% for j in r %}{% for k in r %}{% endfor %}{% endfor %}{% endfor %}",
    "{{ 'a' * 2000000000 }}",
    "{{ [0] * 2000000000 }}",
    "{{ 2000000000 * 'a' }}",
    "{{ '%2000000000d' % 5 }}",
    "{{ '{:2000000000d}'.format(5) }}",
    "{{ 'a'.ljust(2000000000) }}",
    "{{ 'a' | center(2000000000) }}",
    "{{ 10 ** 10000000000 }}",
    "{% set ns = namespace(s='aaaaaaaa') %}{% for i in range(60) %}{% set ns.s = ns.s + ns.s %}{% endfor %}",
    "{% set ns = namespace(s='aaaaaaaa') %}{% for i in range(60) %}{% set ns.s = ns.s ~ ns.s %}{% endfor %}",
    "{% set ns = namespace(s=[1]) %}{% for i in range(60) %}{% set ns.s = ns.s + ns.s %}{% endfor %}",
    "{% for i in range(90000) %}{{ 'x' * 1000 }}{% endfor %}",
    "{{ messages.__class__.__mro__ }}",
    "{{ ''.__class__.__base__.__subclasses__() }}",
    "{% include 'secret' %}",
    "{{ messages | no_such_filter }}",
    "{% for c in 'x' * 1000000 recursive %}{{ loop('x' * 1000000) }}{% endfor %}",
]


@pytest.mark.parametrize("source", BAD)
def test_templates_that_fail_or_never_end_are_one_line(source):
    start = time.monotonic()
    with pytest.raises(QuasarError, match="its chat template fails") as caught:
        ChatTemplate(source, "model").render(messages=[{"role": "user", "content": "Hi"}])
    assert "\n" not in str(caught.value)
    assert time.monotonic() - start < 30
