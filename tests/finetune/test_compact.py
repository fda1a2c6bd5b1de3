"""The compact model is gpt-oss as the package computes it; runs over drawn rows can be made again."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from harmonium.errors import ConfigError, MemoryPlanError, TrainingError  # noqa: E402
from harmonium.finetune.compact import CompactModel, row_masks  # noqa: E402
from harmonium.finetune.drawn import DrawnRows, is_drawn, load_drawn  # noqa: E402
from harmonium.finetune.packing import packed_batches  # noqa: E402
from harmonium.finetune.processes import shared_run  # noqa: E402
from harmonium.finetune.rows import Row, batch_of_rows, fill_row, samples_of_rows  # noqa: E402
from harmonium.finetune.run import finetune  # noqa: E402
from harmonium.finetune.settings import FinetuneSettings  # noqa: E402
from harmonium.finetune.train import batch_loss, mean_loss, train  # noqa: E402
from harmonium.model.torch import TorchModel  # noqa: E402
from harmonium.testing import huggingface_config, tiny_config  # noqa: E402

USED = [3, 5, 6, 10, 11, 12, 40, 41, 77]
CONFIG = tiny_config(
    vocabulary_size=90,
    num_layers=2,
    hidden_size=64,
    expert_size=32,
    num_heads=4,
    num_kv_heads=2,
    head_size=16,
    num_experts=4,
    num_active_experts=2,
    window=8,
)
SETTINGS = FinetuneSettings(
    method="full",
    from_scratch="config.json",
    optimizer="muon",
    max_steps=6,
    accumulate=2,
    threads=1,
    save_every=2,
    validate_every=3,
    seed=5,
)


class Counting:
    """An opening, then conversations whose answer repeats the question."""

    def used_tokens(self) -> Sequence[int]:
        return USED

    def rows(self, step: int, batch: int, seed: int) -> list[Row]:
        random = Random(f"{seed} {step} {batch}")
        return [self._row(random) for _ in range(2)]

    def validation_rows(self) -> list[list[Row]]:
        return [self.rows(1000, 0, 0)]

    def initial_vectors(self, used: Sequence[int], width: int) -> None:
        return None

    def _row(self, random: Random) -> Row:
        def samples() -> Iterator[list[tuple[list[int], bool]]]:
            while True:
                ids = [random.choice(USED) for _ in range(random.randint(2, 6))]
                yield [(ids, False), (ids, True)]

        # 7 is not among the used tokens: it goes by the shared row.
        return fill_row([3, 7, random.choice(USED)], samples(), 40)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_masks_keep_conversations_apart() -> None:
    segments = torch.tensor([[0, 0, 1, 1, 2, -1]])
    positions = torch.tensor([[0, 1, 2, 3, 2, 0]])
    masks = row_masks(positions, segments, 128)
    sees = (masks["full"][0, 0] == 0).tolist()
    assert sees[4] == [True, True, False, False, True, False]
    assert sees[3] == [True, True, True, True, False, False]
    assert torch.equal(masks["window"], masks["full"])
    far = row_masks(torch.arange(200).unsqueeze(0), torch.zeros(1, 200, dtype=torch.long), 128)
    near, whole = far["window"][0, 0, 199], far["full"][0, 0, 199]
    assert near[71] < 0 and near[72] == 0 and whole[0] == 0


@pytest.mark.parametrize("rounds", [False, True])
def test_loss_is_that_of_the_whole_model(rounds: bool) -> None:
    model = CompactModel(CONFIG, USED, seed=1)
    with torch.no_grad():  # biases, sinks and norms begin at 0 and 1, which would hide them
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape))
    for layer in model.weights.model.layers:
        layer.mlp.experts.fakes_mxfp4 = rounds
    batch = batch_of_rows(Counting().rows(0, 0, 0))
    whole = model.whole()
    for layer in whole.model.layers:
        layer.mlp.experts.fakes_mxfp4 = rounds
    with torch.no_grad():
        loss = float(model.loss(batch)[0]) / batch.weight
    assert mean_loss(whole, packed_batches(samples_of_rows([batch]), 200)) == pytest.approx(loss, rel=0.01)


def test_gradients_point_where_those_of_the_whole_model_do() -> None:
    model = CompactModel(CONFIG, USED, seed=2)
    batch = batch_of_rows(Counting().rows(0, 0, 0))
    model.loss(batch)[0].backward()
    compact = {name: value.grad for name, value in model.weights.named_parameters()}
    model.requires_grad_(False)
    whole = model.whole().requires_grad_(True)
    for packed in packed_batches(samples_of_rows([batch]), 200):
        batch_loss(whole, packed)[0].backward()
    for name, value in whole.named_parameters():
        if "embed_tokens" in name or "lm_head" in name:
            continue  # other rows
        assert value.grad is not None and compact[name] is not None, name
        alike = torch.cosine_similarity(value.grad.flatten(), compact[name].flatten(), dim=0)
        assert float(alike) > 0.98, name


def test_a_run_is_made_again_bit_for_bit_and_resumes(tmp_path: Path) -> None:
    whole = _trained(tmp_path / "whole", SETTINGS)
    again = _trained(tmp_path / "again", SETTINGS)
    with pytest.raises(_CutOffError):
        _trained(tmp_path / "cut", SETTINGS, stop_after=4)
    resumed = _trained(tmp_path / "cut", replace(SETTINGS, resume=True))
    for other in (again, resumed):
        for mine, theirs in zip(whole.parameters(), other.parameters(), strict=True):
            assert torch.equal(mine, theirs)
    assert _losses(tmp_path / "cut") == _losses(tmp_path / "whole")


class _CutOffError(Exception):
    pass


def _trained(out: Path, settings: FinetuneSettings, stop_after: int = 0) -> CompactModel:
    model = CompactModel(CONFIG, USED, settings.seed)
    rows = DrawnRows(Counting(), settings.accumulate, settings.max_steps or 0, settings.seed)

    def watch(row: Any, total: int) -> None:
        if row.step == stop_after + 1:  # the state of stop_after is on the disk
            raise _CutOffError

    train(model, rows, settings, out, watch=watch if stop_after else None)
    return model


def _losses(out: Path) -> list[str]:
    lines = (out / "loss.csv").read_text().splitlines()
    return [",".join(line.split(",")[:5]) for line in lines]


def test_training_learns_to_repeat(tmp_path: Path) -> None:
    settings = replace(SETTINGS, max_steps=60, lr=3e-3, validate_every=60, schedule="wsd")
    _trained(tmp_path, settings)
    losses = [float(line.split(",")[2]) for line in _losses(tmp_path)[1:]]
    assert losses[-1] < 0.6 * losses[0]


def _module(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The generator as a module of the working folder, which the processes of a run import too."""
    source = Path(__file__).read_text(encoding="utf-8")
    start, end = source.index("class Counting:"), source.index("@pytest.fixture")
    head = "from collections.abc import Iterator, Sequence\nfrom random import Random\n"
    head += "from harmonium.finetune.rows import Row, fill_row\n"
    text = f"{head}USED = {USED}\n{source[start:end]}"
    (folder / "counting_rows.py").write_text(text, encoding="utf-8")
    monkeypatch.chdir(folder)
    monkeypatch.syspath_prepend(str(folder))
    sys.modules.pop("counting_rows", None)


