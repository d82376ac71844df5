"""The config tree, recipes and overrides: what is refused, in which words, and what a resume may change."""

from pathlib import Path
from typing import get_args

import pytest

from pretrain.config import OptimizerConfig, RunConfig, ScheduleConfig
from pretrain.optimizers import OPTIMIZERS
from pretrain.recipe import apply_overrides, check_unchanged, dump_config, load_config
from pretrain.resume_policy import RESUME_POLICY, changes, check_allowed, check_resume, flat, resume_policy
from pretrain.schedule import SHAPES
from tests.small_run import RECIPE, small_config

RECIPES = sorted(RECIPE.parent.glob("*.yaml"))


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_is_valid_and_survives_a_round_trip(recipe: Path, tmp_path: Path) -> None:
    config = load_config(recipe)
    dump_config(config, tmp_path / "config.yaml")
    assert load_config(tmp_path / "config.yaml") == config
    assert config.name == recipe.stem


def test_a_config_that_was_changed_by_hand_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    dump_config(small_config(), path)
    check_unchanged(path)
    path.write_text(path.read_text().replace("seed: 0", "seed: 7"))
    with pytest.raises(ValueError, match="was changed by hand.*put it back.*change a run with --set KEY=VALUE"):
        check_unchanged(path)
    path.write_text("seed: 7\n")  # one that it never wrote
    with pytest.raises(ValueError, match="was changed by hand"):
        check_unchanged(path)


def test_there_are_recipes_for_all_sizes() -> None:
    assert {path.stem for path in RECIPES} == {
        "demo",
        "58m",
        "125m",
        "1b",
        "7b",
        "70b",
        "tiny-moe",
        "mixtral-8x7b",
        "qwen3-30b-a3b",
    }


VALIDATED = "evaluation={every_steps: 200, sources: [{name: a, path: x}]}"
BROKEN = {
    "optimizer.lrr=3": "unknown key optimizer.lrr: did you mean lr?",
    "batch.global_batch=3": "did you mean global_batch_size?",
    "foo=1": "unknown key foo",
    "model.preset=58n": "unknown model preset '58n'; did you mean '58m'",
    "schedule.warmup_tokens=5": "warmup_tokens does not go with total_steps",
    "schedule={total_steps: null}": "total_steps is missing",
    "schedule.name=wsd": "name=wsd needs decay_steps",
    "schedule.decay_steps=5": "name=cosine takes no decay_steps",
    "schedule.warmup_steps=20000": "do not fit into total_steps=10000",
    "precision=bf8": "precision='bf8'",
    "parallel.zero_stage=0": "set parallel.zero_stage to 1",
    "parallel.zero_stage=3\nprecision=fp16\nmodel.moe={experts: 4, experts_per_token: 2, expert_ffn_size: 16}": (
        "precision=fp16 with model.moe does not go with parallel.zero_stage=3"
    ),
    "parallel={zero_stage: 3}\noptimizer.name=muon": "updates the parts of a matrix at different times",
    "parallel.offload_optimizer=cpu\noptimizer.name=muon": "set parallel.offload_optimizer to none",
    **{f"parallel.{axis}=0": f"parallel.{axis}=0: input should be greater than 0" for axis in ("tensor", "sequence")},
    "parallel.expert=-1": "parallel.expert=-1: input should be greater than 0",
    "parallel.activation_checkpointing_every=0": "activation_checkpointing_every=0: input should be greater than 0",
    "parallel.activation_checkpointing=some": "activation_checkpointing='some'",
    "parallel={zero_stage: 0, offload_optimizer: cpu}\nprecision=fp32": "set zero_stage to 1",
    "parallel={zero_stage: 2, offload_parameters: cpu}": "needs zero_stage=3, the only one that shards parameters",
    "parallel.offload_optimizer=nvme": "offload_optimizer='nvme': input should be 'none' or 'cpu'",
    "optimizer.lr=-1": "optimizer.lr=-1: input should be greater than 0",
    "optimizer.betas=[0.9, 1.0]": "must lie in [0, 1)",
    "batch.ramp=[[10, 4], [5, 8]]": "tokens strictly rising",
    "batch.ramp=[[0, 4]]": "must be (tokens, size) pairs, positive",
    "data.sources=[]": "sources is empty",
    "data.sources=[{name: a}]": "data.sources.0.path is missing: set it in the recipe",
    "evaluation.every_steps=5": "name a held-out source",
    "checkpoint.every_steps=-1": "checkpoint.every_steps=-1: input should be greater than or equal to 0",
    "checkpoint.keep=0": "checkpoint.keep=0: input should be greater than 0",
    "checkpoint.keep_every_steps=-500": "checkpoint.keep_every_steps=-500: input should be greater than or equal to 0",
    "checkpoint.keep_every_steps=750": (
        "keep_every_steps=750 is no multiple of every_steps=500, and so asks for checkpoints that are not made"
    ),
    "checkpoint.keep_every_steps=250": "choose a multiple, or 0",
    "checkpoint={every_steps: 0, keep_every_steps: 500}": "keep_every_steps=500 is no multiple of every_steps=0",
    "checkpoint.keep_best=true": "checkpoint.every_steps=500 is no multiple of evaluation.every_steps=0: make it one",
    f"checkpoint={{keep_best: true, every_steps: 0}}\n{VALIDATED}": (
        "checkpoint.keep_best=true needs a validation at every checkpoint, but checkpoint.every_steps=0 is no multiple "
        "of evaluation.every_steps=200"
    ),
    f"checkpoint.keep_best=true\n{VALIDATED}": "evaluation.every_steps=200: make it one, or set checkpoint.keep_best",
    "evaluation.sources=[{name: a, path: x}, {name: a, path: y}]": "names must be unique",
    "name=../up": "name='../up'",
    "seed=-1": "seed=-1",
    "model.rope_scaling={type: linear}": "with --set model.rope_scaling.factor=VALUE",
    "schedule={total_tokens: 9, warmup_tokens: 1, total_steps: null}": "with warmup_steps: null",
    "model={hidden_size: 100}": "hidden_size 100 is not divisible by num_heads 8",
    "lr": "expected KEY=VALUE",
    "a..b=1": "expected KEY=VALUE",
    "data.sources=[{": "is not valid YAML",
}


