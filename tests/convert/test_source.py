"""Tests that a conversion reads all that loading needs before it writes anything."""

import json
import shutil

import pytest
from upath import UPath

from dbrx_convert.inspect import inspect
from dbrx_convert.to_hf import to_hf
from dbrx_convert.to_orbax import to_orbax
from dbrx_jax import DbrxForCausalLM, DbrxTokenizer
from dbrx_jax.demo import source_folder
from dbrx_jax.errors import DbrxError
from tests.conftest import GOLDEN

DAMAGE = {
    "half a vocabulary": ("tokenizer.json", "{", "tokenizer.json: not valid JSON"),
    "vocabulary of another kind": ("tokenizer.json", '{"model": {"type": "WordPiece"}}', "expected 'BPE'"),
    "ranks that are none": ("cl100k_base.tiktoken", "x", "not a tiktoken ranks file"),
    "special token without an id": (
        "tokenizer_config.json",
        '{"added_tokens_decoder": {"x": {"content": "<|a|>"}}}',
        "the id of '<|a|>' must be a whole number",
    ),
    "number as a template": ("tokenizer_config.json", '{"chat_template": 5}', "chat_template: expected a text"),
    "template with a syntax error": (
        "tokenizer_config.json",
        '{"chat_template": "{% if %}"}',
        "Expected an expression",
    ),
    "template file with a syntax error": ("chat_template.jinja", "{% for x in %}", "Expected an expression"),
    "half a map of special tokens": ("special_tokens_map.json", '{"a"', "special_tokens_map.json: not valid JSON"),
    "list of generation settings": ("generation_config.json", "[]", "generation_config.json: expected a JSON object"),
    "text as an end token": (
        "generation_config.json",
        '{"eos_token_id": "x"}',
        "generation_config.json: eos_token_id: expected",
    ),
}


@pytest.mark.parametrize("convert", [to_orbax, to_hf])
@pytest.mark.parametrize("source", [source_folder(), GOLDEN / "dense"], ids=["vocabulary", "none"])
@pytest.mark.parametrize("name", DAMAGE)
def test_damaged_file_beside_the_weights_is_refused_before_writing(name, source, convert, tmp_path):
    file, text, message = DAMAGE[name]
    shutil.copytree(source, tmp_path / "source")
    (tmp_path / "source" / file).write_text(text)
    with pytest.raises(DbrxError) as error:
        convert(tmp_path / "source", tmp_path / "out")
    assert message in str(error.value)
    assert "\n" not in str(error.value)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        ("generation_config.json", "[]", "generation_config.json: expected a JSON object"),
        ("tokenizer_config.json", "[]", "tokenizer_config.json: expected a JSON object"),
    ],
)
def test_damaged_settings_are_found_before_the_weights_are_read(file, text, message, tmp_path, monkeypatch):
    shutil.copytree(source_folder(), tmp_path / "source")
    (tmp_path / "source" / file).write_text(text)
    (problem,) = inspect(tmp_path / "source")["problems"]
    assert message in problem
    monkeypatch.setattr("dbrx_jax.checkpoint.load._read_arrays", None)
    with pytest.raises(DbrxError) as error:
        DbrxForCausalLM.from_pretrained(tmp_path / "source")
    assert str(error.value) == problem


def test_token_ids_of_the_configuration_are_read_too(tmp_path):
    """They stand for those of generation_config.json where that is missing."""
    shutil.copytree(GOLDEN / "dense", tmp_path / "source")
    data = json.loads((tmp_path / "source" / "config.json").read_text())
    (tmp_path / "source" / "config.json").write_text(json.dumps({**data, "eos_token_id": "x"}))
    with pytest.raises(DbrxError, match=r"config\.json: eos_token_id"):
        to_orbax(tmp_path / "source", tmp_path / "out")


@pytest.mark.parametrize("convert", [to_orbax, to_hf])
def test_source_without_vocabulary_converts(convert, tmp_path, monkeypatch):
    """As published: the settings of the tokenizer are there, and its ranks are cl100k_base's."""
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path / "empty"))
    shutil.copytree(GOLDEN / "dense", tmp_path / "source")
    settings = {"added_tokens_decoder": {"100257": {"content": "<|endoftext|>"}}, "chat_template": "{{ messages }}"}
    (tmp_path / "source" / "tokenizer_config.json").write_text(json.dumps(settings))
    convert(tmp_path / "source", tmp_path / "out")
    assert json.loads((tmp_path / "out" / "tokenizer_config.json").read_text()) == settings
    assert DbrxForCausalLM.from_pretrained(tmp_path / "out").generation_config.eos_token_id == (100257,)
    with pytest.raises(DbrxError, match="holds no vocabulary"):
        DbrxTokenizer.from_pretrained(tmp_path / "out")


@pytest.fixture
def with_templates(tmp_path):
    """A copy of the demo with a second chat template in a file of its own."""
    shutil.copytree(source_folder(), tmp_path / "source")
    (tmp_path / "source" / "additional_chat_templates").mkdir()
    (tmp_path / "source" / "additional_chat_templates" / "rag.jinja").write_text("{{ documents }}")
    (tmp_path / "source" / "chat_template.jinja").write_text("{{ messages }}")
    return tmp_path / "source"


def save_pretrained(format):
    return lambda source, target: DbrxForCausalLM.from_pretrained(source).save_pretrained(target, format)


COPIES = [to_orbax, to_hf, save_pretrained("orbax"), save_pretrained("hf")]


@pytest.mark.parametrize("copy", COPIES, ids=["to_orbax", "to_hf", "save orbax", "save hf"])
def test_templates_in_files_of_their_own_are_copied(copy, with_templates, tmp_path):
    copy(with_templates, tmp_path / "out")
    templates = {"default": "{{ messages }}", "rag": "{{ documents }}"}
    assert DbrxTokenizer.from_pretrained(tmp_path / "out").chat_template == templates


def test_templates_are_copied_to_a_url(with_templates):
    target = UPath("memory://templates")
    to_orbax(with_templates, str(target / "out"))
    to_hf(str(target / "out"), str(target / "back"))
    assert DbrxTokenizer.from_pretrained(str(target / "back")).chat_template["rag"] == "{{ documents }}"
    target.rmdir(recursive=True)


@pytest.mark.parametrize("name", ["tokenizer.json", "additional_chat_templates", "additional_chat_templates/rag.jinja"])
@pytest.mark.parametrize("copy", COPIES, ids=["to_orbax", "to_hf", "save orbax", "save hf"])
def test_links_out_of_the_folder_are_not_copied(copy, name, with_templates, tmp_path):
    (with_templates / name).rename(tmp_path / "elsewhere")
    (with_templates / name).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(DbrxError, match=rf"{name}: is a link out of the folder, to .*elsewhere"):
        copy(with_templates, tmp_path / "out")
    assert {path.name for path in tmp_path.iterdir()} == {"source", "elsewhere"}
