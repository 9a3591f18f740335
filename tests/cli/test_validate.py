"""`validate` finds what `generate` would refuse, without starting torch or MPI."""

from __future__ import annotations

import json
import subprocess
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from tokenizers import Tokenizer, models, pre_tokenizers

from hpc_distkv.cli.group import group
from hpc_distkv.control.messages.counters import Counters
from hpc_distkv.model import tokenizer as hpc_tokenizer
from hpc_distkv.model.config import ModelConfig
from hpc_distkv.observe.summary.run import RunRecord
from hpc_distkv.start.needs import rank_memory
from hpc_distkv.start.options import EngineOptions

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


def validate(model: Path, rows: list[Any], *options: str, end: str = "\n") -> Result:
    source = model.parent / "in.jsonl"
    lines = (r if isinstance(r, str) else json.dumps(r) for r in rows)
    source.write_text("\n".join(lines) + end)
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


def test_a_file_that_ends_within_a_line_is_not_good(model: Path) -> None:
    result = validate(model, [row("a", 1), json.dumps(row("b", 1))[:-5]], end="")
    assert result.exit_code == 1
    assert values(result)["torn_line"] == "1"
    assert "line 2: The input ends within this line" in result.output


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


def test_the_longest_rows_are_shown(model: Path) -> None:
    lengths = [(4, 4), (40, 7), (10, 8), (30, 36), (66, 1), (5, 5)]
    rows = [row(f"{p}\x1b+{n}", p, max_tokens=n) for p, n in lengths] + [row("open", 80)]
    shown = validate(model, rows, "--block-size", "4").output.partition("longest rows\n")[2]
    assert [line.strip() for line in shown.splitlines()[:3]] == [
        "line 7, open: 80 + open tokens, 20 rBlocks",
        "line 4, 30\\x1b+36: 30 + 36 tokens, 17 rBlocks",
        "line 5, 66\\x1b+1: 66 + 1 tokens, 17 rBlocks",
    ]


TOKEN = 2 * 1 * 2 * 4 * 4
"""Bytes of K and V: one layer, two heads of dimension 4, float32."""


@pytest.mark.parametrize(
    ("options", "heads", "value"),
    [((), 1, 1), (("--dtype", "bfloat16"), 1, 2), (("--tensor-parallel-size", "2"), 2, 1)],
)
def test_kv_memory_is_counted_in_rblocks(
    options: tuple[str, ...], heads: int, value: int, model: Path
) -> None:
    """Of a rank, which has its part of the heads."""
    block = 4 * TOKEN // heads // value
    rows = [row("a", 10, max_tokens=7), row("b", 10, max_tokens=8)]
    sizes = ("--block-size", "4", "--kv-memory", str(5 * block - 1))
    found = values(validate(model, rows, *sizes, *options, "--ranks", "4"))
    assert found["fit one rank"] == "1 (16 tokens)"
    assert found["need several"] == "1"
    assert f"cluster's KV cache holds {4 // heads * 16})" in found["fit nowhere"]
    assert found["KV cache"] == f"{block} bytes an rBlock of 4 tokens"


def test_what_pools_should_hold_is_said(model: Path) -> None:
    """Ten answers of 5 rBlocks and two of 2, on three ranks that run four each."""
    rows = [row("a", 10, max_tokens=8, n=10), row("b", 4, max_tokens=4, n=2)]
    sizes = ("--block-size", "4", "--ranks", "3", "--max-num-seqs", "8")
    result = validate(model, rows, *sizes)
    block = 4 * TOKEN
    mean = (10 * 5 + 2 * 2) / 12
    assert f"--num-blocks 5 ({5 * block} bytes) on one rank, or --num-blocks 2" in result.output
    assert f"--num-blocks {round(4 * mean)} (" in result.output
    assert "a rank for 4 rows of mean length" in result.output
    result = validate(model, rows, *sizes, "--num-blocks", "11")
    assert f"{int(11 / mean)} rows of mean length at once on a rank" in result.output
    result = validate(model, rows, *sizes, "--max-num-seqs", "2")
    assert f"--num-blocks {round(2 * mean)} (" in result.output


