"""The sweep over other libraries' models: what it makes small, what it gives them, what it says of them.

No model of another library is needed here: configurations and models are toys of the same form.
"""

from __future__ import annotations

import dataclasses
import json
import math
import sys
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))  # where `benchmarks` is that of this repository; torchrl installs one, too

from benchmarks.supported.inputs import Reads, candidates  # noqa: E402
from benchmarks.supported.measuring import Double, Subject, difference, in_precision, measured  # noqa: E402
from benchmarks.supported.page import PAGE, RESULTS, page  # noqa: E402
from benchmarks.supported.repairing import repaired  # noqa: E402
from benchmarks.supported.shrinking import WAYS, parts, shrunk  # noqa: E402
from benchmarks.supported.status import status  # noqa: E402
from benchmarks.supported.workers import rows  # noqa: E402

EQUAL = next(way for way in WAYS if way.name == "equal")
SIXTEENTH = next(way for way in WAYS if way.name == "sixteenth")


@dataclasses.dataclass
class Vision:
    model_type = "toy_vision"
    hidden_size: int = 1024
    num_attention_heads: int = 16
    num_hidden_layers: int = 24
    image_size: int = 336
    patch_size: int = 14
    hidden_sizes: tuple[int, ...] = (256, 512)
    depths: tuple[int, ...] = (3, 4)

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


@dataclasses.dataclass
class Config:
    model_type = "toy"
    hidden_size: int = 4096
    intermediate_size: int = 11008
    num_attention_heads: int = 32
    num_key_value_heads: int = 8
    head_dim: int = 128
    num_hidden_layers: int = 32
    layer_types: list[str] | None = None
    vocab_size: int = 128256
    image_token_id: int = 128000
    max_position_embeddings: int = 131072
    num_experts: int = 64
    num_experts_per_tok: int = 8
    conv_kernel_size: int = 31
    rms_norm_eps: float = 1e-6
    tie: bool = True
    vision_config: Vision | None = None

    def __post_init__(self) -> None:
        self.layer_types = self.layer_types or (["local"] * 5 + ["global"]) * 6
        self.vision_config = self.vision_config or Vision(hidden_size=1152)

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


def test_a_configuration_is_made_small_by_the_names_of_what_it_holds() -> None:
    config = shrunk(Config, EQUAL)
    assert (config.hidden_size, config.num_attention_heads, config.head_dim) == (64, 4, 16)
    assert (
        config.num_key_value_heads == 2 and config.hidden_size == config.num_attention_heads * config.head_dim
    )
    assert config.num_hidden_layers == 2 and config.layer_types == ["local", "global"]
    assert config.image_token_id < config.vocab_size == 128
    assert (config.num_experts, config.num_experts_per_tok) == (4, 2)
    assert (config.conv_kernel_size, config.rms_norm_eps, config.tie) == (31, 1e-6, True)


def test_what_a_configuration_consists_of_is_made_small_too() -> None:
    config = shrunk(Config, EQUAL)
    assert parts(config) == [config, config.vision_config]
    vision = config.vision_config
    assert vision.hidden_size == config.hidden_size, "what is joined has one width"
    assert vision.image_size % vision.patch_size == 0 and vision.image_size == 32
    assert vision.depths == (1, 1) and vision.hidden_sizes == (16, 32)


def test_widths_may_be_divided_so_that_ratios_stay() -> None:
    config = shrunk(Config, SIXTEENTH)
    assert (config.hidden_size, config.head_dim, config.num_attention_heads) == (256, 8, 32)
    assert config.vision_config.hidden_size == 1152 // 16, "a part keeps what it is given by the whole"


class Toy(nn.Module):
    """Reads embedded tokens, and asks for boxes."""

    main_input_name = "input_ids"

    def __init__(self) -> None:
        super().__init__()
        self.config = shrunk(Config, EQUAL)
        self.tokens = nn.Embedding(self.config.vocab_size, 64)
        self.head = nn.Linear(64, 3)

    def get_input_embeddings(self) -> nn.Module:
        return self.tokens

    def forward(self, input_ids=None, inputs_embeds=None, bbox=None, labels=None):
        if bbox is None:
            raise ValueError("You have to specify bbox")
        return {"loss": None, "kept": bbox, "last_hidden_state": self.head(inputs_embeds)}


