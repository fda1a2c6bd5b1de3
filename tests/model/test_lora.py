from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from harmonium.checkpoint import open_checkpoint
from harmonium.checkpoint.lora import LoraAdapter, open_lora
from harmonium.config import Weights
from harmonium.kernels.runtime import configure, current_isa, current_threads, supported_isa
from harmonium.model.native import NativeRunner
from harmonium.model.reference import Array, ReferenceModel
from tests.lora_files import MODULES, PARAMETERS, lora_tensors, make_lora, write_lora
from tests.model.driver import Driver
from tests.model.rounded_reference import Bf16Reference, Int8Reference, typical_error
from tests.model.tiny_models import CONFIGS, prompt, tiny_checkpoint, tiny_folder

Logits = npt.NDArray[Any]
WEIGHTS: tuple[Weights, ...] = ("bf16", "int8")

# As for a model without adapter (test_native.py, docs/numerics.md).
LARGEST_ERROR = {"bf16": 0.02, "int8": 0.05}
UNEXPLAINED = {"bf16": 0.006, "int8": 0.02}
ROUNDED = {"bf16": Bf16Reference, "int8": Int8Reference}
SAME = {"bf16": 0.006, "int8": 0.02}


@pytest.fixture(autouse=True)
def _kernels() -> Iterator[None]:
    isa, threads = current_isa(), current_threads()
    yield
    configure(isa, threads)


def load(folder: Path, name: str) -> LoraAdapter:
    with open_lora(folder, CONFIGS[name]) as files:
        return files.load()


@pytest.fixture
def adapters(tmp_path: Path) -> dict[str, LoraAdapter]:
    """Two adapters for "narrow", one of them in bf16."""
    return {
        "a": load(make_lora(tmp_path / "a", CONFIGS["narrow"], seed=1), "narrow"),
        "b": load(make_lora(tmp_path / "b", CONFIGS["narrow"], seed=2, dtype="BF16"), "narrow"),
    }


def native(
    adapters: Mapping[str, LoraAdapter], weights: Weights, name: str = "narrow", seed: int = 1
) -> Driver:
    runner = NativeRunner(tiny_checkpoint(name), weights, adapters=tuple(adapters.values()))
    return Driver(runner, seed=seed)


class MergedReference(ReferenceModel):
    """The adapter is added to the weights, which are then those of a model without one."""

    def __init__(self, checkpoint: Any, adapter: LoraAdapter) -> None:
        super().__init__(checkpoint, np.float64)
        self.merged = adapter

    def linear(self, x_TK: Array, weight_name: str, bias_name: str | None = None) -> Array:
        weight_NK = self.bf16(self.checkpoint.tensor(weight_name)) + self._delta(
            weight_name.removesuffix(".weight")
        )
        out_TN = x_TK @ weight_NK.T
        return out_TN if bias_name is None else out_TN + self.bf16(self.checkpoint.tensor(bias_name))

    def router(self, layer: int, normed_TD: Array) -> tuple[npt.NDArray[np.int64], Array]:
        name = f"layers.{layer}.router"
        score_TE = self.linear(normed_TD, f"{name}.weight", f"{name}.bias")
        expert_id_TA = np.argsort(-score_TE, axis=-1, kind="stable")[:, : self.config.num_active_experts]
        weight_TA = np.exp(np.take_along_axis(score_TE, expert_id_TA, axis=-1))
        return expert_id_TA, weight_TA / weight_TA.sum(axis=-1, keepdims=True)

    def expert_weight(self, name: str, expert: int) -> Array:
        return super().expert_weight(name, expert) + self._delta(name, expert)

    def _delta(self, name: str, expert: int | None = None) -> Any:
        if not name.startswith("layers."):
            return 0.0
        _, layer, target = name.split(".", 2)
        pair = self.merged.layers[int(layer)].get(target)
        return 0.0 if pair is None else pair.delta(expert).astype(np.float64)