def test_what_a_rank_needs_is_that_of_its_pool(model: Path) -> None:
    config = ModelConfig.from_dir(model)
    result = validate(model, [row("a", 10, max_tokens=8)], "--kv-memory", "64MiB")
    given = EngineOptions(kv_memory=(64 << 20) // (32 * TOKEN) * 32 * TOKEN)
    assert rank_memory(config, given, rows=1).words() in result.output


def test_time_from_a_given_speed(model: Path) -> None:
    rows = [row("a", 60, max_tokens=30), row("b", 40, max_tokens=30), row("open", 40)]
    speed = ("--prompt-tokens-per-second", "0.7", "--output-tokens-per-second", "0.1")
    found = values(validate(model, rows, *speed))
    least, most = 140 / 0.7 + 3 / 0.1, 140 / 0.7 + (60 + 60) / 0.1
    times = [str(timedelta(seconds=round(seconds))) for seconds in (least, most)]
    assert found["time"].startswith(" to ".join(times))
    closed = validate(model, rows[:2], *speed)
    most = 100 / 0.7 + 60 / 0.1
    assert f"to {timedelta(seconds=round(most))}, for outputs" in closed.output


def figures(folder: Path, **changes: Any) -> str:
    """A file of metrics: 100 + 20 tokens of two answers in 1,000 s, on two instances."""
    found = RunRecord().summary([Counters()], [0])
    found |= {"prompt_tokens": 100, "output_tokens": 20, "seconds": 1000.0, "stopped": False}
    found |= {"rows": {"answered": 2, "failed": 0}, "ranks": [], "job": {"instances": 2}}
    found["request_counts"] = {"total": 2, "completed": 2, "failed": 0}
    path = folder / "metrics.json"
    path.write_text(json.dumps(found | changes))
    return str(path)


def test_time_from_an_earlier_run(model: Path, tmp_path: Path) -> None:
    """Twice the prompts and, of a mean of 10, 1.5 times the outputs."""
    rows = [row("a", 80, max_tokens=15), row("b", 60, max_tokens=15), row("c", 60, max_tokens=15)]
    metrics = figures(tmp_path)
    found = values(validate(model, rows, "--metrics", metrics, "--ranks", "2"))
    assert found["time"].startswith("0:25:00 to 0:33:20 with outputs as long as in that run")
    assert "(a mean of 10 tokens), 0:37:30 at most" in found["time"]
    found = values(validate(model, rows, "--metrics", metrics, "--ranks", "4"))
    assert found["time"].startswith("0:12:30 to 0:16:40 with")


def test_a_run_of_no_use_is_refused(model: Path, tmp_path: Path) -> None:
    for changes, words in (
        ({"output_tokens": 0}, "that run answered nothing"),
        ({"job": {}}, "no file that `generate --metrics` wrote (KeyError('instances'))"),
        ({"request_counts": None}, "`$.request_counts`"),
    ):
        result = validate(model, [], "--metrics", figures(tmp_path, **changes))
        assert result.exit_code == 2
        assert words in result.output


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
    files = ("--model", str(model), "-i", str(model / "config.json"))
    for arguments in (
        ["--model", str(model), "-i", str(model.parent / "missing")],
        ["--model", str(model), "-i", "-"],
        ["--model", str(model.parent), "-i", str(model / "config.json")],
        ["-i", "x"],
        [*files, "--num-blocks", "1", "--kv-memory", "1GiB"],
        [*files, "--kv-memory", "1"],
        [*files, "--ranks", "3", "--tensor-parallel-size", "2"],
        [*files, "--ranks", "3", "--tensor-parallel-size", "3"],
        [*files, "--prompt-tokens-per-second", "9"],
        [*files, "--output-tokens-per-second", "nan"],
        [*files, "--metrics", str(model / "config.json")],
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
    assert result.output.count(spelled) == 4, "of the table, the longest rows, and two errors"
    assert set(result.output) - {"\n", "\t"} == set(filter(str.isprintable, result.output))


def test_nothing_of_a_file_reaches_the_terminal_raw(model: Path) -> None:
    program = "from hpc_distkv.cli.main import main; main()"
    words = [sys.executable, "-c", program, "validate", "--model", str(model), "-i", HOSTILE]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert r"\x1b[2J\x9b1A\u202e" in done.stderr
    assert set(done.stderr) - {"\n"} == set(filter(str.isprintable, done.stderr))


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
