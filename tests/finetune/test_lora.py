"""LoRA in the PyTorch model: gradients, files that PEFT and our own reader take."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from harmonium.checkpoint.lora import open_lora
from harmonium.errors import ConfigError
from harmonium.model.reference import ReferenceModel
from tests.lora_files import lora_tensors, write_lora
from tests.model.tiny_models import CONFIGS, prompt, tiny_checkpoint, tiny_folder
from tests.model.torch_extra import torch
from tests.model.transformers_oracle import transformers_model

from harmonium.finetune.lora import TARGETS, Lora, LoraSettings, attach_lora, load_lora  # isort: skip
from harmonium.model.torch import TorchModel  # isort: skip

MODEL = CONFIGS["narrow"]
IDS = torch.from_numpy(prompt("narrow", 60).astype(np.int64))


def _model(**more: Any) -> TorchModel:
    return TorchModel.from_checkpoint(tiny_checkpoint("narrow"), **more)


def _trained(settings: LoraSettings, seed: int = 0) -> tuple[TorchModel, Lora]:
    """A model with an adapter whose B is no longer zero."""
    model = _model()
    lora = attach_lora(model, settings, seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in lora.named_parameters():
            if name.endswith(".b"):
                parameter.normal_(0, 0.1, generator=generator)
    return model, lora


def _logits(model: TorchModel) -> Any:
    with torch.no_grad():
        return model(IDS)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("shares_a", [False, True])
def test_every_target_has_a_gradient_and_changes_the_logits(target: Any, shares_a: bool) -> None:
    if shares_a and target != "experts":
        pytest.skip("shares_a is about experts")
    plain_TV = _logits(_model())
    model, lora = _trained(LoraSettings(4, 8.0, (target,), shares_a))
    changed_TV = model(IDS)
    assert (changed_TV - plain_TV).abs().max() > 1e-2
    changed_TV.square().mean().backward()
    for name, parameter in lora.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().max() > 0, name


def test_a_new_adapter_changes_nothing_and_b_alone_has_a_gradient() -> None:
    model = _model()
    lora = attach_lora(model, LoraSettings(4, 8.0, TARGETS), seed=0)
    torch.testing.assert_close(_logits(model), _logits(_model()), rtol=0, atol=1e-6)
    model(IDS).square().mean().backward()
    for name, parameter in lora.named_parameters():
        assert (parameter.grad.abs().max() > 0) == name.endswith(".b"), name


def test_nothing_but_the_adapter_is_trained() -> None:
    model, lora = _trained(LoraSettings(4, 8.0, TARGETS))
    trained = {id(parameter) for parameter in model.parameters() if parameter.requires_grad}
    assert trained == {id(parameter) for parameter in lora.parameters()}


def test_expert_factors_get_the_gradient_of_the_merged_weight() -> None:
    # d loss / d A = scale * B.T @ d loss / d W for each expert, and the same for B.
    model, lora = _trained(LoraSettings(4, 8.0, ("experts",)))
    whole = _model(experts="float")
    with torch.no_grad():
        for layer, pairs in zip(whole.model.layers, lora.layers, strict=True):
            experts: Any = layer.mlp.experts  # type: ignore[union-attr]
            for target, weight in (("gate_up", experts.gate_up_proj), ("down", experts.down_proj)):
                pair = pairs[f"experts.{target}"]
                weight += pair.scale * (pair.b @ pair.a).mT
    for each in (model, whole):
        each(IDS).square().mean().backward()
    pair = lora.layers[2]["experts.gate_up"]
    weight_grad = whole.model.layers[2].mlp.experts.gate_up_proj.grad.mT  # type: ignore[union-attr]
    assert weight_grad.abs().max() > 0
    torch.testing.assert_close(pair.a.grad, pair.scale * pair.b.mT @ weight_grad, rtol=1e-3, atol=1e-6)
    torch.testing.assert_close(pair.b.grad, pair.scale * weight_grad @ pair.a.mT, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("shares_a", [False, True])
def test_saved_and_loaded_adapters_give_the_same_logits(shares_a: bool, tmp_path: Path) -> None:
    model, lora = _trained(LoraSettings(3, 6.0, TARGETS, shares_a))
    lora.save(tmp_path / "adapter", "narrow")
    again = _model()
    loaded = load_lora(again, tmp_path / "adapter")
    assert (loaded.settings.rank, loaded.settings.alpha) == (3, 6.0)
    assert loaded.settings.targets == TARGETS
    torch.testing.assert_close(_logits(again), _logits(model), rtol=0, atol=1e-6)


def test_the_file_that_the_native_engine_reads_means_the_same_matrices(tmp_path: Path) -> None:
    _, lora = _trained(LoraSettings(3, 6.0, TARGETS))
    lora.save(tmp_path, "narrow")
    with open_lora(tmp_path, MODEL) as files:
        adapter = files.load()
    for pairs, read in zip(lora.layers, adapter.layers, strict=True):
        assert pairs.keys() == read.keys()
        for target, pair in pairs.items():
            delta = (pair.scale * pair.b @ pair.a).detach().numpy()
            for expert in range(len(delta)):
                found = read[target].delta(expert if len(delta) > 1 else None)
                np.testing.assert_allclose(found, delta[expert], rtol=1e-5, atol=1e-6)


@pytest.mark.oracle
@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("targets", [TARGETS, ("experts",), ("attention",)])
def test_peft_loads_it_strictly_and_computes_the_same(targets: Any, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft", reason="peft is not installed")
    model, lora = _trained(LoraSettings(3, 6.0, targets))
    lora.save(tmp_path, "narrow")
    oracle = peft.PeftModel.from_pretrained(transformers_model(tiny_checkpoint("narrow")), tmp_path)
    held = {key for key in oracle.state_dict() if "lora_" in key}
    assert len(held) == len(lora.named_parameters())
    result = oracle.load_adapter(tmp_path, "again")
    assert not result.unexpected_keys
    assert not [key for key in result.missing_keys if "lora_" in key]
    with torch.no_grad():
        theirs_TV = oracle(IDS[None], use_cache=False).logits[0]
    torch.testing.assert_close(_logits(model), theirs_TV, rtol=0, atol=2e-4)


def test_an_adapter_of_a_part_of_attention_is_not_trained_further(tmp_path: Path) -> None:
    folder = write_lora(
        tmp_path / "some",
        lora_tensors(MODEL, modules=("q_proj",), parameters=()),
        target_modules=["q_proj"],
        target_parameters=[],
    )
    with pytest.raises(ConfigError, match="whole groups of attention, experts, router"):
        load_lora(_model(), folder)


def test_a_second_adapter_is_refused() -> None:
    model = _model()
    attach_lora(model, LoraSettings(), seed=0)
    with pytest.raises(ConfigError, match="has an adapter already"):
        attach_lora(model, LoraSettings(), seed=0)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"rank": 0}, "rank is 0; expected a whole number from 1 to 512"),
        ({"rank": 513}, "rank is 513"),
        ({"alpha": 0.0}, "alpha is 0.0"),
        ({"alpha": float("nan")}, "alpha is nan"),
        ({"targets": ()}, "targets is empty; expected some of attention, experts, router"),
        ({"targets": ("head",)}, "targets is head"),
        ({"targets": ("router",), "shares_a": True}, "shares_a"),
    ],
)
def test_settings_out_of_range_are_named(values: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        LoraSettings(**values)


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    _, lora = _trained(LoraSettings(2, 2.0, ("router",)))
    with pytest.raises(ConfigError, match="the adapter cannot be written"):
        lora.save(tmp_path / "file" / "adapter", "narrow")


def test_an_adapter_learns_over_mxfp4_in_bf16_with_recomputing() -> None:
    model = _model(dtype=torch.bfloat16)
    model.recomputes = True
    lora = attach_lora(model, LoraSettings(8, 16.0, TARGETS), seed=0)
    optimizer = torch.optim.AdamW(lora.parameters(), lr=1e-2)
    losses = []
    for _ in range(12):
        loss = torch.nn.functional.cross_entropy(model(IDS[:-1]).float(), IDS[1:])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.6 * losses[0]


def test_the_references_logits_with_merged_weights_are_the_adapters(tmp_path: Path) -> None:
    from harmonium.checkpoint import open_checkpoint
    from harmonium.finetune.merge import merge_adapter

    model, lora = _trained(LoraSettings(3, 6.0, TARGETS))
    lora.save(tmp_path / "adapter", "narrow")
    folder = tiny_folder(tmp_path, "narrow")
    merge_adapter(folder, tmp_path / "adapter", tmp_path / "merged", experts="bf16")
    with open_checkpoint(tmp_path / "merged") as merged:
        merged_TV = ReferenceModel(merged).logits(prompt("narrow", 60))
    error_TV = np.abs(_logits(model).numpy() - merged_TV)
    # Merged weights are rounded to bf16; a token whose experts change places is far off.
    assert np.median(error_TV) < 0.01 * merged_TV.std()
