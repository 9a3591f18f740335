"""Checkpoint files, whole and damaged."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from dense import logits_of, reference_logits, save_llama
from safetensors.torch import load_file, save_file

from hpc_distkv.model.config import ModelConfig
from hpc_distkv.model.errors import ModelError
from hpc_distkv.model.weights import load_decoder

Tensors = dict[str, torch.Tensor]


def load(path: Path) -> object:
    return load_decoder(path, ModelConfig.from_dir(path))


def test_sharded_checkpoint_equals_the_whole_one(tmp_path: Path) -> None:
    model = save_llama(tmp_path, max_shard_size="60KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    tokens = torch.randint(0, 101, (40,))
    decoder = load_decoder(tmp_path, ModelConfig.from_dir(tmp_path))
    torch.testing.assert_close(
        logits_of(decoder, tokens), reference_logits(model, tokens), rtol=0, atol=1e-4
    )


def missing(tensors: Tensors) -> None:
    del tensors["model.layers.1.self_attn.k_proj.weight"]


def unexpected(tensors: Tensors) -> None:
    tensors["model.layers.2.self_attn.k_proj.weight"] = torch.zeros(2)


def misshapen(tensors: Tensors) -> None:
    tensors["model.norm.weight"] = torch.ones(47)


def quantized(tensors: Tensors) -> None:
    name = "model.layers.0.mlp.up_proj.weight"
    tensors[name] = tensors[name].to(torch.int8)


@pytest.mark.parametrize(
    ("damage", "named"),
    [
        (missing, r"layers\.1\.self_attn\.k_proj\.weight missing from model\.safetensors"),
        (unexpected, r"model\.safetensors: unexpected tensor model\.layers\.2"),
        (misshapen, r"model\.safetensors: tensor model\.norm\.weight has shape \(47,\)"),
        (quantized, r"up_proj\.weight is I8"),
    ],
)
def test_names_the_tensor_and_the_file_that_do_not_fit(
    tmp_path: Path, damage: Callable[[Tensors], None], named: str
) -> None:
    save_llama(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    damage(tensors)
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ModelError, match=named):
        load(tmp_path)


def test_truncated_file_is_named(tmp_path: Path) -> None:
    save_llama(tmp_path)
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ModelError, match=r"model\.safetensors cannot be read"):
        load(tmp_path)


def test_tensor_in_two_shards_is_refused(tmp_path: Path) -> None:
    save_llama(tmp_path, max_shard_size="60KB")
    first, second = sorted(tmp_path.glob("model-*.safetensors"))[:2]
    save_file({**load_file(first), **load_file(second)}, second)
    with pytest.raises(ModelError, match=f"{first.name} and in .*{second.name}"):
        load(tmp_path)


def test_saved_rotary_buffers_and_a_saved_tied_head_are_ignored(tmp_path: Path) -> None:
    save_llama(tmp_path, tie_word_embeddings=True)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, tmp_path / "model.safetensors")
    assert torch.equal(load(tmp_path).embedding, tensors["model.embed_tokens.weight"])


def test_unknown_dtype_is_refused(tiny_model: Path) -> None:
    with pytest.raises(ModelError, match="int8"):
        load_decoder(tiny_model, ModelConfig.from_dir(tiny_model), "int8")


def test_loading_peaks_near_one_copy_of_the_weights(tmp_path: Path) -> None:
    """In a fresh process: by how many bytes the peak rises while loading."""
    saved = save_llama(
        tmp_path,
        vocab_size=256,
        hidden_size=1024,
        intermediate_size=2048,
        num_hidden_layers=16,
        num_attention_heads=8,
        initializer_range=0.0,
    )
    code = f"""if True:
        import json, resource, torch
        from hpc_distkv.model.config import ModelConfig
        from hpc_distkv.model.weights import load_decoder, random_decoder
        def peak():
            return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        path = {str(tmp_path)!r}
        torch.set_num_threads(1)
        config = ModelConfig.from_dir(path)
        warm = torch.ops.mkldnn  # and the libraries behind it
        before = peak()
        decoder = load_decoder(path, config, "float32")
        print(json.dumps(peak() - before))
    """
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) < 1.5 * 4 * saved.num_parameters()
