"""Tests of links that cannot be followed, and of names in files that would command the terminal."""

import json
import struct
import warnings

import pytest

from dbrx_convert.inspect import inspect
from dbrx_convert.to_orbax import to_orbax
from dbrx_jax import DbrxForCausalLM, DbrxTokenizer
from dbrx_jax.checkpoint.huggingface import INDEX, HuggingFaceFolder
from dbrx_jax.checkpoint.manifest import MANIFEST
from dbrx_jax.checkpoint.orbax import PARAMS
from dbrx_jax.console import one_line, print_status
from dbrx_jax.errors import CheckpointError, DbrxError
from tests.commands import in_process

SHARD = "model-00006-of-00013.safetensors"


@pytest.mark.parametrize("target", ["itself", "nowhere"])
@pytest.mark.parametrize(
    "name",
    [
        *("config.json", SHARD, INDEX, "tokenizer.json", "tokenizer_config.json", "generation_config.json"),
        *("chat_template.jinja", "additional_chat_templates", "merges.txt", "x.tiktoken", MANIFEST, PARAMS),
    ],
)
def test_a_link_that_cannot_be_followed_is_named(fused_copy, tmp_path, name, target):
    link = fused_copy / name
    link.unlink(missing_ok=True)
    link.symlink_to(link.name if target == "itself" else "absent")
    message = f"{link}: is a link to {link.name if target == 'itself' else 'absent'}, which cannot be followed; mend"
    assert inspect(fused_copy)["problems"][0].startswith(message)
    calls = [lambda: to_orbax(fused_copy, tmp_path / "out"), lambda: DbrxForCausalLM.from_pretrained(fused_copy)]
    if name != PARAMS:
        calls.append(lambda: DbrxTokenizer.from_pretrained(fused_copy))
    for call in calls:
        with pytest.raises(DbrxError) as error:
            call()
        assert str(error.value).startswith(message)
    assert not list(tmp_path.glob("out*"))


def test_a_shard_that_is_a_link_to_itself_is_no_file(fused_copy):
    """A reader that is not told of links raises the same error."""
    (fused_copy / SHARD).unlink()
    (fused_copy / SHARD).symlink_to(SHARD)
    with pytest.raises(CheckpointError, match=f"{SHARD}: there is no such file"):
        HuggingFaceFolder.open(fused_copy)


def test_other_links_of_a_folder_may_lead_nowhere(fused_copy):
    (fused_copy / "README.md").symlink_to("absent")
    assert inspect(fused_copy)["kind"] == "fused layout"


def test_inspect_escapes_the_names_of_tensors(fused_copy):
    file = fused_copy / SHARD
    data = file.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header, body = json.loads(data[8 : 8 + length]), data[8 + length :]
    header["evil\x1b[31m\n.weight\u202e"] = {"dtype": "F32", "shape": [1], "data_offsets": [len(body), len(body) + 4]}
    text = json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + body + bytes(4))
    done = in_process("dbrx-convert", "inspect", fused_copy)
    assert done.returncode == 1
    assert r"holds evil\x1b[31m .weight\u202e, which model.safetensors.index.json" in done.stdout.splitlines()[1]
    assert all(c.isprintable() for c in done.stdout.replace("\n", ""))
    assert json.loads(in_process("dbrx-convert", "inspect", fused_copy, "--json").stdout)["problems"]


def test_status_lines_escape_all_but_newlines(capsys):
    print_status("a\x1b[2J\nb\r\x07\x9b\udc80é")
    assert capsys.readouterr().err == "a\\x1b[2J\nb\\r\\x07\\x9b\\udc80é\n"
    assert one_line("a\n  b\x1b") == r"a b\x1b"


def test_warnings_of_a_command_are_one_line(monkeypatch):
    def warn(path, values):
        warnings.warn("a name\x1b[31m\nof a file", stacklevel=1)
        return {"problems": []}

    monkeypatch.setattr("dbrx_convert.inspect.inspect", warn)
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        done = in_process("dbrx-convert", "inspect", "folder")
    assert done.stderr == "dbrx-convert: warning: a name\\x1b[31m of a file\n"