def test_reference_with_adapter_is_the_merged_model(adapters: dict[str, LoraAdapter]) -> None:
    tokens, checkpoint = prompt("narrow", 129), tiny_checkpoint("narrow")
    for adapter in adapters.values():
        with_adapter = ReferenceModel(checkpoint, np.float64, adapter).logits(tokens)
        np.testing.assert_allclose(
            with_adapter, MergedReference(checkpoint, adapter).logits(tokens), rtol=0, atol=1e-9
        )
        assert typical_error(ReferenceModel(checkpoint).logits(tokens), with_adapter) > 0.3


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("name", CONFIGS)
def test_served_natively_an_adapter_is_the_merged_model(name: str, weights: Weights, tmp_path: Path) -> None:
    adapter = load(make_lora(tmp_path, CONFIGS[name], seed=3, dtype="BF16"), name)
    tokens = prompt(name, 129)
    logits = native({"": adapter}, weights, name).run(tokens, 50, "0")
    expected = MergedReference(tiny_checkpoint(name), adapter).logits(tokens)
    assert typical_error(logits, expected) < LARGEST_ERROR[weights]


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("target", [*MODULES, *PARAMETERS])
def test_every_target_by_itself_is_served(target: str, weights: Weights, tmp_path: Path) -> None:
    modules = [name for name in MODULES if name == target]
    parameters = [name for name in PARAMETERS if name == target]
    folder = write_lora(
        tmp_path,
        list(lora_tensors(CONFIGS["narrow"], modules=modules, parameters=parameters, strength=0.5)),
        target_modules=modules,
        target_parameters=parameters,
    )
    adapter, tokens = load(folder, "narrow"), prompt("narrow", 60)
    logits = native({"": adapter}, weights).run(tokens, 60, "0")
    # With the base model's roundings put in; an adapter's own products are float32 in both.
    rounded = ROUNDED[weights](tiny_checkpoint("narrow"), adapter=adapter).logits(tokens)
    assert typical_error(logits, rounded) < UNEXPLAINED[weights]
    plain = ROUNDED[weights](tiny_checkpoint("narrow")).logits(tokens)
    assert typical_error(plain, rounded) > 5 * UNEXPLAINED[weights]