@pytest.mark.parametrize("override", BROKEN)
def test_a_broken_override_says_what_is_wrong(override: str) -> None:
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        load_config(RECIPE, override.splitlines())
    assert BROKEN[override] in str(caught.value)
    assert "\n" not in str(caught.value)


def test_checkpoints_are_kept_where_they_are_made() -> None:
    for settings in (
        ["checkpoint={every_steps: 500, keep_every_steps: 1500}"],
        ["checkpoint={every_steps: 0, keep_every_steps: 0}"],
        ["checkpoint={every_steps: 400, keep_best: true}", VALIDATED],
        ["checkpoint={every_steps: 200, keep_best: true, keep_every_steps: 600, keep: 1}", VALIDATED],
    ):
        kept = load_config(RECIPE, settings).checkpoint
        assert kept.asynchronous
    assert (kept.every_steps, kept.keep, kept.keep_every_steps, kept.keep_best) == (200, 1, 600, True)


def test_a_missing_or_broken_recipe(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no such recipe"):
        load_config(tmp_path / "none.yaml")
    (tmp_path / "list.yaml").write_text("- 1")
    with pytest.raises(ValueError, match="expected a mapping"):
        load_config(tmp_path / "list.yaml")
    (tmp_path / "broken.yaml").write_text("a: [")
    with pytest.raises(ValueError, match="not valid YAML"):
        load_config(tmp_path / "broken.yaml")


def test_overrides_merge_mappings_and_replace_lists() -> None:
    tree = {"a": {"b": 1, "c": [1, 2]}}
    assert apply_overrides(tree, ["a={b: 2}", "a.c=[3]", "a.d=null"]) == {"a": {"b": 2, "c": [3], "d": None}}
    assert tree == {"a": {"b": 1, "c": [1, 2]}}
    assert load_config(RECIPE, ["optimizer.lr=3e-4"]).optimizer.lr == 3e-4


def test_the_config_is_frozen() -> None:
    with pytest.raises(ValueError, match="frozen"):
        small_config().seed = 3  # type: ignore[misc]


@pytest.mark.parametrize("data", ["[[5, 5]]", "[[7, 9], [3, 4]]", "[[0, 4], [3, 6]]", "[[-2, 3]]"])
def test_left_out_ranges_rise(data: str) -> None:
    with pytest.raises(ValueError, match="must be .start, end. pairs of positions.*sort and merge them"):
        small_config(f"skips={{data: {data}}}")


def test_every_key_has_a_resume_policy() -> None:
    config = small_config()
    assert {resume_policy(key) for key in flat(config.model_dump(mode="json"))} == {
        "free",
        "recorded",
        "refused",
        "fixed",
    }
    assert {key.split(".")[0] for key in RESUME_POLICY} == set(RunConfig.model_fields)


@pytest.mark.parametrize(
    ("override", "policy"),
    [
        ("parallel.zero_stage=3", "free"),
        ("schedule.total_steps=9", "free"),
        ("batch.micro_batch_size=1", "free"),
        ("optimizer.lr=1", "recorded"),
        ("data.sources=[{name: b, path: c}]", "recorded"),
        ("schedule.warmup_steps=1", "recorded"),
        ("model.rope_theta=5", "refused"),
        ("data.sequence_length=8", "recorded"),
        ("data.packing=best_fit", "refused"),
        ("data.cache.folder=/scratch", "free"),
        ("seed=1", "refused"),
    ],
)
def test_what_a_resume_may_change(override: str, policy: str) -> None:
    differences = changes(small_config(), small_config(override))
    assert {resume_policy(key) for key in differences} == {policy}
    if policy != "refused":
        check_resume(differences, [])
        return
    (key,) = differences
    with pytest.raises(ValueError, match=f"insist with --allow {key}"):
        check_resume(differences, ["data.sources"])
    check_resume(differences, [key])
    check_resume(differences, [key.split(".")[0]])


def test_only_what_is_refused_can_be_allowed() -> None:
    check_allowed(["seed", "model.rope_theta", "tokenizer", "manifest", "data.sequence_length"])
    for key in ("seeed", "optimizer.lr", "all"):
        with pytest.raises(ValueError, match=f"--allow {key}: nothing of that name is refused"):
            check_allowed([key])


def test_registries_and_literals_agree() -> None:
    assert set(get_args(ScheduleConfig.model_fields["name"].annotation)) == set(SHAPES)
    assert set(get_args(OptimizerConfig.model_fields["name"].annotation)) == set(OPTIMIZERS)
