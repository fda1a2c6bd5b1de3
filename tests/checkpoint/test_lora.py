import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from harmonium.checkpoint.bfloat16 import decode_bfloat16, encode_bfloat16
from harmonium.checkpoint.lora import LoraAdapter, open_lora
from harmonium.errors import CheckpointError, ConfigError
from harmonium.testing import tiny_config
from tests.lora_files import PARAMETERS, lora_tensors, make_lora, write_lora

MODEL = tiny_config(vocabulary_size=331, num_layers=3)
D, F, E = MODEL.hidden_size, MODEL.expert_size, MODEL.num_experts
PREFIX = "base_model.model.model.layers."

Tensors = dict[str, npt.NDArray[np.float32]]


def tensors(**options: Any) -> Tensors:
    return dict(lora_tensors(MODEL, **options))


def load(folder: Path) -> LoraAdapter:
    with open_lora(folder, MODEL) as files:
        adapter = files.load()
        assert files.nbytes == adapter.nbytes
        return adapter


def refusal(folder: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        load(folder)
    return str(caught.value)


def test_every_target_is_read_in_pefts_layout(tmp_path: Path) -> None:
    given = tensors()
    adapter = load(write_lora(tmp_path, list(given.items())))
    for index, layer in enumerate(adapter.layers):
        assert sorted(layer) == [
            "attention.k", "attention.out", "attention.q", "attention.v",
            "experts.down", "experts.gate_up", "router",
        ]  # fmt: skip
        for target, module in (("attention.q", "self_attn.q_proj"), ("router", "mlp.router")):
            a, b = (given[f"{PREFIX}{index}.{module}.lora_{part}.weight"] for part in "AB")
            np.testing.assert_allclose(layer[target].delta(), 2.0 * (b @ a), rtol=1e-5, atol=1e-6)
        for target, module, inputs in (
            ("experts.gate_up", "mlp.experts.base_layer", D),
            ("experts.down", "mlp.experts", F),
        ):
            a, b = (given[f"{PREFIX}{index}.{module}.lora_{part}.weight"] for part in "AB")
            # As ParamWrapper.get_delta_weight has it: A by expert, then rank; B by rank, then expert.
            delta = np.einsum("ore,eri->eoi", b.reshape(len(b), 3, E), a.reshape(E, 3, inputs))
            for expert in range(E):
                np.testing.assert_allclose(
                    layer[target].delta(expert), 2.0 * delta[expert], rtol=1e-5, atol=1e-6
                )


@pytest.mark.parametrize("parameter", ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"])
def test_one_fused_tensor_alone_has_the_outer_key(parameter: str, tmp_path: Path) -> None:
    given = tensors(parameters=[parameter], modules=[])
    adapter = load(
        write_lora(tmp_path, list(given.items()), target_modules=[], target_parameters=[parameter])
    )
    target = "experts.gate_up" if "gate_up" in parameter else "experts.down"
    assert [list(layer) for layer in adapter.layers] == [[target]] * MODEL.num_layers


def test_parameters_of_single_layers_are_read(tmp_path: Path) -> None:
    # As OpenAI's fine-tuning recipe for gpt-oss targets them.
    given = {
        key: values
        for key, values in tensors(parameters=PARAMETERS[:2]).items()
        if "experts" not in key or key.startswith(f"{PREFIX}1.")
    }
    names = [f"1.{name}" for name in PARAMETERS[:2]]
    adapter = load(
        write_lora(tmp_path, list(given.items()), target_modules="all-linear", target_parameters=names)
    )
    assert ["experts.gate_up" in layer for layer in adapter.layers] == [False, True, False]
    assert all("attention.out" in layer for layer in adapter.layers)


@pytest.mark.parametrize(("dtype", "nbytes"), [("BF16", 2), ("F16", 4), ("F32", 4)])
def test_every_dtype_is_read(dtype: str, nbytes: int, tmp_path: Path) -> None:
    given = tensors()
    adapter = load(write_lora(tmp_path, list(given.items()), dtype=dtype))
    assert adapter.nbytes == nbytes * sum(values.size for values in given.values())
    a = given[f"{PREFIX}0.self_attn.v_proj.lora_A.weight"]
    expected = decode_bfloat16(encode_bfloat16(a)) if dtype == "BF16" else a.astype(np.float16)
    found = adapter.layers[0]["attention.v"].a
    found = decode_bfloat16(found) if dtype == "BF16" else found
    np.testing.assert_array_equal(found, a if dtype == "F32" else expected.astype(np.float32))


def test_patterns_give_ranks_and_strengths(tmp_path: Path) -> None:
    given = tensors()
    for layer in range(MODEL.num_layers):
        key = f"{PREFIX}{layer}.self_attn.v_proj.lora_"
        given[f"{key}A.weight"], given[f"{key}B.weight"] = (
            np.ones((5, D), np.float32),
            np.ones((64, 5), np.float32),
        )
    config = {
        "rank_pattern": {"v_proj": 5},
        "alpha_pattern": {r"layers\.1\.self_attn\.v_proj": 20, "mlp.experts.down_proj": 9},
    }
    adapter = load(write_lora(tmp_path, list(given.items()), **config))
    assert adapter.layers[0]["attention.v"].rank == 5
    assert adapter.layers[0]["attention.v"].scale == 6 / 5
    assert adapter.layers[1]["attention.v"].scale == 4.0
    assert adapter.layers[0]["experts.down"].scale == 3.0
    assert adapter.layers[0]["experts.gate_up"].scale == 2.0


def test_rank_stabilized_strength_is_over_the_root_of_the_rank(tmp_path: Path) -> None:
    adapter = load(write_lora(tmp_path, list(tensors().items()), use_rslora=True))
    assert adapter.layers[0]["attention.q"].scale == 6 / 3**0.5


def test_digest_tells_adapters_apart(tmp_path: Path) -> None:
    digests = {
        load(make_lora(tmp_path / "a", MODEL, seed=1)).digest,
        load(make_lora(tmp_path / "b", MODEL, seed=2)).digest,
        load(write_lora(tmp_path / "c", list(tensors(seed=1).items()), lora_alpha=7)).digest,
    }
    assert len(digests) == 3
    assert load(make_lora(tmp_path / "d", MODEL, seed=1)).digest in digests


def test_adapter_stays_when_its_files_go(tmp_path: Path) -> None:
    adapter = load(make_lora(tmp_path, MODEL))
    before = [pair.delta(0) for pair in (adapter.layers[0]["experts.down"],)]
    (tmp_path / "adapter_model.safetensors").write_bytes(b"")
    np.testing.assert_array_equal(adapter.layers[0]["experts.down"].delta(0), before[0])


def test_modules_by_a_pattern_are_those_in_the_file(tmp_path: Path) -> None:
    given = tensors(modules=["q_proj"])
    adapter = load(write_lora(tmp_path, list(given.items()), target_modules=r"(.*)*self_attn\.q_proj"))
    assert all("attention.q" in layer and "attention.k" not in layer for layer in adapter.layers)


def test_layers_to_transform_limits_linear_layers(tmp_path: Path) -> None:
    given = {key: values for key, values in tensors(parameters=[]).items() if key.startswith(f"{PREFIX}2.")}
    adapter = load(write_lora(tmp_path, list(given.items()), layers_to_transform=[2], target_parameters=None))
    assert [len(layer) for layer in adapter.layers] == [0, 0, 4]


# ---- what is wrong with a file


def _replace(key: str, values: Any) -> Callable[[Tensors], None]:
    def change(given: Tensors) -> None:
        given[PREFIX + key] = np.asarray(values, np.float32)

    return change


def _remove(key: str) -> Callable[[Tensors], None]:
    def change(given: Tensors) -> None:
        del given[PREFIX + key]

    return change


Q_A, Q_B = "0.self_attn.q_proj.lora_A.weight", "0.self_attn.q_proj.lora_B.weight"
GATE_UP_A = "2.mlp.experts.base_layer.lora_A.weight"
NAN = np.zeros((3, D))
NAN[2, 5] = np.nan
INFINITE = np.zeros((192, 3))
INFINITE[7, 1] = -np.inf


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            _replace(Q_A, np.zeros((3, 95))),
            "has shape [3, 95]; this model and adapter_config.json (rank 3)",
        ),
        (_replace(Q_A, np.zeros((4, D))), "has shape [4, 96]"),
        (_replace(Q_B, np.zeros((191, 3))), "has shape [191, 3]"),
        (_replace(Q_B, np.zeros(192)), "has shape [192]"),
        (_replace(GATE_UP_A, np.zeros((12, D))), "(5 experts of rank 3) make it [15, 96]"),
        (_replace(GATE_UP_A, np.zeros((15, 2 * F))), "has shape [15, 128]"),
        (_replace(Q_A, NAN), "q_proj.lora_A.weight' holds nan at [2, 5]; expected finite numbers"),
        (_replace(Q_B, INFINITE), "q_proj.lora_B.weight' holds -inf at [7, 1]"),
        (_remove(Q_A), "layer 0 lacks lora_A of self_attn.q_proj"),
        (_remove(GATE_UP_A), "layer 2 lacks lora_A of mlp.experts.base_layer"),
        (_replace("3.self_attn.q_proj.lora_A.weight", NAN), "is for layer 3; the model has 3"),
        (_replace("0.self_attn.q_proj.lora_magnitude_vector", [1]), "DoRA is not supported"),
        (_replace("0.self_attn.q_proj.lora_B.bias", [1]), "biases are not supported"),
        (_replace("0.mlp.gate.lora_A.weight", [1]), "mlp.gate.lora_A.weight': it is not known"),
        (_replace("0.self_attn.q_proj.lora_C.weight", [1]), "it is not known"),
    ],
)
def test_wrong_tensors_are_named(change: Callable[[Tensors], None], message: str, tmp_path: Path) -> None:
    given = tensors()
    change(given)
    text = refusal(write_lora(tmp_path, list(given.items())))
    assert message in text and "adapter_model.safetensors" in text


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ("base_model.model.lm_head.lora_A.weight", "a changed unembedding is not supported"),
        ("base_model.model.model.embed_tokens.lora_embedding_A", "adapters of embeddings are not supported"),
        ("base_model.model.model.embed_tokens.weight", "changed embeddings are not supported"),
        ("model.layers.0.self_attn.q_proj.lora_A.weight", "it is not known"),
        ("base_model.model.layers.0.self_attn.q_proj.lora_A.weight", "are one"),
        ("base_model.model.model.layers.9999999999.mlp.router.lora_A.weight", "it is not known"),
    ],
)
def test_tensors_of_other_parts_are_refused(key: str, message: str, tmp_path: Path) -> None:
    given = {**tensors(), key: np.zeros((3, D), np.float32)}
    assert message in refusal(write_lora(tmp_path, list(given.items())))


