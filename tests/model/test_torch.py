"""The PyTorch model against the NumPy reference, and its gradients against Transformers' autograd."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from harmonium.checkpoint import open_checkpoint
from harmonium.errors import ConfigError
from harmonium.model.reference import ReferenceModel
from tests.model.tiny_models import CONFIGS, prompt, tiny_checkpoint, tiny_folder
from tests.model.torch_extra import torch
from tests.model.transformers_oracle import transformers_model

from harmonium.model.torch import TorchModel  # isort: skip  # after the check that torch is there

TOLERANCE = 1e-4


def _ids(name: str, length: int) -> Any:
    return torch.from_numpy(prompt(name, length).astype(np.int64))


def _logits(model: TorchModel, ids: Any, **more: Any) -> Any:
    with torch.no_grad():
        return model(ids, **more)


@pytest.mark.parametrize("experts", ["mxfp4", "float"])
@pytest.mark.parametrize("name", CONFIGS)
def test_logits_are_the_references(name: str, experts: Any) -> None:
    checkpoint = tiny_checkpoint(name)
    expected_TV = ReferenceModel(checkpoint).logits(prompt(name, 129))
    logits_TV = _logits(TorchModel.from_checkpoint(checkpoint, experts=experts), _ids(name, 129))
    np.testing.assert_allclose(logits_TV.numpy(), expected_TV, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize(
    ("layout", "experts"), [("huggingface", "mxfp4"), ("original", "mxfp4"), ("huggingface", "bf16")]
)
def test_every_layout_of_files_gives_the_same_logits(layout: Any, experts: Any, tmp_path: Path) -> None:
    expected_TV = ReferenceModel(tiny_checkpoint("narrow")).logits(prompt("narrow", 40))
    model = TorchModel.from_checkpoint(tiny_folder(tmp_path, "narrow", layout, experts))
    logits_TV = _logits(model, _ids("narrow", 40))
    np.testing.assert_allclose(logits_TV.numpy(), expected_TV, rtol=0, atol=TOLERANCE)


def test_bf16_experts_are_not_called_mxfp4(tmp_path: Path) -> None:
    with (
        open_checkpoint(tiny_folder(tmp_path, "narrow", "huggingface", "bf16")) as checkpoint,
        pytest.raises(ConfigError, match="experts are bf16"),
    ):
        TorchModel.from_checkpoint(checkpoint, experts="mxfp4")


@pytest.mark.oracle
@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("name", ["narrow", "wide"])
def test_gradients_are_those_of_transformers_autograd(name: str) -> None:
    pytest.importorskip("transformers", reason="the extra [oracle] is not installed")
    checkpoint, ids = tiny_checkpoint(name), _ids(name, 129)
    model, oracle = TorchModel.from_checkpoint(checkpoint, experts="float"), transformers_model(checkpoint)
    pull_TV = torch.randn(len(ids), CONFIGS[name].vocabulary_size, generator=torch.Generator().manual_seed(1))
    (model(ids) * pull_TV).sum().backward()
    (oracle(ids[None], use_cache=False).logits[0] * pull_TV).sum().backward()
    theirs = dict(oracle.named_parameters())
    ours = dict(model.named_parameters())
    assert ours.keys() == theirs.keys()
    for key, parameter in ours.items():
        expected = theirs[key].grad
        assert expected.abs().max() > 0, key
        difference = (parameter.grad - expected).abs().max() / expected.abs().max()
        assert difference < 1e-4, f"{key}: {difference:.2e} of its largest gradient"


def test_frozen_mxfp4_experts_pass_the_gradient_of_float_ones() -> None:
    grads = {}
    for experts in ("mxfp4", "float"):
        model = TorchModel.from_checkpoint(tiny_checkpoint("tall"), experts=experts)  # type: ignore[arg-type]
        model(_ids("tall", 60)).square().sum().backward()
        grads[experts] = {key: p.grad for key, p in model.named_parameters() if p.grad is not None}
    shared = grads["mxfp4"].keys()
    assert len(shared) == len(grads["float"]) - 2 * CONFIGS["tall"].num_layers
    for key in shared:
        scale = grads["float"][key].abs().max()
        assert (grads["mxfp4"][key] - grads["float"][key]).abs().max() < 1e-5 * scale, key


def test_packed_samples_do_not_see_each_other() -> None:
    model = TorchModel.from_checkpoint(tiny_checkpoint("narrow"))
    parts = [_ids("narrow", length) for length in (40, 7, 129)]
    packed_TV = _logits(model, torch.cat(parts), starts=(0, 40, 47))
    for part, logits_TV in zip(parts, packed_TV.split([40, 7, 129]), strict=True):
        torch.testing.assert_close(logits_TV, _logits(model, part), rtol=0, atol=2e-5)


def test_rows_are_those_of_all_logits() -> None:
    model, rows = TorchModel.from_checkpoint(tiny_checkpoint("narrow")), torch.tensor([3, 39, 0])
    ids = _ids("narrow", 40)
    torch.testing.assert_close(_logits(model, ids, rows=rows), _logits(model, ids)[rows], rtol=0, atol=2e-5)


@pytest.mark.parametrize("starts", [(), (1,), (0, 5, 5), (0, 9, 4), (0, 40)])
def test_samples_that_lie_nowhere_are_refused(starts: tuple[int, ...]) -> None:
    model = TorchModel.from_checkpoint(tiny_checkpoint("narrow"))
    with pytest.raises(ConfigError, match="expected 0, ascending, below 40"):
        model(_ids("narrow", 40), starts=starts)


def test_recomputing_changes_no_gradient() -> None:
    grads = []
    for recomputes in (False, True):
        model = TorchModel.from_checkpoint(tiny_checkpoint("middle"), experts="float")
        model.recomputes = recomputes
        model(_ids("middle", 60), starts=(0, 20)).square().mean().backward()
        grads.append([parameter.grad for parameter in model.parameters()])
    for plain, again in zip(*grads, strict=True):
        torch.testing.assert_close(again, plain, rtol=0, atol=0)


def test_bf16_logits_are_near_the_references() -> None:
    expected_TV = ReferenceModel(tiny_checkpoint("wide")).logits(prompt("wide", 60))
    for experts in ("mxfp4", "float"):
        model = TorchModel.from_checkpoint(tiny_checkpoint("wide"), torch.bfloat16, experts)  # type: ignore[arg-type]
        logits_TV = _logits(model, _ids("wide", 60))
        assert logits_TV.dtype == torch.bfloat16
        error_TV = logits_TV.float().numpy() - expected_TV
        # A token whose two best experts change places is far off; the median is what rounding does.
        assert np.median(np.abs(error_TV)) < 0.05 * expected_TV.std()


def test_a_seed_gives_one_model_and_another_seed_another() -> None:
    config = CONFIGS["narrow"]
    first, again, other = (TorchModel.from_config(config, seed).state_dict() for seed in (3, 3, 4))
    assert all(torch.equal(first[key], again[key]) for key in first)
    assert not torch.equal(first["lm_head.weight"], other["lm_head.weight"])


def test_a_new_model_learns_a_sequence_by_heart() -> None:
    torch.manual_seed(0)
    model, ids = TorchModel.from_config(CONFIGS["narrow"], seed=0), _ids("narrow", 33)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    losses = []
    for _ in range(30):
        loss = torch.nn.functional.cross_entropy(model(ids[:-1]), ids[1:])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[0] == pytest.approx(np.log(CONFIGS["narrow"].vocabulary_size), rel=0.05)
    assert losses[-1] < 0.1 * losses[0]