def test_inputs_follow_from_the_signature_and_from_what_the_model_says() -> None:
    model, said, tried = Toy(), [], []
    for reads in candidates(model, said):
        tried.append(sorted(reads.values))
        try:
            model(**reads.values)
        except ValueError as error:
            said.append(str(error))
        else:
            break
    assert tried[0] == ["inputs_embeds"] and tried[-1] == ["bbox", "inputs_embeds"]
    assert reads.values["inputs_embeds"].shape == (2, 8, 64) and not reads.sources


def test_where_only_token_ids_are_read_the_embedded_tokens_get_relevance() -> None:
    class Reader(Toy):
        def forward(self, input_ids):
            return self.head(self.tokens(input_ids))

    reads = next(candidates(Reader(), []))
    assert sorted(reads.values) == ["input_ids"] and reads.sources == ("tokens",)
    assert int(reads.values["input_ids"].max()) < 128


@pytest.mark.parametrize(
    "message, shape",
    [
        ("mat1 and mat2 shapes cannot be multiplied (16x10 and 12x64)", (2, 8, 12)),
        (
            "Given normalized_shape=[6], expected input with shape [*, 6], but got input of size[2, 8, 10]",
            (2, 8, 6),
        ),
        ("expected input[2, 8, 10] to have 3 channels, but got 8 channels instead", (2, 3, 10)),
        (
            "The size of tensor a (10) must match the size of tensor b (7) at non-singleton dimension 2",
            (2, 8, 7),
        ),
        ("Sizes of tensors must match. Expected size 9 but got size 8 for tensor number 1", (2, 9, 10)),
    ],
)
def test_inputs_are_repaired_as_the_message_asks_for(message: str, shape: tuple[int, ...]) -> None:
    found = list(repaired(Toy(), Reads({"inputs_embeds": torch.randn(2, 8, 10)}), message))
    assert shape in [tuple(reads.values["inputs_embeds"].shape) for reads in found]


def test_a_text_gets_as_many_tokens_of_an_image_as_there_are_features() -> None:
    model = Toy()
    reads = Reads({"input_ids": torch.randint(5, 50, (2, 8)), "attention_mask": torch.ones(2, 8)})
    message = "Image features and image tokens do not match, tokens: 0, features: 12"
    (found,) = repaired(model, reads, message)
    assert (found.values["input_ids"] == model.config.image_token_id).sum() == 12
    assert found.values["input_ids"].shape == found.values["attention_mask"].shape == (2, 14)
    assert not list(repaired(model, reads, "something else"))


def test_arguments_of_one_kind_are_first_given_the_like_of_each() -> None:
    class Pair(nn.Module):
        config = shrunk(Config, EQUAL)

        def forward(self, pixel_values: Tensor, prompt_pixel_values: Tensor) -> None: ...

    tried = [reads.values for reads in islice(candidates(Pair(), []), 3)]
    assert all(v["pixel_values"].shape == v["prompt_pixel_values"].shape for v in tried)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.GELU(), nn.Linear(8, 3))

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"state": self.layers(x.to(torch.float32)) if self.layers[0].weight.is_cpu else x}


def subject() -> Subject:
    with in_precision(torch.float64):
        model = Net().eval()
        values = {"x": torch.randn(2, 5, 4)}
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.float())

    def single() -> nn.Module:
        made = Net().eval()
        made.load_state_dict(model.state_dict())
        return made

    return Subject(model, single, values, 0, 2)


def test_a_model_is_measured_in_double_precision_whatever_it_asks_for() -> None:
    row = measured(subject())
    assert row["gap"] < 1e-9 and row["flows"] < 1e-6
    assert 1e-9 < row["float32"] < 1e-5, "single precision is single"
    assert 1e-9 < row["conditioning"] < 1e-5, "weights and inputs are moved by what it rounds"
    assert torch.get_default_dtype() == torch.float32


class Cut(nn.Module):
    """Its largest value is where it cuts, and depends on nothing."""

    def forward(self, x: Tensor) -> Tensor:
        return (x * torch.tensor([1.0, 9.0, 2.0])).clamp(-4.0, 4.0)


def test_the_largest_value_that_depends_on_what_is_read_is_explained() -> None:
    values = {"x": torch.tensor([[1.0, 1.0, 1.0], [3.0, 3.0, 0.5]], dtype=torch.float64)}
    row = measured(Subject(Cut(), Cut, values, 0, 2))
    assert status(row) == "ok" and row["flows"] == 0.0


class Growing(nn.Module):
    """A difference that is small beside what it is of, twelve times over: each multiplies relevance by 4,000."""

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(12):
            x = torch.sigmoid(x - 0.4999)
        return x


