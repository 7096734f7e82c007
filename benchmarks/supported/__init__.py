"""Which models of transformers and torchvision are explained with all relevance accounted for: one line for each."""
