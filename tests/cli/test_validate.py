"""`validate` finds what `generate` would refuse, without starting torch or MPI."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from tokenizers import Tokenizer, models, pre_tokenizers

from hpc_distkv.cli.main import group, main
from hpc_distkv.model import tokenizer as hpc_tokenizer
from hpc_distkv.model.config import ModelConfig

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 8,
    "intermediate_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "vocab_size": 4,
    "max_position_embeddings": 100,
    "eos_token_id": 3,
}


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A model directory without weights in it: three words and a template."""
    folder = tmp_path / "tiny"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(CONFIG))
    (folder / "model.safetensors").touch()
    (folder / "chat_template.jinja").write_text(
        "{% for m in messages %}{{ m.content }}{% endfor %}"
    )
    words = models.WordLevel({"a": 0, "b": 1, "?": 2, "</s>": 3}, unk_token="?")
    tokenizer = Tokenizer(words)
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "</s>"}))
    return folder


def row(custom_id: str, words: int, **fields: Any) -> dict[str, Any]:
    body = {"prompt": " ".join("a" * words), **fields}
    return {"custom_id": custom_id, "method": "POST", "url": "/v1/completions", "body": body}


def validate(model: Path, rows: list[Any], *options: str) -> Result:
    source = model.parent / "in.jsonl"
    source.write_text("\n".join(r if isinstance(r, str) else json.dumps(r) for r in rows))
    return CliRunner().invoke(
        group, ["validate", "--model", str(model), "-i", str(source), *options]
    )


def test_a_tokenizer_of_another_model_is_one_error_at_the_start(model: Path) -> None:
    (model / "config.json").write_text(json.dumps(CONFIG | {"vocab_size": 2}))
    result = validate(model, [row("a", 1)])
    assert result.exit_code == 2
    assert "tokenizer.json is of another model" in result.output


def values(result: Result) -> dict[str, str]:
    """First words of the report's lines → the rest."""
    pairs = (line.split("  ", 1) for line in map(str.strip, result.output.splitlines()))
    return {pair[0]: pair[1].strip() for pair in pairs if len(pair) == 2}


def test_good_rows(model: Path) -> None:
    chat = row("c", 1) | {"url": "/v1/chat/completions"}
    chat["body"] = {"model": "tiny", "messages": [{"role": "user", "content": "a b a"}]}
    result = validate(model, [row("a", 5, max_tokens=5), row("b", 1, max_tokens=9), "", chat])
    assert result.exit_code == 0, result.output
    assert values(result)["rows"] == "3"
    assert "prompt tokens 9 in all; p50 3, p90 5, p99 5, max 5" in result.output
    assert "output tokens 14 at most" in result.output
    assert "1 rows give no max_tokens" in result.output


def test_bad_rows_are_counted_by_code_and_shown(model: Path) -> None:
    rows = ["nonsense", row("a", 1), row("a", 1), *(row(f"t{i}", 1, tools=[1]) for i in range(5))]
    result = validate(model, rows)
    assert result.exit_code == 1
    found = values(result)
    assert (found["rows"], found["good"], found["bad"]) == ("8", "1", "7")
    assert found["unsupported_parameter"] == "5"
    assert found["duplicate_custom_id"] == "1"
    assert "line 4: 'tools' is not supported here, other than [] or null." in result.output
    assert "… and 2 more" in result.output


def test_where_rows_fit(model: Path) -> None:
    lengths = [(4, 4), (10, 7), (10, 8), (30, 35), (30, 36), (100, 1)]
    rows = [row(f"{p}+{n}", p, max_tokens=n) for p, n in lengths]
    result = validate(model, rows, "--num-blocks", "4", "--block-size", "4", "--ranks", "4")
    assert result.exit_code == 1
    found = values(result)
    assert found["fit one rank"] == "2 (16 tokens)"
    assert found["need several"] == "2"
    assert found["fit nowhere"].startswith("2 (")


def test_the_hosts_memory_of_one_rank_counts(model: Path) -> None:
    token = ModelConfig.from_dir(model).kv_bytes_per_token()
    rows = [row("a", 38, max_tokens=35), row("b", 100, max_tokens=1)]
    sizes = ("--num-blocks", "4", "--block-size", "4", "--ranks", "4")
    result = validate(model, rows, *sizes, "--host-kv-memory", str(11 * token))
    assert values(result)["fit nowhere"].startswith("1 (")
    assert "holds 72" in result.output


