"""The training network is gpt-oss as the rest of the package computes it, and a run can be made again."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from demo.embedding import structured_embedding  # noqa: E402
from demo.export import pack  # noqa: E402
from demo.muon import orthogonal  # noqa: E402
from demo.network import Network, Sizes, fake_mxfp4, row_masks  # noqa: E402
from demo.sample import Opening  # noqa: E402
from demo.train import PLAN, Plan, Trainer  # noqa: E402
from harmonium.checkpoint.checkpoint import open_checkpoint  # noqa: E402
from harmonium.checkpoint.mxfp4 import decode_mxfp4, encode_mxfp4  # noqa: E402
from harmonium.demo import demo_checkpoint_path  # noqa: E402
from harmonium.harmony.vocabulary import vocabulary  # noqa: E402
from harmonium.model.reference import ReferenceModel  # noqa: E402


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_fake_mxfp4_is_what_the_format_holds() -> None:
    torch.manual_seed(0)
    weight = torch.randn(64, 96) * torch.logspace(-3, 1, 64).unsqueeze(1)
    weight[0, :8] = torch.tensor([6.0, 5.0, 3.5, 2.5, 1.75, 0.25, -0.0, 0.75])
    expected = decode_mxfp4(*encode_mxfp4(weight.numpy()))
    np.testing.assert_allclose(fake_mxfp4(weight).numpy(), expected, rtol=1e-6, atol=1e-7)


def test_fake_mxfp4_passes_the_gradient() -> None:
    weight = torch.randn(4, 32, requires_grad=True)
    fake_mxfp4(weight).sum().backward()
    assert torch.equal(weight.grad, torch.ones_like(weight))


def test_orthogonal_moves_singular_values_to_about_one() -> None:
    torch.manual_seed(0)
    for shape in ((3, 64, 32), (2, 32, 64)):
        values = torch.linalg.svdvals(orthogonal(torch.randn(shape)))
        assert float(values.min()) > 0.4 and float(values.max()) < 1.4


def test_embedding_shares_letters_and_digits_between_forms() -> None:
    encode = vocabulary().encode
    texts = (" Paris", "Paris", "7", "17", " the")
    rows = structured_embedding([-1, *(encode(text)[0] for text in texts)], 256)
    same, other = (
        torch.cosine_similarity(rows[1], rows[2], dim=0),
        torch.cosine_similarity(rows[1], rows[5], dim=0),
    )
    assert same > 0.8 > other + 0.3
    ones = slice(128, 138)  # the digits' place in the row
    assert torch.equal(rows[3][ones], rows[4][ones])


def test_masks_keep_conversations_apart() -> None:
    segments = torch.tensor([[0, 0, 1, 1, 2, -1]])
    positions = torch.tensor([[0, 1, 2, 3, 2, 0]])
    window, full = row_masks(positions, segments)
    sees = (full[0, 0] == 0).tolist()
    assert sees[4] == [True, True, False, False, True, False]
    assert sees[3] == [True, True, True, True, False, False]
    assert torch.equal(window, full)
    far = row_masks(torch.arange(200).unsqueeze(0), torch.zeros(1, 200, dtype=torch.long))
    assert far[0][0, 0, 199, 71] < 0 and far[0][0, 0, 199, 72] == 0 and far[1][0, 0, 199, 0] == 0


def test_logits_are_those_of_the_exported_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    torch.manual_seed(3)
    ids = Opening("low", None).ids()
    used = [-1, *sorted(set(ids))]
    sizes = Sizes(V=len(used), L=2, D=64, H=4, G=2, K=32, E=4, A=2, F=32)
    network = Network(sizes, vocabulary_size=201_088)
    network.quantizes_experts = True
    with torch.no_grad():
        for value in network.parameters():
            value.copy_((value + 0.02 * torch.randn_like(value)).bfloat16().float())
        tokens = torch.tensor([[used.index(token) for token in ids]])
        positions = torch.arange(len(ids)).unsqueeze(0)
        hidden, _ = network.hidden(tokens, positions, row_masks(positions, torch.zeros_like(positions)))
        normed = torch.nn.functional.rms_norm(hidden[0], (sizes.D,), network.nf, 1e-5)
        expected = (normed @ network.head.T).numpy()
    pack(network.state_dict(), used, vars(sizes), tmp_path / "model.xz")
    with open_checkpoint(demo_checkpoint_path(tmp_path / "model.xz")) as checkpoint:
        logits = ReferenceModel(checkpoint).logits(np.array(ids))[:, [199_999, *used[1:]]]
    assert np.abs(logits - expected).max() < 0.05 * np.abs(expected).max()


def _plan(steps: int) -> Plan:
    sizes = {"steps": steps, "rows": 1, "row_length": 200, "quantized_from": 3}
    return Plan(**{**PLAN, **sizes})


@pytest.mark.slow
def test_a_run_is_made_again_bit_for_bit_and_resumes(tmp_path: Path) -> None:
    whole = Trainer(_plan(4), tmp_path / "whole", 0, 1)
    losses = [whole.advance()[0] for _ in range(4)]
    (tmp_path / "cut").mkdir()
    cut = Trainer(_plan(4), tmp_path / "cut", 0, 1)
    again = [cut.advance()[0] for _ in range(2)]
    cut.save()
    resumed = Trainer(_plan(4), tmp_path / "cut", 0, 1)
    again += [resumed.advance()[0] for _ in range(2)]
    assert again == losses
    for mine, other in zip(whole.network.parameters(), resumed.network.parameters(), strict=True):
        assert torch.equal(mine, other)