def test_relevance_that_single_precision_does_not_hold_is_no_error_of_double_precision() -> None:
    values = {"x": torch.tensor([[0.5, 0.5]], dtype=torch.float64)}
    row = measured(Subject(Growing(), Growing, values, 0, 1))
    assert row["gap"] < 1e-9 and row["flows"] < 1e-9
    assert status(row) == "float32" and row["float32"] == math.inf
    assert row["raised"].startswith("ValueError: the relevance of 'x' is NaN or infinite"), row


def test_double_means_double() -> None:
    with Double():
        assert torch.ones(1, dtype=torch.float64).float().dtype == torch.float64
        assert torch.zeros(1, dtype=torch.float32).dtype == torch.float64
    assert torch.ones(1).float().dtype == torch.float32


def test_the_difference_is_that_of_the_worst_element_and_never_hides_what_is_not_a_number() -> None:
    expected = torch.tensor([[3.0, 4.0], [0.3, 0.4]])
    assert difference(expected + torch.tensor([[0.0, 0.0], [0.0, 0.05]]), expected) == pytest.approx(0.1)
    assert difference(torch.full_like(expected, math.nan), expected) == math.inf
    assert difference(expected, torch.zeros_like(expected)) == math.inf, "no relevance at all is no agreement"


@pytest.mark.parametrize(
    "row, expected",
    [
        ({"gap": 1e-9, "flows": 1e-9, "float32": 1e-6}, "ok"),
        ({"gap": 1e-3, "flows": 1e-1, "float32": 1e-1}, "gap"),
        ({"gap": math.nan, "flows": 0.0, "float32": 0.0}, "gap"),
        ({"gap": 1e-9, "flows": 1e-5, "float32": 1e-6}, "flows"),
        ({"gap": 1e-9, "flows": 1e-9, "float32": math.inf}, "float32"),
        ({"gap": 1e-9, "flows": 1e-9, "float32": 2e-3, "conditioning": 1e-4}, "float32"),
        ({"gap": 1e-9, "flows": 1e-9, "float32": 9e-4, "conditioning": 1e-4}, "ok"),
        ({"error": "RuntimeError: no"}, "error"),
        ({"reason": "needs a package"}, "not built"),
    ],
)
def test_a_row_amounts_to_the_first_thing_that_is_wrong(row: dict[str, Any], expected: str) -> None:
    assert status(row) == expected


WORKER = """
import json, os, sys, time
print("ready", flush=True)
for line in sys.stdin:
    library, name = line.split()
    if name == "dies":
        os._exit(3)
    if name == "hangs":
        time.sleep(60)
    print(json.dumps({"library": library, "name": name, "reason": "told"}), flush=True)
"""


def test_a_process_that_ends_or_hangs_names_its_model_and_is_replaced() -> None:
    wanted = [("a", name) for name in ("well", "dies", "well", "hangs", "well")]
    found = list(rows(wanted, 2.0, (sys.executable, "-c", WORKER)))
    assert [row["name"] for row in found] == [name for _, name in wanted]
    assert [row["reason"] for row in found[::2]] == ["told"] * 3
    assert found[1]["error"] == "ProcessError: the process ended with 3"
    assert found[3]["error"].startswith("TimeoutError: more than 2 s")


def test_the_page_is_made_of_the_committed_results() -> None:
    results = json.loads(RESULTS.read_text())
    assert PAGE.read_text() == page(results["models"], results["machine"]), "run `nox -s supported`"


def test_the_page_names_every_failure_in_words_that_markdown_leaves_alone() -> None:
    models = [
        {
            "library": "toys",
            "name": "a_b",
            "model": "A",
            "relevant": ["x"],
            "gap": 1e-15,
            "flows": 2e-9,
            "float32": 3e-6,
            "conditioning": 2e-7,
        },
        {"library": "toys", "name": "c", "error": "TypeError: 'x' | <y> is_not [1]\nand more"},
    ]
    text = page(models, {"tdhook": "1", "torch": "2", "python": "3"})
    assert "| `a_b` | A | `x` | ok | 1e-15 | 2e-9 | 3e-6 | 2e-7 |  |" in text
    assert r"| `c` |  |  | error |  |  |  |  | TypeError: 'x' \| \<y\> is\_not \[1\] and more |" in text
    assert "| ok, of those built | 50.0 % | |" in text
