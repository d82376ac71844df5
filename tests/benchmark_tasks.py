"""A folder of small tasks for lm-eval, one of each kind, over the standard library's own text, and models that have
learned some of it: theirs are no answers of pure chance, and what they write is text."""

import importlib
import inspect
import json
from pathlib import Path
from typing import Any

import torch
import yaml
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from data_pipeline.tokenizer import Tokenizer
from data_pipeline.tokenizer_training import train_tokenizer
from pretrain.hf_tokenizer import write_fast_tokenizer
from tests import json_tokenizers

CONTEXT = 64
KINDS = ("tiny_choice", "tiny_word", "tiny_text", "tiny_writing")
MODULES = ("argparse", "asyncio.tasks", "collections", "configparser", "json.decoder", "textwrap")


def write_tasks(folder: Path, documents: int = 6) -> Path:
    """Write the tasks `KINDS`, the group `tiny_group` of the first two and the tag `tiny_tag` of the others."""
    folder.mkdir()
    questions = [_question(module) for module in MODULES[:documents]]
    _task(folder, "tiny_choice", questions, {
        "output_type": "multiple_choice",
        "training_split": "train",
        "fewshot_split": "train",
        "doc_to_text": "From {{name}}:\n{{before}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "label",
        "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
    })  # fmt: skip
    _task(folder, "tiny_word", questions, {
        "output_type": "loglikelihood",
        "doc_to_text": "{{before}} ",
        "doc_to_target": "{{word}}",
        "metric_list": [{"metric": "acc"}, {"metric": "perplexity"}],
    })  # fmt: skip
    _task(folder, "tiny_text", questions, {
        "output_type": "loglikelihood_rolling",
        "tag": "tiny_tag",
        "doc_to_text": "",
        "doc_to_target": "{{text}}",
        "metric_list": [{"metric": "word_perplexity"}, {"metric": "byte_perplexity"}, {"metric": "bits_per_byte"}],
    })  # fmt: skip
    _task(folder, "tiny_writing", questions, {
        "output_type": "generate_until",
        "tag": "tiny_tag",
        "doc_to_text": "{{before}}",
        "doc_to_target": "{{word}}",
        "generation_kwargs": {"until": ["\n", "e"], "max_gen_toks": 12, "do_sample": False},
        "metric_list": [{"metric": "exact_match"}],
    })  # fmt: skip
    _task(folder, "tiny_draws", questions, {
        "output_type": "generate_until",
        "doc_to_text": "{{before}}",
        "doc_to_target": "{{word}}",
        "generation_kwargs": {"until": ["\n"], "max_gen_toks": 6, "do_sample": True, "temperature": 1.0, "top_p": 0.9},
        "metric_list": [{"metric": "exact_match"}],
    })  # fmt: skip
    group = {"group": "tiny_group", "task": list(KINDS[:2]), "aggregate_metric_list": [{"metric": "acc"}]}
    (folder / "group.yaml").write_text(yaml.safe_dump(group))
    return folder


def trained_llama(folder: Path) -> Path:
    """A Llama with a sentencepiece tokenizer, and the same one for transformers, which adds no BOS."""
    train_tokenizer(_texts(), 400, folder / "tokenizer.model")
    config = LlamaConfig(
        vocab_size=400,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=CONTEXT,
        bos_token_id=1,
        eos_token_id=2,
    )
    torch.manual_seed(0)
    _train(LlamaForCausalLM(config), Tokenizer(folder / "tokenizer.model")).save_pretrained(folder)
    write_fast_tokenizer(folder / "tokenizer.model", folder, CONTEXT)
    return folder


def trained_gpt2(folder: Path) -> Path:
    """A GPT-2 with a tokenizer.json that adds BOS."""
    tokenizer = json_tokenizers.trained(_texts(), json_tokenizers.SPLITS["gpt-2"])
    path = json_tokenizers.write(folder, tokenizer, tokenizer_class="PreTrainedTokenizerFast")
    config = GPT2Config(
        vocab_size=601, n_embd=64, n_layer=2, n_head=4, n_positions=CONTEXT, bos_token_id=0, eos_token_id=1
    )
    torch.manual_seed(0)
    _train(GPT2LMHeadModel(config), Tokenizer(path)).save_pretrained(folder)
    return folder


def _train(model: PreTrainedModel, tokenizer: Tokenizer, steps: int = 60) -> PreTrainedModel:
    ids = torch.tensor([token for text in _texts() for token in (tokenizer.bos_id, *tokenizer.encode(text))])
    windows = ids[: len(ids) // CONTEXT * CONTEXT].view(-1, CONTEXT)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(steps):
        rows = windows[torch.randint(len(windows), (8,))]
        model(rows, labels=rows).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


def _texts() -> list[str]:
    return [_question(module)["text"] for module in MODULES]


def _question(module: str) -> dict[str, Any]:
    text = " ".join((inspect.getdoc(importlib.import_module(module)) or module).split())
    source = inspect.getsource(importlib.import_module(module)).replace("\r", "")
    words = f"{text} {source[:600]}".split()
    half = min(12, len(words) - 4)
    return {
        "name": module,
        "text": source[:900],
        "before": " ".join(words[:half]),
        "word": words[half],
        # Of several tokens, of one, and two that begin alike.
        "choices": [words[half], " ".join(words[half : half + 3]), "a", words[-1], words[-1] + " the"],
        "label": len(module) % 3,
    }


def _task(folder: Path, name: str, questions: list[dict[str, Any]], settings: dict[str, Any]) -> None:
    data = folder / f"{name}.jsonl"
    data.write_text("".join(json.dumps(question) + "\n" for question in questions), encoding="utf-8")
    files = {"test": str(data), "train": str(data)}
    task = {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": files, "cache_dir": str(folder / "cache")},
        "test_split": "test",
        "metadata": {"version": 1.0},
        **settings,
    }
    (folder / f"{name}.yaml").write_text(yaml.safe_dump(task))