def _settings(folder: Path, out: str, **changes: Any) -> FinetuneSettings:
    (folder / "config.json").write_text(
        json.dumps(huggingface_config(CONFIG, "mxfp4", "rope_scaling", False))
    )
    return replace(SETTINGS, data="counting_rows:Counting", out=str(folder / out), **changes)


def test_finetune_writes_what_it_trained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _module(tmp_path, monkeypatch)
    result = finetune(_settings(tmp_path, "out"))
    assert result.validation_loss == pytest.approx(result.training.best_validation, rel=0.02)
    model = TorchModel.from_checkpoint(result.out)
    table = model.lm_head.weight
    assert torch.equal(table[7], table[89]) and not torch.equal(table[7], table[5])


@pytest.mark.slow
def test_two_processes_train_what_one_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _module(tmp_path, monkeypatch)
    one = finetune(_settings(tmp_path, "one"))
    two = finetune(_settings(tmp_path, "two", processes=2))
    alone, shared = TorchModel.from_checkpoint(one.out), TorchModel.from_checkpoint(two.out)
    assert two.training.loss == pytest.approx(one.training.loss, rel=0.02)
    rows = [line.split(",") for line in _losses(tmp_path / "two")]
    assert len(rows) == 7 and rows[1][:3] == [*_losses(tmp_path / "one")[1].split(",")[:2], rows[1][2]]
    difference = (alone.lm_head.weight - shared.lm_head.weight).detach().abs().max()
    assert float(difference) < 0.01