def test_an_adapter_of_a_smaller_model_is_refused(tmp_path: Path) -> None:
    other = tiny_config(vocabulary_size=331, num_layers=2)
    assert "layer 2 lacks lora_A of self_attn.q_proj" in refusal(make_lora(tmp_path, other))


def test_a_tensor_that_the_config_does_not_target_is_refused(tmp_path: Path) -> None:
    folder = write_lora(tmp_path, list(tensors().items()), target_modules=["q_proj", "k_proj", "v_proj"])
    assert "changes self_attn.o_proj of layer 0, which target_modules" in refusal(folder)


def test_an_adapter_without_tensors_is_refused(tmp_path: Path) -> None:
    folder = write_lora(tmp_path, [], target_modules=None, target_parameters=None)
    assert "the adapter changes nothing" in refusal(folder)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"peft_type": "IA3"}, "peft_type is 'IA3'; expected 'LORA'"),
        ({"r": 0}, "r is 0; expected a whole number from 1 to 512"),
        ({"r": True}, "r is True"),
        ({"r": 100_000}, "r is 100000"),
        ({"r": 4}, "has shape [3, 96]"),
        ({"lora_alpha": 0}, "lora_alpha is 0; expected a number other than 0"),
        ({"lora_alpha": "6"}, "lora_alpha is '6'"),
        ({"lora_alpha": 10**400}, "lora_alpha is 1000"),
        ({"use_rslora": 1}, "use_rslora is 1; expected true or false"),
        ({"use_dora": True}, "'use_dora' is True, which is not supported"),
        ({"lora_bias": True}, "'lora_bias' is True"),
        ({"fan_in_fan_out": True}, "'fan_in_fan_out' is True"),
        ({"modules_to_save": ["lm_head"]}, "'modules_to_save' is ['lm_head'], which is not supported"),
        ({"trainable_token_indices": [5]}, "'trainable_token_indices' is [5]"),
        ({"something_new": {"a": 1}}, "'something_new' is {'a': 1}, which is not supported"),
        ({"bias": "all"}, "bias is 'all'; expected 'none'"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights is 'pissa'"),
        ({"target_modules": [1]}, "target_modules is [1]; expected a list of names"),
        ({"target_parameters": "experts"}, "target_parameters is 'experts'"),
        ({"target_parameters": [*PARAMETERS, "mlp.experts.down_proj_bias"]}, "names no tensor that"),
        ({"layers_to_transform": [-1]}, "layers_to_transform is [-1]"),
        ({"rank_pattern": ["q_proj"]}, "rank_pattern is ['q_proj']"),
        ({"rank_pattern": {"q_proj": 0}}, "rank_pattern 'q_proj' is 0"),
        ({"alpha_pattern": {"q_proj": None}}, "alpha_pattern 'q_proj' is None"),
        ({"rank_pattern": {"(": 2}}, "rank_pattern '(' is no pattern"),
        ({"rank_pattern": {"(a+)+b": 2}}, "rank_pattern is '(a+)+b'; expected patterns of at most"),
        ({"rank_pattern": {".*.*.*x": 2}}, "rank_pattern is '.*.*.*x'"),
        ({"rank_pattern": {"a" * 300: 2}}, "rank_pattern is 'aaa"),
        ({"rank_pattern": {f"x{i}": 2 for i in range(1001)}}, "expected an object of at most 1,000 patterns"),
        ({"rank_pattern": {f"x{i}.*": 2 for i in range(17)}}, "has 17 patterns with repetitions or groups"),
    ],
)
def test_wrong_settings_are_named(config: dict[str, Any], message: str, tmp_path: Path) -> None:
    assert message in refusal(write_lora(tmp_path, list(tensors().items()), **config))


