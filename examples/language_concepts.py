"""What neurons of the language policy respond to, as a page: prompts, each word by what it gave to one neuron.

    python examples/language_concepts.py [--out language.html]

Explained is the logit of the answer, less that of the direction never to take. Units are the neurons of the first MLP,
at each word; by relevance per answer, with the prompts in which each mattered most. Needs the transformers library.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
from tensordict import TensorDict, TensorDictBase
from tensordict.nn import TensorDictModule
from torch import Tensor, nn

from tdhook import LRP, preset
from tdhook.concepts import ReferenceSamples
from tdhook.pages import UnitShown, write_concepts_report
from tdhook.rules import LayerNormRule
from tdhook.selectors import Type

sys.path.insert(0, str(Path(__file__).parent / "agents"))  # where the policy's own script is

from common import CHECKPOINTS
from language import DIRECTIONS, WORDS, network, prompts, tokenizer

LAYER = "module.model.model.layers.0.mlp.down_proj:input"
UNITS, SHOWN = 3, 4


class Difference(nn.Module):
    """The logit of one answer less that of another, of prompts that are embedded already."""

    def __init__(self) -> None:
        super().__init__()
        self.model = network().eval().requires_grad_(False)
        stored = torch.load(CHECKPOINTS / "language.pt", map_location="cpu", weights_only=True)
        self.model.load_state_dict(stored["weights"])

    def forward(self, embedded: Tensor, mask: Tensor, answer: Tensor, never: Tensor) -> Tensor:
        logits = self.model(inputs_embeds=embedded, attention_mask=mask, use_cache=False).logits[:, -1]
        return logits.gather(1, answer) - logits.gather(1, never)


def asked(count: int, seed: int) -> TensorDict:
    """Prompts with the direction to go and the one never to go, ``[count]``."""
    words = tokenizer()
    texts, right, wrong = prompts(count, seed)
    read = words(texts, padding=True, return_tensors="pt", return_token_type_ids=False)
    td = TensorDict({"tokens": read["input_ids"], "mask": read["attention_mask"]}, [count])
    for name, answers in (("answer", right), ("never", wrong)):
        td[name] = torch.tensor(words.convert_tokens_to_ids(answers)).unsqueeze(1)
    td["way"] = td["answer"].squeeze(1) - WORDS.index(DIRECTIONS[0])
    return td


def found(count: int = 2000, seed: int = 40_000) -> tuple[ReferenceSamples, dict[int, list[UnitShown]]]:
    """The neurons, and those that matter most for each answer, with their prompts."""
    network = Difference()
    policy = TensorDictModule(network, ["embedded", "mask", "answer", "never"], ["difference"])
    embedding = network.model.get_input_embeddings()

    def prepare(rows: TensorDictBase) -> TensorDictBase:
        return rows.copy().set("embedded", embedding(rows["tokens"]).detach())

    method = LRP([(Type("*RMSNorm"), LayerNormRule()), *preset("cp_lrp")])
    samples = ReferenceSamples(method, LAYER, axis=2, top=8 * SHOWN, groups="way", notes=())
    rows = asked(count, seed)
    samples.fold(policy, rows, prepare=prepare)
    shown: dict[int, list[UnitShown]] = {}
    for way in samples.found.groups:
        shown[way] = []
        for unit in samples.found.ranked(way)[:UNITS].tolist():
            frames = samples.frames(policy, rows, unit, group=way, count=SHOWN, fields=False, prepare=prepare)
            kept, tokens = frames["data", "mask"].bool(), frames["data", "tokens"]
            words = [[WORDS[token] for token in some[mask]] for some, mask in zip(tokens, kept, strict=True)]
            shown[way].append(UnitShown(unit, frames, words))
    return samples, shown


def main() -> None:
    """Write the page, and print which neurons matter for each answer, at which words."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("language.html"), help="file to write")
    out = parser.parse_args().out
    torch.set_num_threads(1)
    samples, shown = found()
    for way, several in shown.items():
        for one in several:
            mean = float(samples.found.mean(way)[one.unit])
            first = one.frames["data", "tokens"].shape[1]
            places = [
                words[int(place) - first + len(words)]
                for words, place in zip(one.words, one.frames["place"][:, 0], strict=True)
            ]
            print(
                f"{DIRECTIONS[way]:>6}: neuron {one.unit:2}, mean relevance {mean:+.2f}, at {', '.join(places)}"
            )
    write_concepts_report(
        samples.found,
        shown,
        out,
        groups=dict(enumerate(DIRECTIONS)),
        title="The language policy: neurons of its first MLP, by relevance for the answer",
        facts={
            "layer": LAYER,
            "explained": "the logit of the answer, less that of the direction never to take",
        },
    )
    print(f"wrote {out}")


if __name__ == "__main__":
    main()