def test_a_process_alone_needs_no_others(monkeypatch: pytest.MonkeyPatch) -> None:
    with shared_run(SETTINGS) as world:
        assert (world.rank, world.size) == (0, 1)
        assert world.sums([1.5, 2]) == [1.5, 2]


def test_used_tokens_are_checked() -> None:
    for used in ([], [5, 3], [3, 3], [3, 90], [-1, 3]):
        with pytest.raises(ConfigError, match="used tokens"):
            CompactModel(CONFIG, used, seed=0)


def test_initial_vectors_are_checked() -> None:
    model = CompactModel(CONFIG, USED, seed=0)
    with pytest.raises(ConfigError, match=r"\(3, 64\); expected \(10, 64\)"):
        model.start_from(np.zeros((3, 64), np.float32))


def test_a_program_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no_such_module:Rows"):
        load_drawn("no_such_module:Rows")
    with pytest.raises(ConfigError, match="has no method used_tokens"):
        load_drawn("random:Random")
    assert is_drawn("demo.recipe:Recipe")
    assert not is_drawn("facts.jsonl") and not is_drawn("C:/data/facts.jsonl") and not is_drawn(None)


def test_drawn_data_needs_its_settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _module(tmp_path, monkeypatch)
    with pytest.raises(ConfigError, match="--max-steps N"):
        finetune(_settings(tmp_path, "a", max_steps=None))
    with pytest.raises(ConfigError, match="draws its own"):
        finetune(_settings(tmp_path, "b", validation="more.jsonl"))


def test_rows_give_back_their_conversations() -> None:
    row = fill_row([1, 2], [[([3, 4], False), ([5], True)], [([6], False), ([7, 8], True)]], 12)
    assert row.positions == [0, 1, 2, 3, 4, 2, 3, 4, 0, 0, 0, 0]
    samples = batch_of_rows([row]).samples()
    assert [sample.token_id_T.tolist() for sample in samples] == [[1, 2, 3, 4, 5], [1, 2, 6, 7, 8]]
    assert [sample.weight_T.tolist() for sample in samples] == [[0, 0, 0, 0, 1], [0, 0, 0, 1, 1]]


def test_a_sample_that_does_not_fit_is_left_out() -> None:
    row = fill_row([1], [[([2, 3], True)], [([4] * 9, True)], [([5], True)]], 6)
    assert row.token_ids == [1, 2, 3, 0, 0, 0] and row.num_samples == 1


def test_a_process_that_cannot_start_ends_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("harmonium.finetune.processes._CODE", "raise SystemExit(3)")
    with (
        pytest.raises(TrainingError, match="process 1 of the run ended while it started, with code 3"),
        shared_run(replace(SETTINGS, processes=2)),
    ):
        pytest.fail("nobody is there to share the run")


def test_a_mistake_is_said_once_by_however_many_processes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    _module(tmp_path, monkeypatch)
    with pytest.raises(ConfigError, match="no_such_module"):
        finetune(replace(_settings(tmp_path, "out", processes=2), data="no_such_module:Rows"))
    assert "Traceback" not in capfd.readouterr().err


def test_more_processes_than_batches_are_refused() -> None:
    with pytest.raises(ConfigError, match="processes is 3, and a step has 2 batches"):
        replace(SETTINGS, processes=3)


def test_a_model_that_memory_cannot_train_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _module(tmp_path, monkeypatch)
    settings = _settings(tmp_path, "out")
    large = replace(CONFIG, num_layers=2, hidden_size=65_536, expert_size=65_536, num_experts=128)
    (tmp_path / "config.json").write_text(
        json.dumps(huggingface_config(large, "mxfp4", "rope_scaling", False))
    )
    with pytest.raises(MemoryPlanError, match="full training of"):
        finetune(settings)


def test_compiling_is_for_drawn_data(tmp_path: Path) -> None:
    (tmp_path / "data.jsonl").write_text("{}\n")
    settings = FinetuneSettings(
        model="demo", data=str(tmp_path / "data.jsonl"), out=str(tmp_path / "out"), compile=True
    )
    with pytest.raises(ConfigError, match="compile is for data that a program draws"):
        finetune(settings)