@pytest.mark.parametrize("text", ['{"r": NaN}', "[]", "{", '{"r": 1, "r": 2}', "\ufeff{}"])
def test_a_config_that_is_no_json_object_is_refused(text: str, tmp_path: Path) -> None:
    make_lora(tmp_path, MODEL)
    (tmp_path / "adapter_config.json").write_text(text)
    assert "adapter_config.json" in refusal(tmp_path)


def test_a_truncated_file_is_refused(tmp_path: Path) -> None:
    path = make_lora(tmp_path, MODEL) / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-4])
    assert "truncated" in refusal(tmp_path)


def test_integers_are_refused(tmp_path: Path) -> None:
    path = make_lora(tmp_path, MODEL) / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes().replace(b'"F32"', b'"I32"', 1))
    assert "has dtype I32; expected F32, F16 or BF16" in refusal(tmp_path)


def test_a_folder_that_is_not_there_is_the_users_mistake(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"does not exist; expected a folder with adapter_config\.json"):
        open_lora(tmp_path / "no", MODEL)
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="is a file"):
        open_lora(tmp_path / "file", MODEL)


def test_a_folder_above_the_adapter_is_told_of_it(tmp_path: Path) -> None:
    make_lora(tmp_path / "checkpoint-20", MODEL)
    assert f"did you mean {tmp_path / 'checkpoint-20'}?" in refusal(tmp_path)


