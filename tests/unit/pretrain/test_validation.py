"""Validation on one rank: the score is right, and training does not notice."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from pretrain.checkpoint.save import save_checkpoint
from pretrain.config import RunConfig
from pretrain.engine import agree, build_decoder
from pretrain.engine_torch import TorchEngine
from pretrain.evaluation.job import EvaluationJob, evaluate_job
from pretrain.evaluation.record import read_scores
from pretrain.evaluation.score import Score
from pretrain.evaluation.texts import texts_config
from pretrain.held_out import read_held_out
from pretrain.parallel_dims import ParallelDims
from pretrain.run_dir import RunDir, event_line
from pretrain.state import TrainState
from pretrain.validation import Validation, forget_after, mean_loss, past_losses
from tests.held_out_folder import VOCABULARY, held_out_texts, write_held_out
from tests.small_run import MODELS, rank_batches, small_config

CPU = torch.device("cpu")
MODEL_NAMES = ("dense", "moe", "moebias")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    made = tmp_path_factory.mktemp("held_out")
    return write_held_out(made / "a", held_out_texts()), write_held_out(made / "b", held_out_texts(9, seed=1))


def config_of(folders: tuple[Path, Path], *overrides: str) -> RunConfig:
    sources = ", ".join(f"{{name: {name}, path: '{path}'}}" for name, path in zip("ab", folders, strict=True))
    return small_config(
        f"model.vocab_size={VOCABULARY}",
        "precision=fp32",
        f"evaluation={{every_steps: 1, windows: 1000, sources: [{sources}]}}",
        *overrides,
    )


def engine_of(config: RunConfig) -> TorchEngine:
    return TorchEngine(build_decoder(config, CPU, torch.float32), config, CPU)


def validation_of(config: RunConfig) -> Validation:
    return Validation(config, ParallelDims.of_this_rank(config), None)


def plain_nats(engine: TorchEngine, config: RunConfig, source: int) -> float:
    """One window at a time, the softmax in fp64."""
    T, total = config.data.sequence_length, 0.0
    for ids in read_held_out(config.evaluation.sources[source], 1 << 40).documents:
        inputs, targets = torch.tensor([1, *ids.tolist()]), torch.tensor([*ids.tolist(), 2])
        for window, of_window in zip(inputs.split(T), targets.split(T), strict=True):
            with torch.no_grad():
                log_p = engine.decoder.logits(engine.decoder.hidden(window[None]))[0].double().log_softmax(dim=-1)
            total -= log_p.gather(1, of_window[:, None]).sum().item()
    return total


@pytest.mark.parametrize("model", MODEL_NAMES)
def test_the_score_is_that_of_each_window_by_itself(folders: tuple[Path, Path], model: str) -> None:
    config = config_of(folders, f"model.moe={MODELS[model]}")
    engine = engine_of(config)
    beats: list[None] = []
    scores = validation_of(config).scores(engine, lambda: beats.append(None))
    assert scores.keys() == {"a", "b"}
    assert len(beats) > 2
    for number, (score, texts) in enumerate(
        zip(scores.values(), (held_out_texts(), held_out_texts(9, 1)), strict=True)
    ):
        assert score.nats == pytest.approx(plain_nats(engine, config, number), rel=1e-6)
        assert (score.bytes, score.documents) == (sum(len(text.encode()) for text in texts), len(texts))


@pytest.mark.parametrize("model", MODEL_NAMES)
def test_it_is_what_an_evaluation_of_the_checkpoint_says(
    folders: tuple[Path, Path], tmp_path: Path, model: str
) -> None:
    config = config_of(folders, f"model.moe={MODELS[model]}")
    engine = engine_of(config)
    agree(engine.train_step(rank_batches(config, 0, 0, 1), lr=1e-2))
    tokenizer = folders[0] / "tokenizer.model"
    checkpoint = save_checkpoint(tmp_path / "checkpoints", engine, TrainState(step=1), config, tokenizer, None)
    for source, score in zip(config.evaluation.sources, validation_of(config).scores(engine).values(), strict=True):
        folder, texts = tmp_path / source.name, texts_config(data=[source.path])
        evaluate_job(EvaluationJob(str(checkpoint), texts, window=config.data.sequence_length), folder)
        documents = list(read_scores(folder))
        assert score.nats == pytest.approx(sum(document.nats for document in documents), rel=1e-6)
        assert score.tokens == sum(document.tokens for document in documents)
        assert score.bytes == sum(document.bytes for document in documents)
        assert score.documents == len(documents)


def test_a_document_mask_changes_nothing(folders: tuple[Path, Path]) -> None:
    """Rows are of one document each anyway."""
    plain, masked = (config_of(folders, f"model.document_mask={mask}") for mask in ("false", "true"))
    assert validation_of(plain).scores(engine_of(plain)) == validation_of(masked).scores(engine_of(masked))


def state_of(engine: TorchEngine) -> dict[str, Tensor]:
    return {f"{piece.name} {kind}": view.clone() for piece in engine.pieces() for kind, view in piece.views.items()}


@pytest.mark.parametrize("model", MODEL_NAMES)
def test_training_does_not_notice(folders: tuple[Path, Path], model: str) -> None:
    """Every digit of loss, norm and loads; every bit of the weights, the optimizer's state and the routers' biases."""
    config = config_of(folders, f"model.moe={MODELS[model]}")
    validated, undisturbed = engine_of(config), engine_of(config)
    validation = validation_of(config)
    for step in range(4):
        before = state_of(validated)
        validation.scores(validated)
        after = state_of(validated)
        assert all(torch.equal(before[name], after[name]) for name in before)
        found, expected = (
            agree(engine.train_step(rank_batches(config, step, 0, 1), lr=1e-3)) for engine in (validated, undisturbed)
        )
        assert found == expected
    found_state, expected_state = state_of(validated), state_of(undisturbed)
    assert all(torch.equal(found_state[name], expected_state[name]) for name in expected_state)


def test_nothing_is_read_for_a_run_that_does_not_validate(folders: tuple[Path, Path]) -> None:
    config = config_of(folders, "evaluation={every_steps: 0, sources: [{name: none, path: nowhere}]}")
    assert validation_of(config).scores(engine_of(config)) == {}
    with pytest.raises(ValueError, match="nowhere does not exist"):
        validation_of(config_of(folders, "evaluation={every_steps: 1, sources: [{name: none, path: nowhere}]}"))


def test_losses_of_a_run_are_means_over_sources(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    assert past_losses(run) == {}
    with open(run.events_path, "w") as events:
        for step, *of_sources in ((2, 3.0, 4.0), (4, 2.0, 1.0), (4, 2.0, 2.0), (6, 1.0, 1.0)):
            by_source = {name: {"loss": loss} for name, loss in zip("ab", of_sources, strict=True)}
            events.write(event_line("evaluation", {"step": step, "tokens": 0, "by_source": by_source, "seconds": 0.0}))
            # As an earlier release wrote it, which scored otherwise.
            events.write(event_line("evaluation", {"step": step - 1, "tokens": 0, "losses": {"a": 1.0}}))
    losses = past_losses(run)
    assert losses == {2: 3.5, 4: 2.0, 6: 1.0}
    assert past_losses(run, until_step=4) == {2: 3.5, 4: 2.0}
    forget_after(losses, 3)
    assert losses == {2: 3.5}
    assert mean_loss(score.loss for score in (Score(6.0, 2, 1, 1), Score(2.0, 2, 1, 1))) == 2.0
