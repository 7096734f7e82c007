"""A model of which a part lies on the disk, explained: ``python examples/large/offloaded.py`` (needs accelerate).

``device_map`` says where each part lies. Weights come for each call and go again; relevance is what it is without.
"""

from __future__ import annotations

import tempfile

import torch
from accelerate import dispatch_model
from two_processes import explain, make_batch, make_model


def main() -> None:
    """Explain, and say how far from the model held in memory the relevance is."""
    expected = explain(make_model(), make_batch(0))
    with tempfile.TemporaryDirectory() as folder:
        places = {"0": "disk", "1": "cpu", "2": "disk"}
        model = dispatch_model(make_model(), places, main_device="cpu", offload_dir=folder, force_hooks=True)
        assert all(x.is_meta for x in model[0].parameters())
        found = explain(model, make_batch(0))
        assert all(x.is_meta for x in model[0].parameters())
    apart = (found - expected).abs().max() / expected.abs().max()
    print(f"offloaded: {apart:.0e} from the model held in memory")
    assert apart < 1e-9


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