def test_a_pickle_is_never_loaded(tmp_path: Path) -> None:
    (make_lora(tmp_path, MODEL) / "adapter_model.safetensors").rename(tmp_path / "adapter_model.bin")
    assert "a pickle, which is never loaded" in refusal(tmp_path)


def test_settings_of_training_are_without_effect(tmp_path: Path) -> None:
    saved = json.loads((make_lora(tmp_path / "plain", MODEL) / "adapter_config.json").read_text())
    more = {
        "lora_dropout": 0.1,
        "megatron_core": "megatron.core",
        "eva_config": {"rho": 2},
        "loftq_config": {},
    }
    folder = write_lora(tmp_path / "more", list(tensors().items()), **{**saved, **more})
    assert load(folder).digest == load(tmp_path / "plain").digest


JUNK = (
    None,
    True,
    -1,
    0,
    3,
    2**70,
    1.5,
    "",
    "q_proj",
    [],
    ["x"],
    [[]],
    {},
    {"q_proj": 2},
    {"q_proj": []},
    [None],
)


def test_settings_of_any_kind_are_taken_or_refused(tmp_path: Path) -> None:
    saved = json.loads((make_lora(tmp_path, MODEL) / "adapter_config.json").read_text())
    keys = [
        *saved,
        "rank_pattern",
        "alpha_pattern",
        "layers_to_transform",
        "exclude_modules",
        "use_rslora",
        "new",
    ]
    num_loaded = 0
    for key in keys:
        for value in JUNK:
            (tmp_path / "adapter_config.json").write_text(json.dumps({**saved, key: value}))
            try:
                load(tmp_path)
                num_loaded += 1
            except CheckpointError as error:
                assert str(tmp_path) in str(error)
    assert 0 < num_loaded < len(keys) * len(JUNK)


def test_files_with_bytes_changed_at_random_load_or_are_refused(tmp_path: Path) -> None:
    path = make_lora(tmp_path, MODEL, dtype="BF16") / "adapter_model.safetensors"
    data, rng = path.read_bytes(), np.random.default_rng(0)
    header = 8 + int.from_bytes(data[:8], "little")
    refused = 0
    for case in range(300):
        changed = bytearray(data)
        for place in rng.integers(0, header if case % 3 else len(data), rng.integers(1, 4)):
            changed[place] = rng.integers(0, 256)
        path.write_bytes(changed)
        try:
            load(tmp_path)
        except CheckpointError as error:
            assert str(path) in str(error)
            refused += 1
    assert refused > 150