def test_bf16_experts_take_adapters_too(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(tiny_folder(tmp_path, "narrow", "huggingface", "bf16"))
    adapter = load(make_lora(tmp_path / "a", CONFIGS["narrow"]), "narrow")
    tokens = prompt("narrow", 70)
    rounded = Bf16Reference(checkpoint, adapter=adapter).logits(tokens)
    driver = Driver(NativeRunner(checkpoint, "bf16", adapters=[adapter]))
    assert typical_error(driver.run(tokens, 70, "0"), rounded) < UNEXPLAINED["bf16"]
    driver.runner.close()


@pytest.mark.parametrize("isa", supported_isa())
@pytest.mark.parametrize("weights", WEIGHTS)
def test_adapters_and_base_in_one_batch_do_not_mix(
    isa: str, weights: Weights, adapters: dict[str, LoraAdapter]
) -> None:
    # Sequence "0..." asks for adapter 0, "1..." for 1, others for none; chunks of all share every step.
    configure(isa, 2)
    lengths = {"0": 70, "-": 41, "1": 33, "0+": 9, "-+": 80}
    prompts = {name: prompt("narrow", length) for name, length in lengths.items()}
    alone = {name: native(adapters, weights).run(tokens, 512, name) for name, tokens in prompts.items()}
    base = {name: native({}, weights).run(tokens, 512) for name, tokens in prompts.items()}
    driver = native(adapters, weights, seed=2)
    first = driver.feed({"0": prompts["0"][:33], "-": prompts["-"][:40], "1": prompts["1"]})
    second = driver.feed(
        {"0+": prompts["0+"], "-": prompts["-"][40:], "-+": prompts["-+"], "0": prompts["0"][33:]}
    )
    for name, expected in alone.items():
        together = np.concatenate([step[name] for step in (first, second) if name in step])
        # To the bit: nothing of another row enters a row's sums.
        np.testing.assert_array_equal(together, expected)
        if name.startswith("-"):
            np.testing.assert_array_equal(together, base[name])
        else:
            assert typical_error(base[name], expected) > 0.3


def test_only_some_rows_with_logits_keep_their_adapters(adapters: dict[str, LoraAdapter]) -> None:
    # Past the last attention the step goes on with these rows alone.
    prompts = {"-": prompt("narrow", 20), "1": prompt("narrow", 30), "0": prompt("narrow", 7)}
    whole = native(adapters, "int8").feed(prompts)
    rows = [19, 49, 51, 56]
    result = native(adapters, "int8").step(prompts, rows=rows, wants_logits=True)
    np.testing.assert_array_equal(result.logits_RV, np.concatenate(list(whole.values()))[rows])
    base_only = native(adapters, "int8").step(prompts, rows=[3], wants_logits=True)
    np.testing.assert_array_equal(base_only.logits_RV, whole["-"][3:4])


@pytest.mark.parametrize("weights", WEIGHTS)
def test_every_instruction_set_gives_the_same_logits(
    weights: Weights, adapters: dict[str, LoraAdapter]
) -> None:
    tokens, logits = prompt("narrow", 129), {}
    for isa in supported_isa():
        configure(isa, 1)
        logits[isa] = native(adapters, weights).run(tokens, 129, "1")
    for isa in supported_isa():
        assert typical_error(logits[isa], logits["scalar"]) < SAME[weights]


def test_two_threads_give_the_bits_of_one(adapters: dict[str, LoraAdapter]) -> None:
    logits = []
    for threads in (1, 2):
        configure(current_isa(), threads)
        logits.append(native(adapters, "int8").run(prompt("narrow", 129), 100, "0"))
    np.testing.assert_array_equal(*logits)


def test_a_batch_without_adapters_does_nothing_more(
    adapters: dict[str, LoraAdapter], monkeypatch: pytest.MonkeyPatch
) -> None:
    driver = native(adapters, "int8")

    def never(*_: object) -> None:
        raise AssertionError("a low-rank product without adapter")

    monkeypatch.setattr("harmonium.model.lora.low_rank", never)
    logits = driver.run(prompt("narrow", 20), 20, "-")
    np.testing.assert_array_equal(logits, native({}, "int8").run(prompt("narrow", 20), 20))


def test_closed_runner_gives_the_adapters_back(adapters: dict[str, LoraAdapter]) -> None:
    runner = NativeRunner(tiny_checkpoint("narrow"), adapters=tuple(adapters.values()))
    extra = 4 * 512 * CONFIGS["narrow"].num_experts
    assert runner.adapter_bytes == sum(adapter.nbytes for adapter in adapters.values()) + extra
    runner.close()
    assert runner.adapter_bytes == 0


@pytest.mark.oracle
@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("rslora", [False, True])
def test_an_adapter_of_peft_gives_the_logits_of_peft(rslora: bool, tmp_path: Path) -> None:
    pytest.importorskip("torch", reason="the extra [oracle] is not installed: no torch")
    peft = pytest.importorskip("peft", reason="the extra [oracle] is not installed: no peft")
    import torch

    from tests.model.transformers_oracle import transformers_logits, transformers_model

    checkpoint, tokens = tiny_checkpoint("narrow"), prompt("narrow", 129)
    torch.manual_seed(0)
    config = peft.LoraConfig(
        r=4,
        lora_alpha=10,
        use_rslora=rslora,
        target_modules=["q_proj", "v_proj", "o_proj"],
        target_parameters=list(PARAMETERS),
        alpha_pattern={} if rslora else {"mlp.experts.down_proj": 3},
        rank_pattern={} if rslora else {"q_proj": 2},
        init_lora_weights=False,
        task_type="CAUSAL_LM",
    )
    model = peft.get_peft_model(transformers_model(checkpoint), config)
    model.save_pretrained(tmp_path)
    expected = transformers_logits(model.eval(), tokens)
    adapter = load(tmp_path, "narrow")
    reference = ReferenceModel(checkpoint, adapter=adapter).logits(tokens)
    assert np.abs(reference - expected).max() < 2e-4
    assert typical_error(ReferenceModel(checkpoint).logits(tokens), expected) > 0.1
    served = native({"": adapter}, "bf16").run(tokens, 129, "0")
    rounded = Bf16Reference(checkpoint, adapter=adapter).logits(tokens)
    assert typical_error(served, rounded) < UNEXPLAINED["bf16"]
    assert typical_error(served, expected) < 1.2 * typical_error(rounded, expected)