def test_a_table_of_rows(model: Path) -> None:
    rows = [
        row("small", 4, max_tokens=4),
        row("lon\tg", 10, max_tokens=8, n=3),
        row("open", 17),
        row("bad", 1, n=0),
        "nonsense",
    ]
    sizes = ("--num-blocks", "4", "--block-size", "4", "--ranks", "4")
    result = validate(model, rows, "--rows", *sizes)
    table = [line.split("\t") for line in result.output.splitlines()[:6]]
    assert table == [
        ["line", "custom_id", "answers", "prompt", "output", "rBlocks", "ranks", "error"],
        ["1", "small", "1", "4", "4", "2", "1", "-"],
        ["2", "lon\\tg", "3", "10", "8", "5", "2", "-"],
        ["3", "open", "1", "17", "open", "5+", "2+", "-"],
        ["4", "bad", "-", "-", "-", "-", "-", "invalid_value"],
        ["5", "-", "-", "-", "-", "-", "-", "invalid_json"],
    ]
    assert "output tokens 28 at most" in result.output
    table = validate(model, rows[:1], "--rows").output.splitlines()
    assert table[1].split("\t")[-2:] == ["?", "-"]


def test_limits_given_on_the_command_line(model: Path) -> None:
    rows = [row("a", 10)]
    assert validate(model, rows, "--max-model-len", "10").exit_code == 1
    assert validate(model, rows, "--max-model-len", "11").exit_code == 0
    result = validate(model, rows, "--max-tokens", "7")
    assert "output tokens 7 at most" in result.output


def test_an_empty_file_is_fine(model: Path) -> None:
    result = validate(model, [])
    assert result.exit_code == 0
    assert values(result)["rows"] == "0"


def test_usage_errors(model: Path) -> None:
    runner = CliRunner()
    for arguments in (
        ["--model", str(model), "-i", str(model.parent / "missing")],
        ["--model", str(model), "-i", "-"],
        ["--model", str(model.parent), "-i", str(model / "config.json")],
        ["-i", "x"],
    ):
        result = runner.invoke(group, ["validate", *arguments])
        assert result.exit_code == 2
        assert "Error: " in result.output
        assert "Traceback" not in result.output


def test_neither_torch_nor_mpi_is_started(model: Path) -> None:
    source = model.parent / "in.jsonl"
    source.write_text(json.dumps(row("a", 5)))
    script = (
        "import sys\n"
        "from hpc_distkv.cli.validate import command\n"
        f"command(['--model', {str(model)!r}, '-i', {str(source)!r}], standalone_mode=False)\n"
    )
    check = (
        "import atexit, sys\n"
        "heavy = {'torch', 'transformers', 'mpi4py', 'cupy', 'scipy'}\n"
        "atexit.register(lambda: print('heavy', sorted(heavy & set(sys.modules))))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", check + script], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("heavy []\n")


HOSTILE = "\x1b[2J\x9b1A\u202e\nrows 9"


def test_nothing_of_a_row_reaches_the_terminal_raw(model: Path) -> None:
    unknown = row("b", 1, **{HOSTILE: 1})
    result = validate(model, [row(HOSTILE, 1), unknown, row("c", 1, model=HOSTILE)], "--rows")
    spelled = r"\x1b[2J\x9b1A\u202e\nrows 9"
    assert result.output.count(spelled) == 3
    assert set(result.output) - {"\n", "\t"} == set(filter(str.isprintable, result.output))


def test_nothing_of_a_file_reaches_the_terminal_raw(
    model: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["", "validate", "--model", str(model), "-i", HOSTILE])
    with pytest.raises(SystemExit, match="2"):
        main()
    assert r"\x1b[2J\x9b1A\u202e" in capsys.readouterr().err


class PanicException(BaseException):
    """As pyo3 names what a panic of Rust raises: no `Exception`."""


def test_a_tokenizer_that_panics_is_the_fault_of_one_row(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encode = hpc_tokenizer.Tokenizer._encode

    def panicking(self: Any, text: str, add_special_tokens: bool) -> list[int]:
        if "b" in text:
            raise PanicException("called `Result::unwrap()`")
        return encode(self, text, add_special_tokens)

    monkeypatch.setattr(hpc_tokenizer.Tokenizer, "_encode", panicking)
    result = validate(model, [row("a", 1), row("b", 1, prompt="b"), row("c", 1)])
    assert result.exit_code == 1
    assert (values(result)["good"], values(result)["bad"]) == ("2", "1")
    assert "PanicException: called `Result::unwrap()`" in result.output
